"""One budget over many tensors: which units of the whole list go is decided by one exact selection.

Every function here takes ``(module, name)`` pairs, computes all scores and masks first, and then installs all masks or
none. The scores are compared across the list, the exact number of units goes, and among equal scores the lower index
of the earlier tensor is kept. Tensors that are the same object (tied weights) are scored and counted once and get the
same mask wherever they are listed.
"""

from torchprune_ext.global_pruning.channels import global_bn_scaling
from torchprune_ext.global_pruning.entries import (
    global_gradient_magnitude,
    global_obd_saliency,
    global_unstructured,
)
from torchprune_ext.global_pruning.nm import global_nm_structured
from torchprune_ext.global_pruning.units import global_kernel_ln, global_ln_structured, global_vector_ln

__all__ = [
    "global_bn_scaling",
    "global_gradient_magnitude",
    "global_kernel_ln",
    "global_ln_structured",
    "global_nm_structured",
    "global_obd_saliency",
    "global_unstructured",
    "global_vector_ln",
]
