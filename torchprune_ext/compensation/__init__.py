"""Survivors that make up for the dead: re-fit a pruned network, layer by layer, without training it.

Each layer is fitted by least squares to the outputs that the dense model has there, on the inputs that the pruned and
already fitted model gives it. One pass over the data treats all layers in sequence; it needs no targets. Masks are
ordinary masks of the host, of any method, and what is computed goes into ``weight_orig`` and the bias.

The model runs in eval mode on every batch twice over (dense and pruned side by side), so its samples must not mix.
Beside one layer's moments, inputs x inputs in float64, the activations of all batches between two layers are held:
pass as much data as fits, e.g. with ``max_batches``.
"""

from torchprune_ext.compensation.baseline import sparsegpt
from torchprune_ext.compensation.calls import compensate, prune_and_compensate
from torchprune_ext.compensation.fitting import Fit, Fits

__all__ = ["Fit", "Fits", "compensate", "prune_and_compensate", "sparsegpt"]
