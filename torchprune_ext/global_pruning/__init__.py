"""One budget over many tensors: which units of the whole list go is decided by one exact selection.

Every function here takes ``(module, name)`` pairs, computes all scores and masks first, and then installs all masks or
none. The scores are compared across the list, the exact number of units goes, and among equal scores the lower index
of the earlier tensor is kept. Tensors that are the same object (tied weights) are scored and counted once and get the
same mask wherever they are listed.
"""

from torchprune_ext.global_pruning import channels, entries, nm, units
from torchprune_ext.global_pruning.channels import *  # noqa: F403 - what its __all__ names
from torchprune_ext.global_pruning.entries import *  # noqa: F403 - what its __all__ names
from torchprune_ext.global_pruning.nm import *  # noqa: F403 - what its __all__ names
from torchprune_ext.global_pruning.units import *  # noqa: F403 - what its __all__ names

__all__ = [*channels.__all__, *entries.__all__, *nm.__all__, *units.__all__]
