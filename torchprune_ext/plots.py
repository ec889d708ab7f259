"""Pictures of pruned tensors and models, in colours that do not depend on telling red from green.

Every function draws on ``ax``, or on a new figure without it, and returns what it drew on; none of them shows, saves or
changes a setting of matplotlib. matplotlib comes with the extra ``plots`` and is imported only when a picture is drawn.

"Pruned" is what a mask says where there is one, and otherwise every entry that is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]

KEPT = "#0072B2"  # blues and orange of Okabe and Ito's palette, told apart by everyone and in print
CUBE = "#56B4E9"  # the lit side of a kept cube
DENSE = "#E69F00"
PRUNED = "#E9E9E9"
LINE = "#4D4D4D"
SMALLEST_TEXT = 5.0  # points; values that would have to be smaller are left out


def mask_image(tensor: Tensor, ax: Axes | None = None) -> Axes:
    """Draw a matrix with its pruned entries in grey and the others in blue.

    The values are written into the cells where they fit, unless they are only 0 and 1, as in a mask.

    Args:
        tensor: a 2-D weight or mask.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, rows from top to bottom as in print.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``tensor`` is not 2-D.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = mask_image(torch.eye(3), ax=Figure().subplots())
        >>> ax.get_images()[0].get_array().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    pyplot = _import_pyplot()
    from matplotlib.colors import ListedColormap

    _check_axes_count("mask_image", tensor, 2, "Pass tensor.reshape(len(tensor), -1), or use mask_cubes.")
    ax = ax or pyplot.subplots(layout="constrained")[1]
    values = _on_cpu(tensor)
    rows, columns = values.shape
    kept = (values != 0).double()
    ax.imshow(kept.numpy(), cmap=ListedColormap([PRUNED, KEPT]), vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.set_xticks([column - 0.5 for column in range(columns + 1)], minor=True)
    ax.set_yticks([row - 0.5 for row in range(rows + 1)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    if not values.equal(kept):
        _write_values(ax, values)
    return ax


def mask_cubes(tensor: Tensor, ax: Axes3D | None = None) -> Axes3D:
    """Draw the weight of a 2-D convolution as blocks of cubes, one block per filter: kept solid, pruned transparent.

    Inside a block, the channels lie on top of each other, the first one uppermost.

    Args:
        tensor: a 4-D weight or mask, (filters, channels, height, width); made for some hundreds of entries.
        ax: where to draw, with ``projection="3d"``; a new figure by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``ax`` has no third dimension.
        ValueError: ``tensor`` is not 4-D.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = mask_cubes(torch.ones(2, 3, 4, 4), ax=Figure().add_subplot(projection="3d"))
        >>> [text.get_text() for text in ax.texts]
        ['filter 0', 'filter 1', 'channel 0', 'channel 1', 'channel 2']
    """
    pyplot = _import_pyplot()
    _check_axes_count("mask_cubes", tensor, 4, "Use mask_image for a matrix.")
    ax = ax or pyplot.figure(figsize=(6, 4)).add_subplot(projection="3d")
    if not hasattr(ax, "bar3d"):
        raise TypeError('mask_cubes needs axes made with projection="3d", e.g. figure.add_subplot(projection="3d")')
    kept = _on_cpu(tensor) != 0
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


def weight_histograms(model: nn.Module, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Draw one histogram per weight of a model: all entries as an outline, the surviving ones filled.

    Args:
        model: a network; every tensor with two or more axes is drawn, and every pruned one.
        axes: where to draw, at least as many as there are such tensors; a new figure by default.

    Returns:
        The axes drawn on, in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model has no such tensor, or ``axes`` are too few.
    """
    pyplot = _import_pyplot()
    weights = _weights(model)
    chosen = list(axes) if axes is not None else _new_axes(pyplot, len(weights))
    if len(chosen) < len(weights):
        raise ValueError(f"axes={len(chosen)} axes are too few for the model's {len(weights)} weights")
    for ax, weight in zip(chosen, weights, strict=False):
        _draw_histogram(ax, weight)
    if axes is None:
        handles, labels = chosen[0].get_legend_handles_labels()
        chosen[0].figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    else:
        chosen[0].legend(frameon=False, fontsize="small")
    return chosen[: len(weights)]


def density_bars(model: nn.Module, after: nn.Module | None = None, ax: Axes | None = None) -> Axes:
    """Draw the fraction of each weight that is left, as bars; those of ``after`` below those of ``model``, if given.

    Args:
        model: a network; every tensor with two or more axes is drawn, and every pruned one.
        after: the same network, pruned further.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, layers from top to bottom in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a model has no such tensor, or the two have different ones.
    """
    pyplot = _import_pyplot()
    rounds = [_weights(one) for one in (model, after) if one is not None]
    labels = [weight.label for weight in rounds[-1]]
    if any(sorted(weight.label for weight in weights) != sorted(labels) for weights in rounds):
        raise ValueError(f"the two models have different weights: after has {labels}")
    ax = ax or pyplot.subplots(figsize=(7, 1 + 0.35 * len(rounds) * len(labels)), layout="constrained")[1]
    thickness = 0.8 / len(rounds)
    for number, weights in enumerate(rounds):
        kept = [next(weight.kept for weight in weights if weight.label == label) for label in labels]
        bars = ax.barh(
            [row + thickness * (number - (len(rounds) - 1) / 2) for row in range(len(labels))],
            [100 * alive.double().mean().item() for alive in kept],
            height=thickness,
            color=KEPT if number == len(rounds) - 1 else DENSE,
            label="after" if number else "before",
        )
        notes = [f"{_percent(alive)} ({int(alive.sum()):,} of {alive.numel():,})" for alive in kept]
        ax.bar_label(bars, notes, padding=4, fontsize="small", color=LINE)
    ax.set_yticks(range(len(labels)), labels=labels)
    ax.invert_yaxis()
    ax.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel="weights left (%)")
    ax.spines[["top", "right"]].set_visible(False)
    if len(rounds) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return ax


class _Weight(NamedTuple):
    """A weight under the name that its user knows, with all of its values and where they are kept."""

    label: str
    values: Tensor
    kept: Tensor


def _weights(model: nn.Module) -> list[_Weight]:
    """Return all tensors of ``model`` with two or more axes, and all pruned ones."""
    if not (weights := list(_find_weights(model))):
        raise ValueError(f"{type(model).__name__} has no parameter with two or more axes and no pruned one to draw")
    return weights


def _find_weights(model: nn.Module) -> Iterator[_Weight]:
    """Yield what :func:`_weights` returns; a pruned tensor is a parameter ``*_orig`` with a buffer ``*_mask``."""
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        for key, parameter in module.named_parameters(recurse=False):
            name = key.removesuffix("_orig")
            mask = buffers.get(f"{name}_mask") if name != key else None
            if mask is not None or parameter.dim() > 1:
                values = _on_cpu(parameter)
                kept = (values if mask is None else _on_cpu(mask)) != 0
                yield _Weight(f"{path}.{key if mask is None else name}".lstrip("."), values, kept)


def _draw_histogram(ax: Axes, weight: _Weight) -> None:
    """Draw all values of ``weight`` as an outline and the kept ones filled, in the same bins."""
    count = min(80, max(12, math.isqrt(weight.values.numel())))
    counts, edges = torch.histogram(weight.values.flatten(), count)
    left, _ = torch.histogram(weight.values[weight.kept], edges)
    ax.stairs(counts.numpy(), edges.numpy(), color=DENSE, linewidth=1.5, label="before pruning", zorder=2)
    ax.stairs(left.numpy(), edges.numpy(), color=KEPT, fill=True, label="left after pruning")
    ax.set_title(f"{weight.label}: {_percent(weight.kept)} left", fontsize="medium")
    ax.set(xlabel="value", ylabel="entries")
    ax.locator_params(axis="x", nbins=6)
    ax.spines[["top", "right"]].set_visible(False)


def _new_axes(pyplot: ModuleType, count: int) -> list[Axes]:
    """Return ``count`` axes of a new figure, in at most three columns."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = pyplot.figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]


def _write_values(ax: Axes, values: Tensor) -> None:
    """Write each value into its cell, unless the cells are too narrow to read it."""
    inches = ax.get_window_extent().width / ax.figure.dpi
    size = min(11.0, 72 * inches / values.shape[1] / 3.5)  # points; "-0.46" is about three ems wide
    if size < SMALLEST_TEXT:
        return
    for row, cells in enumerate(values.tolist()):
        for column, value in enumerate(cells):
            colour = "white" if value else LINE
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)


def _check_axes_count(function: str, tensor: Tensor, count: int, remedy: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``count`` axes."""
    if tensor.dim() != count:
        raise ValueError(f"tensor.shape={tuple(tensor.shape)} does not fit {function}: {count} axes needed. {remedy}")


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return the values as float64 on the CPU, from any device and dtype."""
    return tensor.detach().to("cpu", torch.float64)


def _percent(kept: Tensor) -> str:
    """Return the fraction of ``kept`` that is true, as a percentage."""
    return f"{kept.double().mean().item():.0%}"


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


def _import_pyplot() -> Any:
    """Return ``matplotlib.pyplot``, or say which extra brings it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install torchprune-ext[plots]") from error
    return pyplot
