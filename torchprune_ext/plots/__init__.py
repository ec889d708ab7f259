"""Pictures of tensors, models, schedules and comparisons, in colours that do not depend on telling red from green.

Every function draws on ``ax``, or on a new figure without it, and returns what it drew on; none of them shows, saves or
changes a setting of matplotlib. matplotlib comes with the extra ``plots`` and is imported only when a picture is drawn.

An entry is pruned where its mask is 0, or, in a tensor without a mask, where its value is exactly 0. So a model looks
the same before and after its pruning is made permanent. A tensor that several modules share (tied weights) is drawn
under each of their names.
"""

from torchprune_ext.plots.costs import compare
from torchprune_ext.plots.curves import schedule, sensitivity
from torchprune_ext.plots.drawing import DENSE, KEPT, PRUNED
from torchprune_ext.plots.masks import mask_cubes, mask_image
from torchprune_ext.plots.steps import history
from torchprune_ext.plots.weights import density_bars, weight_histograms

__all__ = [
    "DENSE",
    "KEPT",
    "PRUNED",
    "compare",
    "density_bars",
    "history",
    "mask_cubes",
    "mask_image",
    "schedule",
    "sensitivity",
    "weight_histograms",
]
