"""Pictures of what happens as the sparsity rises, and of how it rises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchprune_ext.plots.drawing import LINE, PALETTE, axes_for, import_pyplot, label
from torchprune_ext.schedules import Schedule
from torchprune_ext.workflow.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["schedule", "sensitivity"]

STYLES = ("-", "--", ":", "-.")  # tell lines of one colour apart
MARKERS = "os^Dv"
FEW_LINES = 8  # of which the names have room inside of the axes
MOST_POINTS = 1000  # of a line


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
    import_pyplot()
    if not isinstance(curve, Sensitivity):
        raise TypeError(f"curve is a {type(curve).__name__}. Pass what allocation.sensitivity(...) returned.")
    count = len(curve.layers)
    ax = axes_for(ax, 7, max(4.0, 0.18 * min(count, 40)))
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
            label=label(layer.path),
        )
    ax.set(xlabel=f"sparsity of the layer (% of its {curve.units})", ylabel="metric", xlim=(0, 100))
    ax.spines[["top", "right"]].set_visible(False)
    if count <= FEW_LINES:
        ax.legend(frameon=False, fontsize="small")
    else:  # beside the axes
        columns = 1 + (count - 1) // 30
        ax.legend(frameon=False, fontsize="x-small", ncols=columns, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def schedule(schedule: Schedule, ax: Axes | None = None) -> Axes:
    """Draw which sparsity a schedule asks for at each training step, as stairs with a dot at each update.

    Drawn on the axes of another schedule, the two are told apart by colour, line and legend.

    Args:
        schedule: what a function of :mod:`torchprune_ext.schedules` returned.
        ax: where to draw; a new figure by default.

    Returns:
        The axes. Of more than 1,000 updates, 1,000 are drawn.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``schedule`` is not a schedule, or ``ax`` is not 2-D axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> import torchprune_ext as tpe
        >>> ax = schedule(tpe.schedules.cubic(start=0, end=4, final=0.8), ax=Figure().subplots())
        >>> [round(float(value)) for value in ax.lines[0].get_ydata()], ax.get_xlabel()
        ([0, 46, 70, 79, 80, 80], 'training step')
    """
    import_pyplot()
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}. Pass e.g. schedules.cubic(0, 1000, final=0.9).")
    ax = axes_for(ax, 6, 3.2)
    place = len(ax.lines)
    count = 1 + -(-(schedule.end - schedule.start) // schedule.every)  # updates
    stride = schedule.every * -(-count // MOST_POINTS)
    updates = [*range(schedule.start, schedule.end, stride), schedule.end]
    rest = max(1, (schedule.end - schedule.start) // 10, schedule.end // 20)
    steps = sorted({0, *updates, schedule.end + rest})
    (line,) = ax.plot(
        steps,
        [100 * schedule(step) for step in steps],
        drawstyle="steps-post",
        color=PALETTE[place % len(PALETTE)],
        linestyle=STYLES[place % len(STYLES)],
        label=repr(schedule).partition("(")[0] + (f", every {schedule.every:,} steps" if schedule.every > 1 else ""),
    )
    if len(updates) <= 50:
        dots = [steps.index(step) for step in updates]
        line.set(marker="o", markersize=4, markevery=dots)
    ax.set(xlabel="training step", ylabel="sparsity (%)", ylim=(0, 100))
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(framealpha=0.8, edgecolor="none", fontsize="small", loc="lower right")
    return ax
