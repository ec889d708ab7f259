"""Pictures of single tensors: which entries of a matrix or of a convolution are left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from torchprune_ext._host import Target, targets_in
from torchprune_ext.plots.drawing import (
    CUBE,
    KEPT,
    LINE,
    PRUNED,
    SMALLEST_TEXT,
    axes_for,
    check_ax,
    check_drawable,
    import_pyplot,
    on_cpu,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]

__all__ = ["mask_cubes", "mask_image"]

SMALLEST_CELL = 4.0  # points; smaller ones have no lines between them
MOST_CELLS = 400  # rows or columns that a picture of usual size can show one by one
MOST_CUBES = 10_000  # more take minutes, and none of them can be told from the next


def mask_image(tensor: Tensor | nn.Module, ax: Axes | None = None, *, name: str = "weight") -> Axes:
    """Draw a matrix with its pruned entries in grey and its other entries in blue.

    The values are written into the cells where they fit, unless they are only 0 and 1, as in a mask. Of more than 400
    rows or columns, several share a pixel, which is the bluer the more of its entries are kept.

    Args:
        tensor: a weight or mask of shape (rows, columns), of any dtype but complex; zeros are grey. Or a layer: of its
            weight, what the mask prunes is grey, or what is zero if there is no mask. The weight of a convolution is
            laid out as a tile for each kernel, with a row of tiles for each filter.
        ax: where to draw; a new figure by default.
        name: of the layer's tensor, e.g. ``"weight_ih_l0"`` of an ``LSTM``.

    Returns:
        The axes, rows from top to bottom as in print.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``tensor`` is neither a real tensor nor a layer, or ``ax`` is not 2-D axes.
        ValueError: ``tensor`` is not 2-D, or has no entries or no data, or the layer has no such tensor.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = mask_image(torch.eye(3), ax=Figure().subplots())
        >>> ax.get_images()[0].get_array().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    import_pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    tile, labels = (1, 1), ("", "")
    if isinstance(tensor, nn.Module):
        values, kept = _entries_of(tensor, name)
        if values.dim() > 2:
            labels = ("channels", "filters") if isinstance(tensor, _ConvTransposeNd) else ("filters", "channels")
            tile = (math.prod(values.shape[2:-1]), values.shape[-1])
            values, kept = _as_tiles(values), _as_tiles(kept)
        values, kept = torch.atleast_2d(values), torch.atleast_2d(kept)
    else:
        values = _values_with_axes("mask_image", tensor, 2, "Pass e.g. tensor.reshape(len(tensor), -1).")
        kept = (values != 0).double()
    rows, columns = values.shape
    ax = axes_for(ax, *_page(rows, columns))
    block = math.ceil(rows / MOST_CELLS), math.ceil(columns / MOST_CELLS)
    shown = kept if block == (1, 1) else F.avg_pool2d(kept[None], block, ceil_mode=True, count_include_pad=False)[0]
    ax.imshow(
        shown.numpy(),
        cmap=LinearSegmentedColormap.from_list("kept", [PRUNED, KEPT]),
        vmin=0,
        vmax=1,
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        interpolation="nearest",
        aspect="auto" if _is_long(rows, columns) else "equal",
    )
    ax.set(xticks=[], yticks=[], ylabel=labels[0], xlabel=labels[1])
    ax.spines[:].set_visible(False)
    if block != (1, 1):
        told = f"{rows:,} x {columns:,}, a pixel is {block[0]} x {block[1]}:\nthe bluer, the more are kept"
        ax.set_xlabel(told, fontsize="small")
        return ax
    _draw_lines(ax, (rows, columns), tile)
    if not values.equal(kept):
        _write_values(ax, values, kept)
    return ax


