"""Pruning methods: one criterion bound to one pattern, as subclasses of PyTorch's ``BasePruningMethod``.

Each class works in two ways. Its ``apply`` checks everything, computes the mask from fresh weights and only then
touches the module. Its ``compute_mask`` follows PyTorch's protocol, for whoever drives the class through
``torch.nn.utils.prune``, e.g. ``global_unstructured(..., pruning_method=GradientMagnitude)``.
"""

from torchprune_ext.methods import base, entries, units
from torchprune_ext.methods.base import *  # noqa: F403 - what its __all__ names
from torchprune_ext.methods.entries import *  # noqa: F403 - what its __all__ names
from torchprune_ext.methods.units import *  # noqa: F403 - what its __all__ names

__all__ = [*base.__all__, *entries.__all__, *units.__all__]
