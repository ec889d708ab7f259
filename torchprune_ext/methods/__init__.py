"""Pruning methods: one criterion bound to one pattern, as subclasses of the host's ``BasePruningMethod``.

Each class works in two ways. Its ``apply`` checks everything, computes the mask from fresh weights and only then
touches the module. Its ``compute_mask`` follows the host's protocol, for whoever drives the class through
``torch.nn.utils.prune``, e.g. ``global_unstructured(..., pruning_method=GradientMagnitude)``.
"""

from torchprune_ext.methods.base import GlobalPruning, Method
from torchprune_ext.methods.entries import EveryOther, GradientMagnitude, OBDSaliency, Threshold
from torchprune_ext.methods.units import BNScaling, KernelLn, NMStructured, VectorLn

__all__ = [
    "BNScaling",
    "EveryOther",
    "GlobalPruning",
    "GradientMagnitude",
    "KernelLn",
    "Method",
    "NMStructured",
    "OBDSaliency",
    "Threshold",
    "VectorLn",
]
