"""Pictures of the weights of a model: their values, and how much of each is left."""

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
from torchprune_ext._tables import percent
from torchprune_ext.plots.drawing import (
    DENSE,
    KEPT,
    axes_for,
    check_ax,
    check_drawable,
    import_pyplot,
    label,
    legend_above,
    on_cpu,
    write_beside,
)
from torchprune_ext.reporting import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density_bars", "weight_histograms"]

LONGEST = 32  # letters of a title; of a longer name, the end is written


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


def density_bars(model: nn.Module | Report, after: nn.Module | Report | None = None, ax: Axes | None = None) -> Axes:
    """Draw the density of each weight, the fraction of its entries that is not pruned, as bars.

    Args:
        model: a network, or the :func:`.report` of one; every parameter with two or more axes is drawn, and every
            pruned one.
        after: the same network, pruned further; its bars are drawn below those of ``model``. A bias or another vector
            is then drawn if it is pruned in both, since a 0 in a vector without a mask need not be a pruned one.
        ax: where to draw; a new figure by default.

    Returns:
        The axes, layers from top to bottom in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``model`` or ``after`` is neither a module nor a report, or ``ax`` is not 2-D axes.
        ValueError: there is no such tensor, or one without data, or the two models have different tensors.

    Example:
        >>> from matplotlib.figure import Figure
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=3)
        >>> ax = density_bars(model, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['75.0 % (9 of 12)', '100.0 % (6 of 6)']
    """
    import_pyplot()
    rounds = [_shares("model", model)]
    if after is not None:
        rounds.append(_shares("after", after))
        _check_same(*rounds)
    labels = [name for name in rounds[0] if all(shares[name].is_drawn for shares in rounds)]
    _check_any("model", model, labels)
    ax = axes_for(ax, 7, 1 + (0.3 if len(rounds) == 1 else 0.5) * len(labels))
    thickness = 0.8 / len(rounds)
    ends, notes = [], []
    for number, shares in enumerate(rounds):
        drawn = [shares[name] for name in labels]
        middles = [row + thickness * (number - (len(rounds) - 1) / 2) for row in range(len(labels))]
        lengths = [100 * share.kept / share.total for share in drawn]
        colour = KEPT if number == len(rounds) - 1 else DENSE
        ax.barh(middles, lengths, height=thickness, color=colour, label="after" if number else "before")
        ends += list(zip(lengths, middles, strict=True))
        notes += [f"{percent(share.kept / share.total)} ({share.kept:,} of {share.total:,})" for share in drawn]
    ax.set_yticks(range(len(labels)), labels=[label(name) for name in labels])
    ax.set(ylim=(len(labels) - 0.5, -0.5), xticks=range(0, 101, 20), xlabel="density (%)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["bottom"].set_bounds(0, 100)
    if len(rounds) > 1:
        legend_above(ax, 2)
    write_beside(ax, ends, notes, 100)
    return ax


@dataclass(frozen=True)
class _Share:
    """How much of a parameter is kept."""

    where: str
    is_drawn: bool
    kept: int
    total: int


def _shares(param: str, model: nn.Module | Report) -> dict[str, _Share]:
    """Return by name how much is kept of each parameter of ``model``, the caller's ``param``."""
    if isinstance(model, Report):
        return {
            name: _Share(f"{name} of shape {row.shape}", row.is_weight or row.source == "mask", row.kept, row.total)
            for row in model
            for name in (row.name, *row.tied)
            if row.total
        }
    return {
        weight.label: _Share(weight.where, weight.is_drawn, int(weight.kept.sum()), weight.kept.numel())
        for weight in _weights(param, model)
    }


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
        return on_cpu(self.dense)

    @property
    def kept(self) -> Tensor:
        """Where an entry is not pruned."""
        return on_cpu(self.dense if self.mask is None else self.mask) != 0


def _weights(param: str, model: nn.Module) -> list[_Weight]:
    """Return all parameters of ``model``, the caller's ``param``, that have entries."""
    if isinstance(model, Report):
        raise TypeError(f"{param} is a Report, which has counts and no values. Pass the model itself.")
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
            check_drawable(f"{param}: {weight.where}", parameter)
            if parameter.numel():
                yield weight


def _check_any(param: str, model: nn.Module | Report, found: list[Any]) -> None:
    """Raise ``ValueError`` unless something was ``found`` in ``model``, the caller's ``param``."""
    if not found:
        kind = model.model if isinstance(model, Report) else type(model).__name__
        raise ValueError(
            f"{param} of type {kind} has no parameter with two or more axes and no pruned one, so "
            "there is nothing to draw. Pass the model that owns the weights."
        )


def _check_same(before: dict[str, _Share], after: dict[str, _Share]) -> None:
    """Raise ``ValueError`` unless the two models have parameters of the same names and shapes."""
    parts = [{share.where for share in shares.values()} for shares in (before, after)]
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
    name, kept_share = weight.label, f"{percent(weight.kept.double().mean().item())} kept"
    if len(name) > LONGEST:
        name = f"…{name[1 - LONGEST :]}"
    ax.set_title(label(name) + (": " if len(name) < LONGEST // 2 else "\n") + kept_share, fontsize="small")
    ax.set_xlabel("value", fontsize="small")
    ax.set_ylabel("entries", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.locator_params(axis="x", nbins=5)
    ax.spines[["top", "right"]].set_visible(False)


def _new_axes(pyplot: ModuleType, count: int) -> list[Axes]:
    """Return ``count`` axes of a new figure, in at most three columns."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = pyplot.figure(figsize=(max(4.0, 2.6 * columns), 0.4 + 2.0 * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]
