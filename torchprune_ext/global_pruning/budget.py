"""What the global calls share: the list, the budget, and the way from scores to installed masks."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchprune_ext._checks import (
    check_amount,
    check_finite,
    check_fraction,
    check_scores,
    errors_about,
    resolve_amount,
    warn,
)
from torchprune_ext._fingerprints import checksum
from torchprune_ext._host import Target, as_one, install, targets_of, warn_of_zeros
from torchprune_ext._ranks import Ranks
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext._scoring import tied_at
from torchprune_ext._statistics import Key, check_kind
from torchprune_ext.masks import entry_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.selection import ALONE, Cut, Scores, keeps, select_with_floors

Params = Iterable[tuple[nn.Module, str]]
PerParameter = Mapping[tuple[nn.Module, str], Tensor]
MANY_TIES = 0.25  # share of the living units that may tie at the cut without a word
LITTLE = 0.25  # share of a tensor's units that is little to be left of it
Normalize = Literal["mean", "max", "sum"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How many units of the whole list go, and how many of each tensor stay at least.

    Args:
        amount: fraction or number of what is left.
        target_sparsity: instead of it, the fraction in the end.
        min_keep: least number or fraction of each tensor's units.
        param: what the caller's argument for ``target_sparsity`` is called.
    """

    amount: float | None
    target_sparsity: float | None
    min_keep: float
    param: str = "target_sparsity"

    compares: ClassVar[bool] = True
    """Whether scores of different tensors compete."""

    def check(self) -> None:
        """Raise unless the arguments are of the right types and in range."""
        if (self.amount is None) == (self.target_sparsity is None):
            raise TypeError(
                f"amount={self.amount!r}, {self.param}={self.target_sparsity!r}: pass exactly one of them. "
                f"amount is a share of what is left, {self.param} the share pruned in the end."
            )
        if self.amount is not None:
            check_amount(self.amount)
        elif self.target_sparsity is not None:
            check_fraction(self.param, self.target_sparsity)
        check_amount(self.min_keep, "min_keep")

    def count(self, alive: int, total: int, units: str) -> int:
        """Return how many of the ``alive`` units go, of ``total`` with those pruned already."""
        if self.amount is not None:
            return resolve_amount(self.amount, alive, units)
        goal = round((self.target_sparsity or 0.0) * total)
        if goal < total - alive:
            raise ValueError(
                f"{self.param}={self.target_sparsity!r} is less than the {(total - alive) / total:.4f} that is "
                f"pruned already ({total - alive} of {total} {units}). Pass a larger one, or undo_all() first."
            )
        return goal - (total - alive)

    def floor(self, alive: int, total: int) -> int:
        """Return how many of one tensor's units stay at least."""
        if isinstance(self.min_keep, numbers.Integral):
            return min(int(self.min_keep), alive)
        return min(math.ceil(Fraction(str(float(self.min_keep))) * total), alive)  # 0.55 of 100 is 55, not 56

    def covers(self, listed: "Listed") -> bool:
        """Return whether ``listed`` has a part in this."""
        return True

    def cuts(self, groups: Sequence["Listed"], parts: Sequence[Scores], units: str, ranks: Ranks) -> list[Cut]:
        """Return the cuts that spend this on the ``parts`` of all ranks, the scores of ``groups``."""
        alive = [part.count_alive() for part in parts]
        floors = [self.floor(left, len(part)) for left, part in zip(alive, parts, strict=True)]
        total, left, floor = ranks.totals(sum(map(len, parts)), sum(alive), sum(floors))
        k = self.count(left, total, units)
        self.check_floor(k, left, floor, units)
        return select_with_floors(parts, k, floors, ranks)

    def check_floor(self, k: int, left: int, floor: int, units: str) -> None:
        """Raise if ``k`` units of those ``left`` would leave less than the ``floor`` of all tensors."""
        if k > left - floor:
            raise ValueError(
                f"{self.asked()}: {k} {units} of {left} are to go, but the floors of the tensors add up to {floor}. "
                "Ask for less, or pass a smaller min_keep; min_keep=0 lets whole tensors be emptied."
            )

    def arguments(self, listed: "Listed | None" = None) -> dict[str, Any]:
        """Return what the history of ``listed``, or of any tensor, tells of this."""
        asked = {"amount": self.amount} if self.amount is not None else {self.param: self.target_sparsity}
        return {**asked, "min_keep": self.min_keep}

    def asked(self) -> str:
        """Return what was asked for, for errors."""
        return ", ".join(f"{key}={'...' if value is ... else repr(value)}" for key, value in self.arguments().items())


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """A tensor of the caller's list, its place there, and the other places where the same tensor stands in it."""

    place: str
    target: Target
    aliases: tuple[Target, ...]

    @property
    def where(self) -> str:
        """The tensor in words, for errors."""
        return f"{self.place}, {self.target.where}"

    def everywhere(self) -> tuple[Target, ...]:
        """Return the tensor at all of its places."""
        return (self.target, *self.aliases)

    def pairs(self) -> list[Key]:
        """Return module and name at all of its places."""
        return [(target.module, target.name) for target in self.everywhere()]


