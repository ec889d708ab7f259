"""Scores from data: run a model over batches and collect what the criteria need.

All functions return ``{(module, name): tensor}``, the form that native ``global_unstructured`` and every call here take
as ``importance_scores`` (or ``hessian_diag``). The tensors have the shape and device of the parameter and are at least
float32. Pruned models are calibrated at their effective weights, and what a pruned entry would be worth is told too.
The model is left exactly as it was. The options of all functions that read data are those of :class:`.Options`. What is
returned knows its kind, so that a curvature is not taken for scores.

Beside a training step's memory a statistic takes one tensor per parameter, one more per pruned parameter, at most
64 MB where it needs the gradients of single samples, and what its docstring says beyond that.
"""

from torchprune_ext._loading import Options
from torchprune_ext._statistics import Curvature, Gradients, ImportanceScores
from torchprune_ext.calibration.at_init import grasp, snip, synflow
from torchprune_ext.calibration.curvature import HessianDiagonal, hessian_diagonal
from torchprune_ext.calibration.first_order import fisher, gradients, taylor
from torchprune_ext.calibration.forward_only import activations, random

__all__ = [
    "Curvature",
    "Gradients",
    "HessianDiagonal",
    "ImportanceScores",
    "Options",
    "activations",
    "fisher",
    "gradients",
    "grasp",
    "hessian_diagonal",
    "random",
    "snip",
    "synflow",
    "taylor",
]
