"""One budget of multiplications or parameters for a whole model, met by taking out whole units, without training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch, call
from torchprune_ext._checks import check_amount, check_fraction, check_whole, errors_about
from torchprune_ext._graph import Group, Member, evaluating, graph_of
from torchprune_ext._host import Target, as_plain
from torchprune_ext._layers import Layer
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.fitting import Fits, Task
from torchprune_ext.compensation.goals import Units, check_units, units_of
from torchprune_ext.compensation.greedy import Part, eliminate, parts_of, weighed
from torchprune_ext.compensation.shares import Price, Shares
from torchprune_ext.compensation.solvers import Problem, refit
from torchprune_ext.deploy.checking import fixed_widths
from torchprune_ext.deploy.counting import macs_by_weight
from torchprune_ext.deploy.cutting import Cut
from torchprune_ext.global_pruning.budget import Budget
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import Channel


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be left of a model.

    Args:
        target_macs: fraction of the multiplications, or None.
        target_parameters: fraction of the parameters, or None.
        round_to: of what the number of channels kept is a multiple.
        min_keep: how many units each group keeps at least, or which fraction of them.
    """

    target_macs: float | None
    target_parameters: float | None
    round_to: int
    min_keep: float

    def given(self, **others: object) -> bool:
        """Return whether there is a budget, after checking it; ``others`` are arguments that do not go with one.

        Raises:
            TypeError: an argument of the wrong type, or that does not go with another.
            ValueError: an argument out of range.
        """
        check_whole("round_to", self.round_to, 1)
        check_amount(self.min_keep, "min_keep")
        if self.target_macs is None and self.target_parameters is None:
            if (self.round_to, self.min_keep) != (1, 1):
                raise TypeError(
                    f"round_to={self.round_to!r}, min_keep={self.min_keep!r} go with a budget for the whole model. "
                    "Pass target_macs= or target_parameters=, or leave them out."
                )
            return False
        if self.target_macs is not None and self.target_parameters is not None:
            raise TypeError(
                f"target_macs={self.target_macs!r}, target_parameters={self.target_parameters!r}: pass one of them. "
                "For both, call with one, then with the other and dense=."
            )
        for name, value in others.items():
            if value is not None and (name, value) != ("criterion", "obs"):
                raise TypeError(
                    f"{self.name}={self.target!r}, {name}={value!r}: a budget for the whole model chooses whole units "
                    f"by what they cost. Leave {name} out, or {self.name}."
                )
        check_fraction(self.name, self.target)
        if self.target == 0:
            raise ValueError(f"{self.name}={self.target!r} leaves nothing. Pass a fraction in (0, 1].")
        return True

    @property
    def name(self) -> str:
        """Name of the argument that is given."""
        return "target_parameters" if self.target_macs is None else "target_macs"

    @property
    def target(self) -> float:
        """The fraction."""
        return self.target_macs if self.target_macs is not None else self.target_parameters or 0.0

    def counts(self, kind: "Kind") -> list[int]:
        """Return how many units of a kind may stay, falling from those that it has now."""
        now = int(kind.alive.sum())
        least = max(Budget(None, None, self.min_keep).floor(now, kind.group.size), 1)
        step = 1 if kind.group.heads else self.round_to
        return [now, *(count for count in range(now - 1, least - 1, -1) if count % step == 0)]

    def entry(self) -> GlobalPruning:
        """Return the entry in the history."""
        asked: dict[str, Any] = {self.name: self.target, "round_to": self.round_to, "min_keep": self.min_keep}
        return GlobalPruning("prune_and_compensate", **asked)


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Units of one group, and what it costs when they go.

    Args:
        group: the group in the model's graph.
        readers: the weights that read the units, by their keys.
        alive: bool, ``(group.size,)``: of which units not all readers have lost what they read.
        parts: what the readers that have been looked at say; with the last, they are used up.
        seen: these readers.
        order: units in the order in which they go.
        costs: what it costs when the first so many go, relative to the variation of the readers' outputs.
    """

    group: Group
    readers: Mapping[Key, Member]
    alive: Tensor
    parts: list[Part] = field(default_factory=list)
    seen: list[Key] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=lambda: [0.0])

    def columns(self, layer: Layer, units: Any) -> Tensor:
        """Return which columns of the matrix of a layer that reads them some units are, ``(units, columns)``."""
        kernel = layer.weight.shape[2:].numel()
        places = self.readers[layer.module, layer.name].indices[units].unsqueeze(-1)
        return (places * kernel + torch.arange(kernel, device="cpu")).flatten(1).to(layer.weight.device)


def prune_to_limit(task: Task, limit: Limit, unit: Units | None) -> Fits:
    """Take units out until what is left is within ``limit``, re-fit all listed layers, and install it.

    In one pass the readers of each group tell in which order its units go, and what that costs; then the budget is
    shared among the groups, and in a second pass all layers are fitted to the masks.

    Args:
        task: the model, the listed weights and the data.
        limit: what may be left.
        unit: what the caller takes for the units of the listed tensors; checked against what they are.
    """
    ranks, device = task.ranks, task.targets[0].parameter.device
    with ranks.together(), torch.autocast(device.type, enabled=False):  # which would multiply with copies of weights
        inputs = Batch(task.batches[0], task.options, device).inputs
        kinds, others = _kinds(graph_of(task.model, inputs), task.targets, unit)
        kinds = _cuttable(task.model, inputs, kinds, limit, others)
        prices, whole = _prices(task.model, inputs, limit)
    ranks.agree("the units of the model", str([(kind.group.names, kind.group.size) for kind in kinds] + list(prices)))
    *each, whole = ranks.first(torch.tensor([*prices.values(), whole], dtype=torch.int64, device="cpu")).tolist()
    shares = _shares(kinds, dict(zip(prices, each, strict=True)), whole, limit)
    with ranks.together():
        _refuse_unreachable(shares, limit, others)
    kept = shares.most
    if shares.fraction(kept) > limit.target:
        shares = shares.near_even(limit.target)
        _look(task, kinds, shares.fewest)
        kept = shares.spread(limit.target, [kind.costs for kind in kinds])
    gone: dict[Key, list[tuple[Kind, list[int]]]] = {}
    for kind, stay in zip(kinds, kept, strict=True):
        units = kind.order[: int(kind.alive.sum()) - stay]
        for key in kind.readers if units else ():
            gone.setdefault(key, []).append((kind, units))

    def decide(layer: Layer, problem: Problem, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask.clone()
        for kind, units in gone.get((layer.module, layer.name), ()):
            mask[..., kind.columns(layer, units).flatten()] = 0
        return refit(problem, weight, mask), mask

    def entry(target: Target) -> GlobalPruning | None:
        loses = target.mask is not None or (target.module, target.name) in gone
        return limit.entry() if loses else None

    found, fits = task.fit(decide)
    task.install(found, entry)
    return fits


def _look(task: Task, kinds: Sequence[Kind], fewest: Sequence[int]) -> None:
    """Find out in which order the units of each kind go until the ``fewest`` are left, and what that costs."""
    readers: dict[Key, list[Kind]] = {}
    least = dict(zip(kinds, fewest, strict=True))
    for kind in kinds:
        for key in kind.readers if kind.alive.sum() > least[kind] else ():
            readers.setdefault(key, []).append(kind)

    def see(layer: Layer, problem: Problem, weight: Tensor, mask: Tensor) -> None:
        key = layer.module, layer.name
        columns = [kind.columns(layer, kind.alive) for kind in readers[key]]
        scales = problem.size().flatten() / (problem.total(problem.variation) or 1.0)
        for scale, gram, cross, left in zip(scales, *weighed(problem), mask, strict=True):
            for kind, part in zip(readers[key], parts_of(gram, cross, left, columns), strict=True):
                part.squares.mul_(scale)
                kind.parts.append(part)
        for kind in readers[key]:
            kind.seen.append(key)
            if len(kind.seen) == len(kind.readers):
                order, rises = eliminate(kind.parts, least[kind])
                kind.order.extend(kind.alive.nonzero().flatten()[order].tolist())
                kind.costs.extend(accumulate(rises))
                kind.parts.clear()

    task.look(list(readers), see)
    for kind in kinds:
        kind.order[:] = task.ranks.first(torch.tensor(kind.order, dtype=torch.int64, device="cpu")).tolist()
        kind.costs[:] = task.ranks.first(torch.tensor(kind.costs, dtype=torch.float64, device="cpu")).tolist()


def _kinds(groups: Sequence[Group], targets: Sequence[Target], unit: Units | None) -> tuple[list[Kind], list[str]]:
    """Return the units all of whose readers are listed, and why others that a listed weight reads must stay."""
    check_units(unit)
    given, units = {(each.module, each.name): each for each in targets}, units_of(targets, unit)
    listed, found, others = given if units is None else units, [], []
    for group in groups:
        readers = {(each.module, each.param): each for each in group.members if each.reads}
        if group.size == 1 or not any(key in listed for key in readers):
            continue
        missing = [each.name for key, each in readers.items() if key not in listed]
        why = group.fixed
        if why is None and any(each.reader is None or not each.whole for each in group.readings):
            why = "they are read by a product that is not one with a whole weight"
        if why is None and missing:
            why = (
                f"{' and '.join(missing)} read{'s' * (len(missing) == 1)} them too. List that as well, if it can be: "
                "of a Linear, Conv1d or Conv2d, called once in a pass, and not tied"
            )
        if why is not None:
            others.append(f"the {group.size} units of {', '.join(group.names[:3])}: {why}")
            continue
        alive = torch.zeros(group.size, dtype=torch.bool, device="cpu")
        for key, member in readers.items():
            _check_unit(None if units is None else units[key], member)
            mask = given[key].mask
            if mask is None:
                alive.fill_(True)
            else:
                alive |= (mask != 0).movedim(member.axis, 0).flatten(1).any(1).cpu()[member.indices].any(1)
        found.append(Kind(group, readers, alive))
    return found, others


def _cuttable(model: nn.Module, inputs: Any, kinds: Sequence[Kind], limit: Limit, others: list[str]) -> list[Kind]:
    """Return the kinds whose number the model's code does not fix, as by ``x.view(-1, 400)``; tell ``others`` why."""
    cuts = []
    for kind in kinds:
        now, *fewer = limit.counts(kind)
        if fewer:
            gone = torch.zeros_like(kind.alive)
            gone[kind.alive.nonzero().flatten()[: now - fewer[0]]] = True
            cuts.append(Cut(kind.group, gone, torch.zeros_like(gone)))
    with as_plain(model):
        fixed = fixed_widths(model, cuts, inputs)
    others += [f"the {each.size} units of {', '.join(each.names[:3])}: {why}" for each, why in fixed.items()]
    return [kind for kind in kinds if kind.group not in fixed]


