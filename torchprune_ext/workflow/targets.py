"""Prune to a target sparsity, whatever is pruned already; and ask first what would go."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_sparsity, errors_about
from torchprune_ext._host import Target, targets_of
from torchprune_ext._statistics import Key
from torchprune_ext._tables import percent, table
from torchprune_ext.global_pruning.budget import (
    Budget,
    Listed,
    Params,
    PerParameter,
    choose,
    given,
    masks_of,
    prune,
    spread_entries,
)
from torchprune_ext.global_pruning.entries import scoring_of_entries
from torchprune_ext.global_pruning.units import scoring_of_units
from torchprune_ext.masks import units_alive
from torchprune_ext.patterns import NM, Unit
from torchprune_ext.selection import Cut, Scores, kept
from torchprune_ext.workflow.budgets import Apart

__all__ = ["Plan", "PlanRow", "plan", "prune_to"]

Amounts = float | Mapping[Key, float]
Scope = Literal["global", "layer"] | Mapping[Key, float]
Criterion = Literal["magnitude"] | PerParameter


def prune_to(
    params: Params,
    amounts: Amounts,
    criterion: Criterion = "magnitude",
    unit: Unit | None = None,
    *,
    scope: Scope = "global",
    min_keep: float = 1,
) -> None:
    """Prune until the listed tensors have the sparsity asked for, what is pruned already counted in.

    Unlike an ``amount`` of what is left: three calls with 0.2, 0.4 and 0.6 end at 60 %. What is pruned already stays
    so and counts; all that was asked for is reached exactly, in whole units, or nothing is pruned.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        amounts: fraction of all units that shall be pruned in the end, in [0, 1), spent as ``scope`` says; or one for
            each tensor, ``{(module, name): fraction}``, as :mod:`torchprune_ext.workflow.allocation` returns it.
            Listed tensors without an entry stay as they are.
        criterion: ``"magnitude"``, or scores of all tensors that are pruned, ``{(module, name): tensor}``, for example
            of :mod:`torchprune_ext.calibration`: finite, >= 0, larger means keep.
        unit: what lives or dies together, such as ``Kernel()`` or ``Channel(0)``, ranked by the root mean square of
            its entries, as in :func:`.global_kernel_ln`; by default single entries.
        scope: where one fraction for all is taken from: ``"global"`` compares the scores of all tensors, ``"layer"``
            takes the same fraction of each, and a mapping, as for ``amounts``, says in which proportion; it is scaled
            such that all tensors that it names add up to ``amounts``.
        min_keep: least number (int) or fraction (float) of the units of each tensor that stay.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a fraction that is not in [0, 1), or less than what is pruned already; a tensor in ``amounts`` that
            ``params`` does not list; tied tensors with two amounts; what ``min_keep`` does not allow; or as
            :func:`.global_unstructured`. Nothing is pruned then.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5))
        >>> params = tpe.prunable_parameters(model)
        >>> for target in (0.2, 0.4, 0.6):
        ...     tpe.prune_to(params, target)
        >>> sum(int(module.weight_mask.sum()) for module, _ in params)  # of 150
        60
        >>> tpe.prune_to(params, {params[0]: 0.9}, criterion=tpe.calibration.random(params))
        >>> int(model[0].weight_mask.sum())  # of 100
        10
    """
    task = _task(params, amounts, criterion, unit, scope, min_keep)
    score, spread = _scoring(criterion, unit)
    prune("prune_to", task.params, task.budget, _noun(unit), score, spread, **task.told)


def masks_to(
    call: str,
    params: Params,
    amounts: Amounts,
    criterion: Criterion = "magnitude",
    unit: Unit | None = None,
    *,
    scope: Scope = "global",
    min_keep: float = 1,
) -> list[tuple[Listed, Target, Tensor]]:
    """Return the masks that :func:`prune_to` would install, for ``call``; nothing is changed."""
    task = _task(params, amounts, criterion, unit, scope, min_keep)
    score, spread = _scoring(criterion, unit)
    masks = masks_of(call, task.params, task.budget, _noun(unit), score, spread, **task.told)
    return [(listed, target, mask) for listed, target, mask, _ in masks]


def count_units(groups: Iterable[Listed], unit: Unit | None) -> tuple[int, int]:
    """Return how many units ``groups`` have, and how many of them are pruned."""
    total = dead = 0
    for listed in groups:
        with errors_about(listed.where):
            parameter, mask = listed.target.parameter, listed.target.mask
            if unit is None:
                size = parameter.numel()
                alive = size if mask is None else int(mask.count_nonzero())
            else:
                flags = units_alive(unit, torch.ones_like(parameter, requires_grad=False) if mask is None else mask)
                size, alive = len(flags), int(flags.count_nonzero())
        total, dead = total + size, dead + size - alive
    return total, dead


def paths_in(model: nn.Module, groups: Sequence[Listed]) -> list[str]:
    """Return the path of each tensor in ``model``; one that is not in it is a ``ValueError``."""
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    for listed in groups:
        for target in listed.everywhere():
            if target.module not in paths:
                raise ValueError(f"{listed.where} is not a part of the model {type(model).__name__}. Leave it out.")
    return [f"{paths[listed.target.module]}.{listed.target.name}".lstrip(".") for listed in groups]


def plan(
    params: Params,
    amounts: Amounts,
    criterion: Criterion = "magnitude",
    unit: Unit | None = None,
    *,
    scope: Scope = "global",
    min_keep: float = 1,
) -> "Plan":
    """Return what :func:`prune_to` with the same arguments would prune; nothing is changed.

    Args:
        params: as for :func:`prune_to`, and so are the other arguments.
        amounts: fraction of all units, or one for each tensor.
        criterion: what units are ranked by.
        unit: what lives or dies together.
        scope: where a fraction of all units is taken from.
        min_keep: how much of each tensor stays at least.

    Raises:
        TypeError: as :func:`prune_to`.
        ValueError: as :func:`prune_to`, so what can be planned can be pruned.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = model[0].weight.data.copy_(torch.arange(1.0, 17.0).view(4, 4))
        >>> _ = model[1].weight.data.copy_(torch.arange(17.0, 25.0).view(2, 4) / 2)
        >>> print(tpe.plan(tpe.prunable_parameters(model), 0.5))
        tensor                     shape  entries  pruned  to prune  sparsity
        params[0], Linear.weight  (4, 4)       16       0         9    56.2 %
        params[1], Linear.weight  (2, 4)        8       0         3    37.5 %
        all                                    24       0        12    50.0 %
    """
    task = _task(params, amounts, criterion, unit, scope, min_keep)
    chosen = choose("plan", task.params, task.budget, _noun(unit), _scoring(criterion, unit)[0], **task.told)
    rows = []
    for listed, part, cut in zip(chosen.groups, chosen.parts, chosen.cuts, strict=True):
        target, alive = listed.target, part.count_alive()
        label = f"{listed.place}, {type(target.module).__name__}.{target.name}"
        gone = alive - int(kept(part, cut).count_nonzero())
        rows.append(PlanRow(label, tuple(target.parameter.shape), len(part), len(part) - alive, gone))
    return Plan(tuple(rows), _noun(unit))


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What would go of one tensor.

    Args:
        tensor: its place in the list, the type of its module, and its name.
        shape: its shape.
        units: number of its units: entries, kernels, ...
        pruned: how many of them are pruned already.
        to_prune: how many more would be.
    """

    tensor: str
    shape: tuple[int, ...]
    units: int
    pruned: int
    to_prune: int

    @property
    def sparsity(self) -> float:
        """The fraction of the units that would be pruned in the end; 0 without any."""
        return (self.pruned + self.to_prune) / max(self.units, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What :func:`plan` has found; prints as a table.

    Args:
        rows: one for each tensor that would be pruned, tied ones once.
        units: what the units are, in the plural.
    """

    rows: tuple[PlanRow, ...]
    units: str

    @property
    def sparsity(self) -> float:
        """The fraction of all units of these tensors that would be pruned in the end."""
        return self._all().sparsity

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, as for a JSON file."""
        rows = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        return {"units": self.units, "sparsity": self.sparsity, "rows": rows}

    def _all(self) -> PlanRow:
        counts = [sum(column) for column in zip(*((r.units, r.pruned, r.to_prune) for r in self.rows), strict=True)]
        return PlanRow("all", (), *counts)

    def __str__(self) -> str:
        """Return a table with a row for each tensor and one for all."""
        lines = [
            [
                row.tensor,
                str(row.shape) if row.shape else "",
                *(f"{count:,}" for count in (row.units, row.pruned, row.to_prune)),
                percent(row.sparsity),
            ]
            for row in (*self.rows, self._all())
        ]
        return table(["tensor", "shape", self.units, "pruned", "to prune", "sparsity"], lines)


@dataclass(frozen=True, slots=True)
class _Task:
    """Checked arguments of :func:`prune_to`, and what the history tells of them."""

    params: Params
    budget: Budget
    told: dict[str, Any]


def _task(
    params: Params, amounts: Amounts, criterion: Criterion, unit: Unit | None, scope: Scope, min_keep: float
) -> _Task:
    """Check the arguments, as far as no scores are needed."""
    if isinstance(params, Iterable) and not isinstance(params, nn.Module):
        params = list(params)  # it is read twice
    check_unit(unit)
    told: dict[str, Any] = {"criterion": criterion} if isinstance(criterion, str) else given(criterion=criterion)
    if unit is not None:
        told["unit"] = str(unit)
    if isinstance(amounts, Mapping):
        if scope != "global":
            raise TypeError(
                f"amounts gives each tensor its own, so scope={scope if isinstance(scope, str) else '...'!r} has no "
                "meaning. Leave scope out, or pass one fraction as amounts."
            )
        check_shares("amounts", amounts, params)
        return _Task(params, Apart(None, None, min_keep, "amounts", amounts), told)
    check_sparsity("amounts", amounts)
    if isinstance(scope, Mapping):
        check_shares("scope", scope, params)
        return _Task(params, Apart(None, amounts, min_keep, "amounts", scope), told)
    if scope not in ("global", "layer"):
        raise ValueError(
            f"scope={scope!r} is unknown. Pass 'global', 'layer', or {{(module, name): fraction}}, e.g. of erk."
        )
    if scope == "layer":
        return _Task(params, Apart(None, amounts, min_keep, "amounts"), told)
    return _Task(params, Budget(None, amounts, min_keep, "amounts"), told)


def check_shares(param: str, shares: Mapping[Key, float], params: Params) -> None:
    """Raise unless ``shares``, the caller's ``param``, are fractions of tensors that ``params`` lists."""
    listed = {(target.module, target.name) for target in targets_of(params).values()}
    if not shares:
        raise ValueError(f"{param}={{}} names no tensor. Give a fraction for one of {len(listed)} listed tensors.")
    for key, share in shares.items():
        known = isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], nn.Module)
        name = f"{type(key[0]).__name__}, {key[1]!r}" if known else repr(key)
        if key not in listed:
            raise ValueError(
                f"{param}[{name}] is the amount of something that params does not list. Add its (module, name) to "
                f"params, or leave it out of {param}; a copy of a model needs amounts of its own."
            )
        check_sparsity(f"{param}[{name}]", share)


