"""Pictures of what was done to a model."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from torch import nn

from torchprune_ext._checks import check_module
from torchprune_ext._tables import percent
from torchprune_ext.plots.drawing import HATCHES, PALETTE, axes_for, import_pyplot, label, legend_above, write_beside
from torchprune_ext.reporting import Report, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["history"]


def history(model: nn.Module | Report, ax: Axes | None = None) -> Axes:
    """Draw which calls pruned each tensor, in their order, and how much of it is kept now.

    A row is a pruned tensor and a field is a call, native ones included; calls of one kind in a row share a field that
    is as much wider. What each of them left is not kept anywhere, so the density is that of now. Pruning that was made
    permanent has left no history.

    Args:
        model: a pruned network, or the :func:`.report` of one.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, tensors from top to bottom in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``model`` is neither a module nor a report, or ``ax`` is not 2-D axes.
        ValueError: nothing in it is pruned by a mask, as after :func:`.remove_all`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> import torchprune_ext as tpe
        >>> layer = nn.utils.prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
        >>> _ = tpe.nm_structured(layer, "weight", n=2, m=4)
        >>> ax = history(layer, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['L1Unstructured', 'NMStructured']
    """
    import_pyplot()
    if not isinstance(model, Report):
        check_module("model", model)
        model = report(model)
    rows = [row for row in model if row.source == "mask"]
    if not rows:
        raise ValueError(
            f"model of type {model.model} has no tensor that a mask prunes, and so no history: it ends when pruning is "
            "made permanent. Draw it before that, or draw densities by density_bars."
        )
    ax = axes_for(ax, 7, 1.1 + 0.3 * len(rows))
    longest = max(len(row.history) for row in rows)
    looks: dict[str, tuple[str, str]] = {}
    notes = []
    for place, row in enumerate(rows):
        done = 0
        for call, same in groupby(each.partition("(")[0] for each in row.history):
            number = len(looks)
            colour = PALETTE[number % len(PALETTE)], HATCHES[number // len(PALETTE) % len(HATCHES)]
            shown = "_" if call in looks else label(call)
            fill, hatch = looks.setdefault(call, colour)
            times = len(list(same))
            ax.barh(place, times, left=done, height=0.7, color=fill, hatch=hatch, edgecolor="white", label=shown)
            if times > 1:
                box = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.15"}
                ax.text(done + times / 2, place, f"{times} x", ha="center", va="center", fontsize="small", bbox=box)
            done += times
        notes.append(f"{percent(row.density)} kept" + ("" if row.history else ", history lost"))
    ax.set_yticks(range(len(rows)), labels=[label(row.name) for row in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="calls, in their order")
    ax.locator_params(axis="x", integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    if looks:
        legend_above(ax, len(looks))
    write_beside(ax, [(len(row.history), place) for place, row in enumerate(rows)], notes, max(longest, 1))
    return ax