def _check_unit(unit: Channel | None, member: Member) -> None:
    """Raise ``ValueError`` unless ``unit``, if there is one, is what ``member`` reads: a channel, or all of a unit."""
    if unit is None:
        return
    weight, size = getattr(member.module, member.param), member.indices.shape[1]
    with errors_about(f"unit={unit!r}, {member.name} of shape {tuple(weight.shape)}"):
        if unit.axis(weight.shape) != member.axis:
            raise ValueError(
                f"dim={unit.dim} counts the outputs, and what is left of a layer can only make up for inputs that go. "
                f"Pass Channel(dim={member.axis}), or leave unit out."
            )
        if unit.size not in (1, size) or unit.groups not in (1, getattr(member.module, "groups", 1)):
            sizes = f"Channel(dim={member.axis}, size={size})"
            raise ValueError(f"the model's units are {size} neighbours. Pass {sizes}, or leave unit out.")


def _prices(model: nn.Module, inputs: Any, limit: Limit) -> tuple[dict[str, int], int]:
    """Return what each weight takes of the budget, by its name, and what the whole model takes."""
    if limit.target_macs is not None:
        with evaluating(model):
            return macs_by_weight(model, lambda: call(model, inputs))
    with as_plain(model):
        prices = {name: each.numel() for name, each in model.named_parameters()}
    return prices, sum(prices.values())


