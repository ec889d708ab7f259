"""Pictures of pruned tensors and of the weights of models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchprune_ext._checks import check_module
from torchprune_ext._host import pruned
from torchprune_ext.plots.drawing import CUBE, DENSE, KEPT, LINE, PRUNED, check_ax, import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]

__all__ = ["density_bars", "mask_cubes", "mask_image", "weight_histograms"]

SMALLEST_TEXT = 5.0  # points; values that would have to be smaller are left out
MOST_CUBES = 10_000  # more take minutes, and none of them can be told from the next


def mask_image(tensor: Tensor, ax: Axes | None = None) -> Axes:
    """Draw a matrix with its zeros in grey and its other entries in blue.

    The values are written into the cells where they fit, unless they are only 0 and 1, as in a mask.

    Args:
        tensor: a weight or mask of shape (rows, columns), of any dtype but complex.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, rows from top to bottom as in print.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``tensor`` is not a real tensor, or ``ax`` is not 2-D axes.
        ValueError: ``tensor`` is not 2-D, or has no entries or no data.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = mask_image(torch.eye(3), ax=Figure().subplots())
        >>> ax.get_images()[0].get_array().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    pyplot = import_pyplot()
    from matplotlib.colors import ListedColormap

    values = _values_with_axes("mask_image", tensor, 2, "Pass e.g. tensor.reshape(len(tensor), -1).")
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    check_ax("ax", ax)
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
        tensor: a weight or mask of shape (filters, channels, height, width), of any dtype but complex; made for some
            hundreds of entries.
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
    kept = _values_with_axes("mask_cubes", tensor, 4, "Use mask_image for a matrix.") != 0
    if kept.numel() > MOST_CUBES:
        raise ValueError(
            f"tensor.shape={tuple(tensor.shape)} would be {kept.numel():,} cubes, and mask_cubes draws at most "
            f"{MOST_CUBES:,}. Pass a part of it, e.g. tensor[:4, :4]."
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


def weight_histograms(model: nn.Module, axes: Iterable[Axes] | None = None) -> list[Axes]:
    """Draw one histogram per weight of a model: all entries as an outline, those that are not pruned filled.

    While a tensor is pruned, its pruned entries still have their dense values, and the outline shows them; once the
    pruning is permanent, they are 0.

    Args:
        model: a network; every parameter with two or more axes is drawn, and every pruned one.
        axes: where to draw, at least as many as there are such tensors, e.g. ``figure.subplots(2, 2).flat``; a new
            figure by default.

    Returns:
        The axes drawn on, in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``model`` is not a module, or ``axes`` are not 2-D axes.
        ValueError: the model has no such tensor, one of them has no data or is not finite, or ``axes`` are too few.

    Example:
        >>> from matplotlib.figure import Figure
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> axes = weight_histograms(model, axes=Figure().subplots(1, 2))
        >>> [ax.get_title() for ax in axes]
        ['0.weight: 100.0 % kept', '2.weight: 100.0 % kept']
    """
    pyplot = import_pyplot()
    weights = [weight for weight in _weights("model", model) if weight.is_drawn]
    _check_any("model", model, weights)
    for weight in weights:
        if bad := int((~weight.values.isfinite()).sum()):
            raise ValueError(
                f"model: {weight.where} has {bad} NaN or infinite entries, for which a histogram has no bin. "
                "Find out where they come from (a diverged training run, an overflow), and draw finite values."
            )
    if axes is None:
        chosen = _new_axes(pyplot, len(weights))
    elif isinstance(axes, Iterable):
        chosen = list(axes)
    else:
        raise TypeError(f"axes={axes!r} is a {type(axes).__name__}. Pass several axes, e.g. [ax] for one.")
    for place, ax in enumerate(chosen):
        check_ax(f"axes[{place}]", ax)
    if len(chosen) < len(weights):
        raise ValueError(
            f"axes are {len(chosen)}, too few for the {len(weights)} weights of {type(model).__name__}. Pass one for "
            f"each of {[weight.label for weight in weights]}, or none for a new figure."
        )
    for ax, weight in zip(chosen, weights, strict=False):
        _draw_histogram(ax, weight)
    if axes is None:
        handles, labels = chosen[0].get_legend_handles_labels()
        chosen[0].figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    else:
        chosen[0].legend(frameon=False, fontsize="small")
    return chosen[: len(weights)]


def density_bars(model: nn.Module, after: nn.Module | None = None, ax: Axes | None = None) -> Axes:
    """Draw the density of each weight, the fraction of its entries that is not pruned, as bars.

    Args:
        model: a network; every parameter with two or more axes is drawn, and every pruned one.
        after: the same network, pruned further; its bars are drawn below those of ``model``. A bias or another vector
            is then drawn if it is pruned in both, since a 0 in a vector without a mask need not be a pruned one.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, layers from top to bottom in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``model`` or ``after`` is not a module, or ``ax`` is not 2-D axes.
        ValueError: there is no such tensor, or one without data, or the two models have different tensors.

    Example:
        >>> from matplotlib.figure import Figure
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=3)
        >>> ax = density_bars(model, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['75.0 % (9 of 12)', '100.0 % (6 of 6)']
    """
    pyplot = import_pyplot()
    rounds = [{weight.label: weight for weight in _weights("model", model)}]
    if after is not None:
        rounds.append({weight.label: weight for weight in _weights("after", after)})
        _check_same(*rounds)
    labels = [label for label in rounds[0] if all(weights[label].is_drawn for weights in rounds)]
    _check_any("model", model, labels)
    if ax is None:
        ax = pyplot.subplots(figsize=(7, 1 + 0.35 * len(rounds) * len(labels)), layout="constrained")[1]
    check_ax("ax", ax)
    thickness = 0.8 / len(rounds)
    for number, weights in enumerate(rounds):
        kept = [weights[label].kept for label in labels]
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
    longest = max(len(text.get_text()) for text in ax.texts)
    ax.set(xlim=(0, 100 / (1 - 0.0125 * longest)), xticks=range(0, 101, 20), xlabel="density (%)")  # room for the notes
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["bottom"].set_bounds(0, 100)
    if len(rounds) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return ax


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter under the name that its user knows, and its mask, if it is pruned."""

    label: str
    dense: Tensor
    mask: Tensor | None

    @property
    def where(self) -> str:
        """The parameter in words, for errors."""
        return f"{self.label} of shape {tuple(self.dense.shape)}"

    @property
    def is_drawn(self) -> bool:
        """Whether it is a matrix or more, or pruned."""
        return self.mask is not None or self.dense.dim() > 1

    @property
    def values(self) -> Tensor:
        """All values, those of pruned entries included."""
        return _on_cpu(self.dense)

    @property
    def kept(self) -> Tensor:
        """Where an entry is not pruned."""
        return _on_cpu(self.dense if self.mask is None else self.mask) != 0


def _weights(param: str, model: nn.Module) -> list[_Weight]:
    """Return all parameters of ``model``, the caller's ``param``, that have entries."""
    check_module(param, model)
    return list(_find_weights(param, model))


def _find_weights(param: str, model: nn.Module) -> Iterator[_Weight]:
    """Yield what :func:`_weights` returns."""
    targets = {(id(target.module), target.stored_name): target for target in pruned(model)}
    for path, module in model.named_modules():
        for stored, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            target = targets.get((id(module), stored))
            label = f"{path}.{stored if target is None else target.name}".lstrip(".")
            if is_lazy(parameter):
                raise ValueError(f"{param}: {label} has no shape yet. Run one forward first, then draw.")
            weight = _Weight(label, parameter, None if target is None else target.mask)
            _check_drawable(f"{param}: {weight.where}", parameter)
            if parameter.numel():
                yield weight


def _check_any(param: str, model: nn.Module, found: list[Any]) -> None:
    """Raise ``ValueError`` unless something was ``found`` in ``model``, the caller's ``param``."""
    if not found:
        raise ValueError(
            f"{param} of type {type(model).__name__} has no parameter with two or more axes and no pruned one, so "
            "there is nothing to draw. Pass the model that owns the weights."
        )


def _check_same(before: dict[str, _Weight], after: dict[str, _Weight]) -> None:
    """Raise ``ValueError`` unless the two models have parameters of the same names and shapes."""
    parts = [{weight.where for weight in weights.values()} for weights in (before, after)]
    if parts[0] != parts[1]:
        raise ValueError(
            f"model and after have different parameters: only model has {sorted(parts[0] - parts[1])}, only after has "
            f"{sorted(parts[1] - parts[0])}. Pass a network and its copy.deepcopy from before pruning."
        )


def _draw_histogram(ax: Axes, weight: _Weight) -> None:
    """Draw all values of ``weight`` as an outline and the kept ones filled, in the same bins."""
    count = min(80, max(12, math.isqrt(weight.values.numel())))
    counts, edges = torch.histogram(weight.values.flatten(), count)
    kept, _ = torch.histogram(weight.values[weight.kept], edges)
    ax.stairs(counts.numpy(), edges.numpy(), color=DENSE, linewidth=1.5, label="all entries", zorder=2)
    ax.stairs(kept.numpy(), edges.numpy(), color=KEPT, fill=True, label="entries that are not pruned")
    ax.set_title(f"{weight.label}: {_percent(weight.kept)} kept", fontsize="medium")
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
    """Write each value into its cell, unless the cells are too small to read it."""
    rows, columns = values.shape
    # a pruned negative value is -0.0
    texts = [[f"{value or 0.0:.2g}" for value in row] for row in values.tolist()]
    extent = ax.get_window_extent()
    cell = 72 / ax.figure.dpi * min(extent.width / columns, extent.height / rows)  # points; cells are square
    size = min(11.0, cell / 0.7 / max(len(text) for row in texts for text in row))  # a digit is about 0.6 em wide
    if size < SMALLEST_TEXT:
        return
    for row, cells in enumerate(texts):
        for column, text in enumerate(cells):
            colour = "white" if values[row, column] else LINE
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
    _check_drawable("tensor", tensor)
    return _on_cpu(tensor)


def _check_drawable(where: str, tensor: Tensor) -> None:
    """Raise unless ``tensor``, for errors ``where``, has real values that can be read here."""
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values to draw. Materialize it first.")
    if tensor.is_complex():
        raise TypeError(f"{where} is complex ({tensor.dtype}). Draw a real tensor, e.g. its absolute values.")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(f"{where} is a DTensor, of which other processes hold parts. Draw its full_tensor().")


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return the values as float64 on the CPU, from any device, dtype and layout."""
    return tensor.detach().to_dense().to("cpu", torch.float64)


def _percent(kept: Tensor) -> str:
    """Return the fraction of ``kept`` that is true, as a percentage."""
    return f"{kept.double().mean().item():.1%}".replace("%", " %")


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