def mask_cubes(tensor: Tensor | nn.Module, ax: Axes3D | None = None) -> Axes3D:
    """Draw the weight of a 2-D convolution as blocks of cubes, one block per filter: kept solid, pruned transparent.

    Inside a block, the channels lie on top of each other, the first one uppermost.

    Args:
        tensor: a weight or mask of shape (filters, channels, height, width), of any dtype but complex, or a 2-D
            convolution; made for some hundreds of entries.
        ax: where to draw, with ``projection="3d"``; a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``tensor`` is not a real tensor, or ``ax`` is not 3-D axes.
        ValueError: ``tensor`` is not 4-D, has no entries or no data, or has more than 10,000 entries.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = mask_cubes(torch.ones(2, 3, 4, 4), ax=Figure().add_subplot(projection="3d"))
        >>> [text.get_text() for text in ax.texts]
        ['filter 0', 'filter 1', 'channel 0', 'channel 1', 'channel 2']
    """
    pyplot = import_pyplot()
    if isinstance(tensor, nn.Module):
        tensor = _entries_of(tensor, "weight")[1]
    kept = _values_with_axes("mask_cubes", tensor, 4, "Use mask_image for a matrix.") != 0
    if kept.numel() > MOST_CUBES:
        raise ValueError(
            f"tensor.shape={tuple(tensor.shape)} would be {kept.numel():,} cubes, and mask_cubes draws at most "
            f"{MOST_CUBES:,}. Pass a part of it, e.g. tensor[:4, :4], or draw the whole layer by mask_image(layer)."
        )
    if ax is None:
        ax = pyplot.figure(figsize=(6, 4)).add_subplot(projection="3d")
    check_ax("ax", ax, "3d")
    filters, channels, height, width = kept.shape
    left = [1.6 * width * number for number in range(filters)]
    bottom = [1.5 * (channels - 1 - number) for number in range(channels)]
    places = torch.ones_like(kept).nonzero().tolist()  # every (filter, channel, row, column)
    x = [left[place[0]] + place[3] for place in places]
    y = [place[2] for place in places]
    z = [bottom[place[1]] for place in places]
    faces, edges = _cube_colours(kept)
    cubes = ax.bar3d(x, y, z, 1, 1, 1, shade=False, color=faces, edgecolor=edges, linewidth=0.5)
    cubes.set_clip_on(False)  # axes in 3-D clip to a square, this picture is wide
    size = (left[-1] + width, height, bottom[0] + 1)
    ax.set(xlim=(0, size[0]), ylim=(height, 0), zlim=(0, size[2]))
    ax.set_box_aspect(size, zoom=1.25)
    ax.set_proj_type("ortho")
    ax.view_init(elev=22, azim=-75)
    ax.set_axis_off()
    style: dict[str, Any] = {"color": LINE, "fontsize": "small"}
    for number in range(filters):
        ax.text(left[number] + width / 2, height, -1, f"filter {number}", ha="center", va="top", **style)
    for number in range(channels):
        ax.text(-0.7, height, bottom[number] + 0.5, f"channel {number}", ha="right", va="center", **style)
    return ax


def _is_long(rows: int, columns: int) -> bool:
    """Return whether square cells would leave a stripe."""
    return max(rows, columns) > 8 * min(rows, columns)


def _page(rows: int, columns: int) -> tuple[float, float]:
    """Return the width and height of a figure of so many cells, in inches."""
    if _is_long(rows, columns):
        return 6.4, 4.8
    return (6.4, 0.6 + 6.4 * rows / columns) if rows < columns else (0.6 + 5 * columns / rows, 5.0)


