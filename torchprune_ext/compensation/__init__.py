"""Pruning without training: re-fit what is left of a pruned network, layer by layer.

Each layer is fitted by least squares to the outputs that the dense model has there, on the inputs that the pruned and
already fitted model gives it. One pass over the data treats all layers in sequence; it needs no targets. Masks are
ordinary masks, of any method, native or from here, and what is computed goes into ``weight_orig`` and the bias.

Each batch goes through the model twice, in eval mode: as the reference model and as the pruned one, side by side.
Beside one layer's moments, inputs x inputs in float64, the activations of all batches between two layers are held:
pass as much data as fits, e.g. with ``max_batches``, or a folder for them as ``offload``. Several processes can share
the data, see ``process_group`` of :class:`.Options`.
"""

from torchprune_ext._loading import PassOptions
from torchprune_ext.compensation.baseline import sparsegpt
from torchprune_ext.compensation.batch_norm import recalibrate_bn
from torchprune_ext.compensation.block_fitting import Refined, RefinedBlock
from torchprune_ext.compensation.calls import compensate, prune_and_compensate
from torchprune_ext.compensation.fitting import Fit, Fits
from torchprune_ext.compensation.reference import DenseValues, dense_values
from torchprune_ext.compensation.refining import refine
from torchprune_ext.compensation.rounds import prune_in_rounds

__all__ = [
    "DenseValues",
    "Fit",
    "Fits",
    "PassOptions",
    "Refined",
    "RefinedBlock",
    "compensate",
    "dense_values",
    "prune_and_compensate",
    "prune_in_rounds",
    "recalibrate_bn",
    "refine",
    "sparsegpt",
]