def _shares(kinds: Sequence[Kind], prices: Mapping[str, int], whole: int, limit: Limit) -> Shares:
    """Return what the units take of the budget."""
    losses: dict[str, list[tuple[int, int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for place, kind in enumerate(kinds):
        for member in kind.group.members:
            losses.setdefault(member.name, []).append((member.axis, place, member.indices.shape[1]))
            shapes[member.name] = tuple(getattr(member.module, member.param).shape)
    own = [
        Price(prices[name] / prod(shapes[name]), shapes[name], tuple(each))
        for name, each in losses.items()
        if prices.get(name)
    ]
    rest = whole - sum(prices[name] for name in losses if name in prices)
    return Shares(own, rest, [kind.group.size for kind in kinds], [limit.counts(kind) for kind in kinds])


def _refuse_unreachable(shares: Shares, limit: Limit, others: Sequence[str]) -> None:
    """Raise ``ValueError`` if even the fewest units that may stay take more than the budget."""
    if shares.can_reach(limit.target):
        return
    least = shares.fraction(shares.fewest)
    what = "multiplications" if limit.target_macs is not None else "parameters"
    told = "".join(f"\n  {each}" for each in others[:20])
    raise ValueError(
        f"{limit.name}={limit.target!r} is out of reach: with min_keep={limit.min_keep!r} and "
        f"round_to={limit.round_to} at least {ceil(least * 1e4) / 1e4} of the {what} are left. Pass that or more, "
        f"smaller min_keep or round_to, or list more of the weights that read units in params."
        f"{' These stay:' * bool(told)}{told}"
    )