def _entries_of(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return the values of a layer's tensor, 0 where it is pruned, and where it is not, as 1 and 0."""
    target = Target.found(layer, name)
    kind = type(layer).__name__
    if target is None or target.parameter is None:
        own = [each.name for each in targets_in(layer)]
        inside = [path for path, module in layer.named_modules() if path and Target.found(module, name) is not None]
        remedy = f"Pass name= one of {own}." if own else "Pass a layer that has one."
        if inside:
            remedy = f"Pass a layer of it, e.g. {inside[:4]}."
        raise ValueError(f"tensor is a {kind}, which has no parameter {name!r} of its own. {remedy}")
    if is_lazy(target.parameter):
        raise ValueError(f"tensor: {kind}.{name} has no shape yet. Run one forward first, then draw.")
    where = f"tensor: {target.where}"
    check_drawable(where, target.parameter)
    if target.parameter.numel() == 0:
        raise ValueError(f"{where} has no entries to draw. Pass a layer that has some.")
    values = on_cpu(target.weight())
    return values, ((values if target.mask is None else on_cpu(target.mask)) != 0).double()


def _as_tiles(tensor: Tensor) -> Tensor:
    """Return a weight (filters, channels, ..., width) as a matrix with a tile for each kernel."""
    last = tensor.dim() - 1
    moved = tensor.permute(0, *range(2, last), 1, last)
    return moved.reshape(math.prod(moved.shape[:-2]), -1)


def _cell_size(ax: Axes, rows: int, columns: int) -> tuple[float, float]:
    """Return the width and height of a cell in points."""
    extent = ax.get_window_extent()
    width, height = (72 / ax.figure.dpi * size for size in (extent.width / columns, extent.height / rows))
    return (width, height) if ax.get_aspect() == "auto" else (min(width, height),) * 2


def _draw_lines(ax: Axes, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    """Draw white lines between cells that are large enough, and thicker ones between tiles of several cells."""
    rows, columns = shape
    small = min(_cell_size(ax, rows, columns))
    for size, width, wanted in (
        ((1, 1), min(1.0, small / 8), small >= SMALLEST_CELL),
        (tile, min(4.0, small / 2), tile != (1, 1)),
    ):
        if not wanted:
            continue
        style: dict[str, Any] = {"colors": "white", "linewidth": width}
        ax.vlines([x - 0.5 for x in range(size[1], columns, size[1])], -0.5, rows - 0.5, **style)
        ax.hlines([y - 0.5 for y in range(size[0], rows, size[0])], -0.5, columns - 0.5, **style)


def _write_values(ax: Axes, values: Tensor, kept: Tensor) -> None:
    """Write each value into its cell, unless the cells are too small to read it."""
    width, height = _cell_size(ax, *values.shape)
    if values.numel() > MOST_CELLS:
        return
    # a pruned negative value is -0.0
    texts = [[f"{value or 0.0:.2g}" for value in row] for row in values.tolist()]
    longest = max(len(text) for row in texts for text in row)
    size = min(11.0, width / 0.7 / longest, height / 1.6)  # a digit is about 0.6 em wide
    if size < SMALLEST_TEXT:
        return
    for row, cells in enumerate(texts):
        for column, text in enumerate(cells):
            colour = "white" if kept[row, column] else LINE
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _values_with_axes(function: str, tensor: Tensor, count: int, remedy: str) -> Tensor:
    """Return the values of ``tensor`` unless it is not a tensor of ``count`` axes with entries."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}. Pass a torch.Tensor, e.g. torch.as_tensor(array).")
    if tensor.dim() != count:
        raise ValueError(
            f"tensor.shape={tuple(tensor.shape)} has {tensor.dim()} axes, and {function} draws {count}. {remedy}"
        )
    if tensor.numel() == 0:
        raise ValueError(f"tensor.shape={tuple(tensor.shape)} has no entries to draw. Pass a tensor that has some.")
    check_drawable("tensor", tensor)
    return on_cpu(tensor)


def _cube_colours(kept: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the colours of all faces of the cubes (each: bottom, top, four sides) and of their edges."""
    from matplotlib.colors import to_rgba

    red, green, blue, _ = to_rgba(CUBE)
    light = (0.5, 1.0, 0.75, 0.75, 0.55, 0.55)
    solid = [(red * part, green * part, blue * part, 1.0) for part in light]
    faint = [to_rgba(LINE, 0.02)] * 6
    alive = kept.flatten().tolist()
    faces = [face for one in alive for face in (solid if one else faint)]
    edges = [to_rgba("white") if one else to_rgba(LINE, 0.12) for one in alive for _ in range(6)]
    return faces, edges
