"""Pictures of models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchprune_ext.deploy.compare import HEADS, Comparison, cell
from torchprune_ext.plots.drawing import HATCHES, LINE, PALETTE, axes_for, import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["compare"]

WIDEST = 250  # percent; longer bars are cut, and their numbers tell
ROOM = 0.012  # of the axes, for each letter of a note


def compare(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Draw what models are worth and what they cost, in percent of the first: a group of bars for each number.

    The number itself stands beside its bar, and the interquartile range of a latency is a line on it. A bar that would
    be longer than 250 % is cut there, and has an arrow; what is not known, or has no ratio, has no bar.

    Args:
        comparison: what :func:`.compare` returned.
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
        >>> [bar.get_width() for bar in ax.containers[-1]][1:]
        [50.0, 50.0, 50.0, 50.0]
    """
    import_pyplot()
    if not isinstance(comparison, Comparison):
        raise TypeError(f"comparison is a {type(comparison).__name__}. Pass what compare(...) returned.")
    first, names = comparison.rows[0], list(comparison.rows[0].values())
    count = len(comparison.rows)
    ax = axes_for(ax, 7, 1 + 0.26 * len(names) * (count + 0.6))
    thickness = 1 / (count + 0.6)
    spot, ends, longest = names.index("latency"), [100.0], 0
    for number, row in enumerate(comparison.rows):
        ratios = comparison.ratios(row)
        shares = [100 * (ratios[name] or 0.0) for name in names]
        middles = [place + thickness * (number - (count - 1) / 2) for place in range(len(names))]
        lengths = [min(max(share, 0.0), WIDEST) for share in shares]
        ax.barh(
            middles,
            lengths,
            height=0.9 * thickness,
            color=PALETTE[number % len(PALETTE)],
            hatch=HATCHES[number // len(PALETTE) % len(HATCHES)],
            label=row.name,
        )
        tips = list(lengths)
        if first.latency:
            half = 50 * row.spread / first.latency
            range_ = [max(0.0, lengths[spot] - half), min(lengths[spot] + half, WIDEST)]
            ax.plot(range_, [middles[spot]] * 2, color=LINE, linewidth=1, marker="|", markersize=5)
            tips[spot] = range_[1]
        for name, share, tip, middle in zip(names, shares, tips, middles, strict=True):
            note = cell(row, name) + " →" * (share > WIDEST)
            style: dict[str, Any] = {"va": "center", "fontsize": "small", "color": LINE}
            ax.annotate(note, (tip, middle), xytext=(4, 0), textcoords="offset points", **style)
            longest = max(longest, len(note))
        ends += tips
    ax.axvline(100, color=LINE, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_yticks(range(len(names)), labels=[HEADS.get(name, name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlim=(0, max(ends) / max(0.3, 1 - ROOM * longest)), xlabel=f"% of {first.name}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(count, 4), frameon=False)
    return ax
