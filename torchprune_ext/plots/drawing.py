"""What all pictures share: colours, axes, and matplotlib itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = "#0072B2"  # blues and orange of Okabe and Ito's palette, told apart by everyone and in print
CUBE = "#56B4E9"  # the lit side of a kept cube
DENSE = "#E69F00"
PRUNED = "#E9E9E9"
LINE = "#4D4D4D"
PALETTE = (KEPT, DENSE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # of Okabe and Ito
SMALLEST_TEXT = 5.0  # points; what would have to be smaller is not written
HATCHES = ("", "///", "...", "xxx")  # tell areas of one colour apart


def check_ax(param: str, ax: object, projection: str = "rectilinear") -> None:
    """Raise ``TypeError`` unless ``ax``, the caller's ``param``, is axes of matplotlib of that ``projection``."""
    from matplotlib.axes import Axes

    example = "figure.add_subplot(projection='3d')" if projection == "3d" else "figure.add_subplot()"
    if not isinstance(ax, Axes):
        raise TypeError(f"{param} is a {type(ax).__name__}. Pass matplotlib axes, e.g. {example}.")
    if ax.name != projection:
        raise TypeError(f"{param} has the projection {ax.name!r}, not {projection!r}. Pass e.g. {example}.")


def axes_for(ax: Axes | None, width: float, height: float) -> Axes:
    """Return ``ax``, if it is 2-D axes, or those of a new figure of that size in inches."""
    pyplot = import_pyplot()
    if ax is None:
        new: Axes = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
        return new
    check_ax("ax", ax)
    return ax


def write_beside(ax: Axes, bars: Sequence[tuple[float, float]], notes: Sequence[str], least: float) -> None:
    """Write a note to the right of each bar, and let the x axis be so long that they fit in.

    To be called last, as the notes are as large as the bars leave room for; none is written that would be too small.

    Args:
        ax: axes from 0 to the right, with a row for each bar.
        bars: where the bars end, x and y.
        notes: their texts.
        least: end of the x axis at least.
    """
    from matplotlib import rcParams

    figure: Any = ax.figure
    figure.figure.draw_without_rendering()  # gives the axes their size
    extent, points = ax.get_window_extent(), 72 / figure.dpi
    rows = sorted(y for _, y in bars)
    pitch = min((below - above for above, below in pairwise(rows)), default=1.0)
    (bottom, top), full = ax.get_ylim(), rcParams["font.size"] / 1.2
    size = min(full, points * extent.height * pitch / abs(top - bottom))
    ends = [least]
    if size >= SMALLEST_TEXT:
        style: dict[str, Any] = {"va": "center", "color": LINE, "fontsize": size}
        for (x, y), note in zip(bars, notes, strict=True):
            text = ax.annotate(note, (x, y), xytext=(4, 0), textcoords="offset points", **style)
            needed = (text.get_window_extent().width + 8 / points) / extent.width
            ends.append(x / max(1 - needed, 0.2))
    ax.set_xlim(0, max(ends))


def legend_above(ax: Axes, entries: int) -> None:
    """Write the legend above ``ax``, in as many columns as it is wide for."""
    width = ax.get_window_extent().width / ax.figure.dpi  # inches
    columns = max(1, min(entries, int(width / 1.3)))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, fontsize="small")


def label(name: str) -> str:
    r"""Return a name as matplotlib shows it: it leaves a label out that begins with ``_``, and reads ``$`` as formulas.

    Example:
        >>> label("_stem.weight"), label("costs $5")
        (' _stem.weight', 'costs \\$5')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def import_pyplot() -> Any:
    """Return ``matplotlib.pyplot``, or say which extra brings it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install torchprune-ext[plots]") from error
    return pyplot


def check_drawable(where: str, tensor: Tensor) -> None:
    """Raise unless ``tensor``, for errors ``where``, has real values that can be read here."""
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values to draw. Materialize it first.")
    if tensor.is_complex():
        raise TypeError(f"{where} is complex ({tensor.dtype}). Draw a real tensor, e.g. its absolute values.")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(f"{where} is a DTensor, of which other processes hold parts. Draw its full_tensor().")


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the values as float64 on the CPU, from any device, dtype and layout."""
    plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach().to_dense()
    return plain.to("cpu", torch.float64)
