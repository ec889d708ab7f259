"""Pictures of what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchprune_ext.plots.drawing import DENSE, KEPT, LINE, check_ax, import_pyplot
from torchprune_ext.workflow.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["sensitivity"]

PALETTE = (KEPT, DENSE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # of Okabe and Ito
STYLES = ("-", "--", ":", "-.")  # tell lines of one colour apart
MARKERS = "os^Dv"


def sensitivity(curve: Sensitivity, ax: Axes | None = None) -> Axes:
    """Draw what the metric is when one layer alone is pruned, as a line for each layer over the sparsity.

    Args:
        curve: what :func:`.workflow.sensitivity.sensitivity` returned.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; the metric of the model as it is is a grey line.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``curve`` is not such a curve, or ``ax`` is not 2-D axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> layer = nn.Linear(4, 4)
        >>> def size(model):
        ...     return model.weight.detach().norm()
        >>> curve = tpe.allocation.sensitivity(layer, size, [(layer, "weight")], (0.25, 0.5), progress=False)
        >>> ax = sensitivity(curve, ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines], ax.get_xlabel()
        (['dense', 'weight'], 'sparsity of the layer (% of its entries)')
    """
    pyplot = import_pyplot()
    if not isinstance(curve, Sensitivity):
        raise TypeError(f"curve is a {type(curve).__name__}. Pass what allocation.sensitivity(...) returned.")
    if ax is None:
        ax = pyplot.subplots(figsize=(7, 4), layout="constrained")[1]
    check_ax("ax", ax)
    ax.axhline(curve.dense, color=LINE, linewidth=1, label="dense", zorder=1)
    for place, layer in enumerate(curve.layers):
        rows = [row for row in curve.rows if row.layer == layer.path]
        ax.plot(
            [0.0, *(100 * row.reached for row in rows)],
            [curve.dense, *(row.metric for row in rows)],
            color=PALETTE[place % len(PALETTE)],
            linestyle=STYLES[place // len(PALETTE) % len(STYLES)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            label=layer.path,
        )
    ax.set(xlabel=f"sparsity of the layer (% of its {curve.units})", ylabel="metric", xlim=(0, 100))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", ncols=1 + len(curve.layers) // 20)
    return ax
