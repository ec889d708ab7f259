"""Pictures of models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchprune_ext.deploy.compare import HEADS, Comparison, cell
from torchprune_ext.plots.drawing import (
    HATCHES,
    LINE,
    PALETTE,
    axes_for,
    import_pyplot,
    label,
    legend_above,
    write_beside,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["compare"]

WIDEST = 250  # percent; longer bars are cut, and their numbers tell


def compare(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Draw what models are worth and what they cost, in percent of the first: a group of bars for each number.

    The number itself stands beside its bar, and the interquartile range of a latency is a line on it. A bar that would
    be longer than 250 % is cut there, and has an arrow; what is not known, or has no ratio, has no bar.

    Args:
        comparison: what :func:`.deploy.compare.compare` returned.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, metrics and costs from top to bottom, and models from top to bottom in each.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``comparison`` is not a comparison, or ``ax`` is not 2-D axes.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> found = tpe.compare({"wide": nn.Linear(8, 8), "narrow": nn.Linear(8, 4)}, torch.ones(1, 8), rounds=2)
        >>> ax = compare(found, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['latency', 'MACs', 'parameters', 'nonzero', 'bytes']
        >>> [int(bar.get_width()) for bar in ax.containers[-1]][1:]
        [50, 50, 50, 50]
    """
    import_pyplot()
    if not isinstance(comparison, Comparison):
        raise TypeError(f"comparison is a {type(comparison).__name__}. Pass what compare(...) returned.")
    first, names = comparison.rows[0], list(comparison.rows[0].values())
    count = len(comparison.rows)
    ax = axes_for(ax, 7, 1 + 0.26 * len(names) * (count + 0.6))
    thickness = 1 / (count + 0.6)
    spot, ends, notes = names.index("latency"), [], []
    for number, row in enumerate(comparison.rows):
        ratios = comparison.ratios(row)
        shares = [100 * (ratios[name] or 0.0) for name in names]
        middles = [place + thickness * (number - (count - 1) / 2) for place in range(len(names))]
        lengths = [min(max(share, 0.0), WIDEST) for share in shares]
        colour, hatch = PALETTE[number % len(PALETTE)], HATCHES[number // len(PALETTE) % len(HATCHES)]
        ax.barh(middles, lengths, height=0.9 * thickness, color=colour, hatch=hatch, label=label(row.name))
        if first.latency:
            half = 50 * row.spread / first.latency
            around = [max(0.0, lengths[spot] - half), min(lengths[spot] + half, WIDEST)]
            ax.plot(around, [middles[spot]] * 2, color=LINE, linewidth=1, marker="|", markersize=4)
            lengths[spot] = around[1]
        ends += list(zip(lengths, middles, strict=True))
        notes += [cell(row, name) + " →" * (share > WIDEST) for name, share in zip(names, shares, strict=True)]
    ax.axvline(100, color=LINE, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yticks(range(len(names)), labels=[HEADS.get(name, name) for name in names])
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"% of {label(first.name).strip()}")
    ax.spines[["top", "right"]].set_visible(False)
    legend_above(ax, count)
    write_beside(ax, ends, notes, 100)
    return ax