def groups_of(params: Params, param: str = "params") -> list[Listed]:
    """Return the tensors of the caller's ``param``, each once; pruned under any of its names counts as pruned."""
    same: dict[int, list[tuple[int, Target]]] = {}
    for place, target in targets_of(params, param).items():
        same.setdefault(id(target.parameter), []).append((place, target))
    groups = []
    for (place, target), *others in same.values():
        masks = [t.mask for t in (target, *(t for _, t in others)) if t.mask is not None]
        mask = None
        for other in masks:
            mask = other if mask is None or mask is other else mask * other.to(mask.dtype)
        aliases = tuple(replace(alias, mask=mask) for _, alias in others)
        groups.append(Listed(f"{param}[{place}]", replace(target, mask=mask), aliases))
    return groups


def refuse_empty(groups: Sequence[Listed], param: str = "params") -> None:
    """Raise ``ValueError`` if the caller's ``param`` lists no tensor."""
    if not groups:
        source = "bn_pairs(model, inputs)" if param == "pairs" else "prunable_parameters(model)"
        raise ValueError(f"{param}=[] lists nothing to prune. Pass what e.g. {source} finds.")


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What goes: tensors, their scores, and where in these the kept ones begin."""

    groups: list[Listed]
    parts: list[Scores]
    cuts: list[Cut]


def choose(
    call: str,
    params: Params,
    budget: Budget,
    units: str,
    score: Callable[[Target], Scores],
    process_group: Any = None,
    reduce: str | None = None,
    *,
    param: str = "params",
    **arguments: Any,
) -> Chosen:
    """Score all tensors and spend the budget on all units; nothing is changed."""
    ranks = Ranks(process_group)
    with ranks.together():
        budget.check()
        if reduce not in (None, "mean") or (reduce and process_group is None):
            raise ValueError(f"reduce={reduce!r} must be None, or 'mean' together with a process_group.")
        groups = [listed for listed in groups_of(params, param) if budget.covers(listed)]
        if process_group is None:
            refuse_empty(groups, param)
        warn_of_zeros({listed.where: listed.target for listed in groups})
        parts = []
        for listed in groups:
            with errors_about(listed.where):
                parts.append(score(listed.target))
    shapes = [tuple(listed.target.parameter.shape) for listed in groups] if reduce else "their own"
    ranks.agree("the arguments", f"{call}({budget.asked()}, reduce={reduce!r}, {arguments}), shapes {shapes}")
    double = ranks.total(sum(part.dtype == torch.float64 for part in parts))
    parts = [replace(part, dtype=torch.float64 if double else torch.float32) for part in parts]
    if reduce:
        parts = [replace(p, inputs=(*p.inputs[:-1], ranks.mean(p.inputs[-1].to(p.dtype)))) for p in parts]
    with ranks.together() if reduce else nullcontext():
        return Chosen(groups, parts, budget.cuts(groups, parts, units, ALONE if reduce else ranks))


def prune(
    call: str,
    params: Params,
    budget: Budget,
    units: str,
    score: Callable[[Target], Scores],
    spread: Callable[[Target, Scores, Cut], Iterable[tuple[Target, Tensor]]],
    process_group: Any = None,
    reduce: str | None = None,
    *,
    param: str = "params",
    **arguments: Any,
) -> None:
    """Choose what goes, spread each cut into masks, and install all or nothing."""
    masks = masks_of(call, params, budget, units, score, spread, process_group, reduce, param=param, **arguments)
    with all_or_nothing(target.module for _, target, _, _ in masks), Ranks(process_group).together():
        install_all(call, budget, masks)


def masks_of(
    call: str,
    params: Params,
    budget: Budget,
    units: str,
    score: Callable[[Target], Scores],
    spread: Callable[[Target, Scores, Cut], Iterable[tuple[Target, Tensor]]],
    process_group: Any = None,
    reduce: str | None = None,
    *,
    param: str = "params",
    **arguments: Any,
) -> list[tuple[Listed, Target, Tensor, dict[str, Any]]]:
    """Choose what goes and return the masks that say so, with the arguments for the history; nothing is changed."""
    ranks = Ranks(process_group)
    chosen = choose(call, params, budget, units, score, process_group, reduce, param=param, **arguments)
    groups, parts, cuts = chosen.groups, chosen.parts, chosen.cuts
    with ranks.together():
        _warn_of_positions(call, units, groups, parts, cuts)
        _warn_of_floors(call, units, budget, groups, parts, cuts)
        masks = [
            (listed, target, mask, arguments)
            for listed, part, cut in zip(groups, parts, cuts, strict=True)
            for each, mask in spread(listed.target, part, cut)
            for target in (listed.everywhere() if each is listed.target else (each,))
        ]
    if reduce and not ranks.alike(digest(mask for _, _, mask, _ in masks)):
        raise RuntimeError("reduce='mean': the masks differ between ranks, so weights or earlier masks do. Sync them.")
    return masks


def _warn_of_positions(
    call: str, units: str, groups: Sequence[Listed], parts: Sequence[Scores], cuts: Sequence[Cut]
) -> None:
    """Warn where so many units score the same at the cut that their order in the list decides which of them go."""
    if not any(cut.position for cut in cuts):
        return  # all of them go, or all stay
    tied = [tied_at(part, cut) for part, cut in zip(parts, cuts, strict=True)]
    alive = sum(part.count_alive() for part in parts)
    if sum(tied) > MANY_TIES * alive:
        where = "; ".join(listed.where for listed, count in zip(groups, tied, strict=True) if count)
        warn(
            f"{call}: {sum(tied)} of {alive} {units} score the same at the cut, so their places in the list decide "
            f"which of them go: {where}. Scores that were not trained or measured do that. Train first, or pass others."
        )


def _warn_of_floors(
    call: str,
    units: str,
    budget: Budget,
    groups: Sequence[Listed],
    parts: Sequence[Scores],
    cuts: Sequence[Cut],
) -> None:
    """Warn of tensors of which this call leaves no more than their floor, where that is little."""
    low = []
    for listed, part, cut in zip(groups, parts, cuts, strict=True):
        alive = part.count_alive()
        floor = budget.floor(alive, len(part))
        if budget.compares and 0 < floor < alive and floor <= LITTLE * len(part) and not keeps(part, cut, floor + 1):
            low.append(f"{listed.where} ({floor} of {len(part)})")
    if low:
        warn(
            f"{call}: min_keep={budget.min_keep!r} is all that is left of the {units} of {'; '.join(low)}. "
            "Ask for less, pass a larger min_keep, or scores that compare across tensors."
        )


def install_all(call: str, budget: Budget, masks: Sequence[tuple[Listed, Target, Tensor, dict[str, Any]]]) -> None:
    """Install finished masks with a readable history, and name the tensors of the list that are emptied."""
    if not budget.min_keep:
        own = [(listed, mask) for listed, target, mask, _ in masks if target is listed.target and mask.numel()]
        emptied = [
            listed.where
            for listed, mask in own
            if not mask.any() and (listed.target.mask is None or listed.target.mask.any())
        ]
        if emptied:
            warn(f"{call}: min_keep={budget.min_keep!r} lets be emptied: {'; '.join(emptied)}.")
    entries = [
        (target, GlobalPruning(call, **budget.arguments(listed), **more), mask) for listed, target, mask, more in masks
    ]
    for listed in dict.fromkeys(listed for listed, *_ in masks):
        as_one([entry for entry, (other, *_) in zip(entries, masks, strict=True) if other is listed])
    install(entries)


def spread_entries(target: Target, part: Scores, cut: Cut) -> Iterator[tuple[Target, Tensor]]:
    """Yield ``target`` and the mask of its entries above ``cut``."""
    yield target, entry_mask(part, cut, target.parameter)


def weights_or_scores(importance_scores: PerParameter | None, target: Target) -> Tensor:
    """Return the given scores of ``target``, or its weights."""
    if importance_scores is not None:
        return scores_for(importance_scores, target)
    check_finite(target.name, target.parameter)
    return target.parameter.detach()


def scores_for(importance_scores: PerParameter, target: Target) -> Tensor:
    """Return the caller's checked scores of ``target``, on its device."""
    scores = listed_for("importance_scores", importance_scores, target)
    check_scores("importance_scores", scores, target.parameter.shape)
    return scores.detach().to(target.parameter.device)


def given(**tensors: PerParameter | None) -> dict[str, Any]:
    """Return what the history tells of optional ``tensors``: that they were passed."""
    return {param: ... for param, value in tensors.items() if value is not None}


def listed_for(param: str, tensors: PerParameter, target: Target) -> Tensor:
    """Return what ``tensors``, the caller's ``param``, hold for ``target``."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{param} is a {type(tensors).__name__}. Pass a dictionary {{(module, name): tensor}}.")
    check_kind(param, tensors)
    if (target.module, target.name) not in tensors:
        raise ValueError(
            f"{param} has no entry for this tensor, and no other score could be compared with the given ones. "
            f"Add {param}[module, {target.name!r}], or leave the tensor out of params."
        )
    return tensors[target.module, target.name]


def digest(masks: Iterable[Tensor]) -> int:
    """Return a number that differs, in all likelihood, where any mask differs."""
    return hash(tuple(checksum(mask != 0) for mask in masks))