def check_unit(unit: object) -> None:
    """Raise ``TypeError`` unless ``unit`` is None or a kind of unit."""
    if isinstance(unit, NM):
        raise TypeError(
            f"unit={unit!r} is a pattern that fixes the sparsity itself. Call nm_structured(module, name, n, m) for "
            "each tensor, or global_nm_structured(params, m=..., target_sparsity=...)."
        )
    if isinstance(unit, type) or not (unit is None or (hasattr(unit, "split") and hasattr(unit, "units"))):
        raise TypeError(
            f"unit={unit!r} is not a unit. Pass a value: Kernel(), Vector(1), Block(4), Channel(0) or None."
        )


def _scoring(
    criterion: Criterion, unit: Unit | None
) -> tuple[Callable[[Target], Scores], Callable[[Target, Scores, Cut], Iterable[Any]]]:
    """Return how tensors are scored and how a cut becomes a mask."""
    if isinstance(criterion, str) and criterion != "magnitude":
        raise ValueError(f"criterion={criterion!r} is unknown. Pass 'magnitude', or scores {{(module, name): tensor}}.")
    if not isinstance(criterion, (str, Mapping)):
        raise TypeError(
            f"criterion={criterion!r} is a {type(criterion).__name__}. Pass 'magnitude', or scores of all tensors, "
            "{(module, name): tensor}."
        )
    scores = None if isinstance(criterion, str) else criterion
    return (scoring_of_entries(scores), spread_entries) if unit is None else scoring_of_units(unit, 2, scores, "mean")


def _noun(unit: Unit | None) -> str:
    return "entries" if unit is None else unit.units
