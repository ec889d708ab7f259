"""How one budget of entries is shared among the layers, by what each does to the model's output.

A part of the batches is kept aside. On the others the model is pruned and fitted, at first with equal shares, and the
output's error on what was kept aside is differentiated: to what a layer's weights would be if a little more or less of
it went. Shares move towards the layers whose entries cost least, and all is done again, as long as the error falls.
How prices rise with shares, the rounds show; after one that made it worse, the next goes less far.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import floor, inf, isfinite, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch
from torchprune_ext._layers import Layer, Solution
from torchprune_ext._ranks import Ranks
from torchprune_ext._runs import Run, calibrating
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.block_outputs import Calls, Distance, counted, gradients, sample_axes
from torchprune_ext.compensation.fitting import Decide, Fitted, Task
from torchprune_ext.compensation.solvers import Problem, refit, wanda_scores
from torchprune_ext.compensation.streams import holding
from torchprune_ext.masks import nm_mask
from torchprune_ext.patterns import NM

ASIDE = 4  # one of so many batches is kept aside
APART = 1.5  # between the odds of a layer's share, gone to left, and the odds at which it is tried
REACH = 4.0  # most by which these odds change from one round to the next, until one made it worse
BACK = 0.1, 0.5  # power of that to which it is taken then, where the least of a parabola is
POWER = 1.5  # of the odds with which prices are taken to rise, until rounds have shown it
POWERS = 1.0, 6.0  # within these
MOVED = 1.05  # odds that have changed by as much show it
GAIN = 0.01  # of the error: a round that promises less, or is worth less, is the last
FAILURES = 2  # or so many rounds that made it worse
ROUNDS = 8  # at most
NONE = (
    "allocation='auto' differentiates the model's output, which depends on none of params here, as when the model "
    "computes under torch.no_grad(). Leave allocation out, or pass amounts as target_sparsity=."
)


class Kept(NamedTuple):
    """How many entries of a layer stay: at most so many of each row, and one more of some rows.

    Args:
        most: entries of a row.
        more: rows that keep one more.
    """

    most: int
    more: int = 0


class Goals(NamedTuple):
    """What the layers lose.

    Args:
        sparsity: of the rows of each tensor.
        more: of tensors that have such, how many of these rows keep one entry more than that.
    """

    sparsity: dict[Key, float]
    more: dict[Key, int]


@dataclass(frozen=True, slots=True)
class Columns:
    """What a layer can lose: one entry more of each row at a time.

    Args:
        inputs: entries of a row.
        entries: of the layer.
        alive: how many rows have at least so many entries that are not pruned, from 1 on.
    """

    inputs: int
    entries: int
    alive: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> "Columns":
        """Return those of a matrix with this ``mask``, ``(groups, outputs, inputs)``."""
        counts = torch.bincount(mask.count_nonzero(-1).flatten(), minlength=mask.shape[-1] + 1)
        at_least = counts.flip(0).cumsum(0).flip(0)[1:]
        return cls(mask.shape[-1], mask.numel(), tuple(count for count in at_least.tolist() if count))

    def gone(self, kept: int) -> float:
        """Return which fraction is gone of a row that keeps so many entries."""
        return 1 - kept / self.inputs


def share(columns: Sequence[Columns], goal: int, order: Callable[[int, float], Any]) -> list[Kept]:
    """Return how many entries of each layer stay, so that exactly ``goal`` entries of all are gone.

    Steps of one entry of each row are taken until that is reached, and those that turn out not to be needed are given
    back, the last first. What still goes beyond it is less than any step left: so many rows of the last are spared.

    Args:
        columns: what each layer can lose.
        goal: so many entries, pruned already or now; the layers can lose that (not checked).
        order: from the number of a layer and the fraction of its rows that is gone after a step to its place among the
            steps, which rises with the fraction.
    """
    steps = sorted(
        (order(place, each.gone(kept)), place, -kept)
        for place, each in enumerate(columns)
        for kept in range(len(each.alive) - 1, 0, -1)
    )
    keep = [len(each.alive) for each in columns]
    left = sum(sum(each.alive) for each in columns) - (sum(each.entries for each in columns) - goal)
    taken = []
    for _, place, _ in steps:
        if left <= 0:
            break
        keep[place] -= 1
        left -= columns[place].alive[keep[place]]
        taken.append(place)
    last = None
    for place in reversed(taken):
        step = columns[place].alive[keep[place]]
        if left + step <= 0:
            keep[place], left = keep[place] + 1, left + step
        else:
            last = place if last is None else last
    return [Kept(most, -left if place == last else 0) for place, most in enumerate(keep)]


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """What a layer would be if a little less or a little more of it went.

    Args:
        middle: weight and, if it is fitted, bias half way between.
        change: of both from less to more.
        entries: how many go on the way.
    """

    middle: Solution
    change: Solution
    entries: int


@dataclass(frozen=True, slots=True)
class Round:
    """Shares, and what they came to.

    Args:
        keep: how many entries of each layer stay.
        error: of the model's output on what is kept aside.
        prices: by how much that rises for each entry of a layer that goes in addition.
    """

    keep: list[Kept]
    error: float
    prices: list[float]


def shares_by_output(
    task: Task, target_sparsity: float, decide: Callable[[Goals], Decide]
) -> tuple[Goals, list[float]]:
    """Return what each tensor loses, and the errors of the output in all rounds.

    Args:
        task: the model, the listed weights and all data.
        target_sparsity: fraction of all entries of these weights that shall go.
        decide: from what each tensor loses to what a layer keeps.

    Raises:
        ValueError: too few batches; more is pruned already, or less than one entry of each row would be left; or the
            output holds no floating-point tensor, is not finite or has no gradient.
    """
    with Ranks(task.options.get("process_group")).together():
        if len(task.batches) < 2:
            raise ValueError(
                "allocation='auto' keeps a part of the batches aside, but loader gave one. Pass at least two, e.g. "
                "smaller batches."
            )
    return Search(task, target_sparsity, decide).best()


@dataclass(eq=False)
class Search:
    """Looks for shares. The arguments are those of :func:`shares_by_output`."""

    task: Task
    target_sparsity: float
    decide: Callable[[Goals], Decide]
    columns: dict[Key, Columns] = field(default_factory=dict)
    tried: dict[Key, Tried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep a part of the batches aside."""
        self.aside = self.task.batches[::ASIDE]
        rest = [each for place, each in enumerate(self.task.batches) if place % ASIDE]
        order = {module: place for place, module in enumerate(self.task.model.modules())}
        targets = sorted(self.task.targets, key=lambda target: order[target.module])  # however they are listed
        self.fitted = replace(self.task, targets=targets, batches=rest)
        self.masks = {(target.module, target.name): target.mask for target in targets}

    def best(self) -> tuple[Goals, list[float]]:
        """Return the shares with the least error, and the errors of all rounds."""
        best, power, reach, failures = self.round(None), POWER, REACH, 0
        rounds, gain = [best], inf
        while len(rounds) < ROUNDS and failures < FAILURES and gain >= GAIN * best.error:
            keep = self.moved(best, power, reach)
            if not self.promised(best, keep, power) > GAIN * best.error or any(keep == each.keep for each in rounds):
                break
            new = self.round(keep)
            rounds.append(new)
            shown = self.shown(best, new, power)
            if new.error < best.error:
                best, power, gain = new, shown, best.error - new.error
            else:
                slope = self.promised(best, keep, 0.0)
                part = slope / (2 * (slope + new.error - best.error))
                power, reach, failures = max(power, shown), reach ** min(max(part, BACK[0]), BACK[1]), failures + 1
        return self.goals(best.keep), [each.error for each in rounds]

    def odds(self, keep: Sequence[Kept]) -> list[float]:
        """Return the odds of gone to left of each layer, where so many entries stay; above 0."""
        return [
            _odds(max(each.gone(left.most), 0.5 / each.inputs))
            for each, left in zip(self.columns.values(), keep, strict=True)
        ]

    def shown(self, old: Round, new: Round, otherwise: float) -> float:
        """Return the power of the odds with which prices rose from one round to another, over all layers."""
        pairs = [
            (log(after / before), log(price / cost))
            for before, after, cost, price in zip(
                self.odds(old.keep), self.odds(new.keep), old.prices, new.prices, strict=True
            )
            if cost > 0 and price > 0 and not 1 / MOVED < after / before < MOVED
        ]
        if len(pairs) < 3:
            return otherwise
        x, y = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in zip(*pairs, strict=True))
        x, y = x - x.mean(), y - y.mean()
        slope = float((x * y).sum() / x.square().sum())
        return min(max(slope, POWERS[0]), POWERS[1]) if isfinite(slope) else otherwise

    def promised(self, last: Round, keep: Sequence[Kept], power: float) -> float:
        """Return by how much the error should fall from the ``last`` round to shares that keep so much."""
        gain = 0.0
        odds = zip(self.odds(last.keep), self.odds(keep), strict=True)
        for each, old, new, price, (before, after) in zip(
            self.columns.values(), last.keep, keep, last.prices, odds, strict=True
        ):
            if old.most != new.most:
                more = (each.gone(new.most) - each.gone(old.most)) * each.entries
                gain -= more * max(price, 0.0) * (1 + (after / before) ** power) / 2
        return gain

    def goal(self) -> int:
        """Return how many entries shall be gone; raise where that cannot be."""
        columns = self.columns.values()
        total, alive = sum(each.entries for each in columns), sum(sum(each.alive) for each in columns)
        least = sum(each.alive[0] for each in columns if each.alive)
        goal = round(self.target_sparsity * total)
        if goal < total - alive:
            raise ValueError(
                f"target_sparsity={self.target_sparsity!r} is {goal} of the {total} listed entries, but "
                f"{total - alive} are pruned already. Pass a larger one, or undo_all() first and dense=."
            )
        if goal > total - least:
            raise ValueError(
                f"target_sparsity={self.target_sparsity!r} takes {goal} of the {total} listed entries, but one of each "
                f"row stays, {least} in all. Pass {floor(1e4 * (1 - least / total)) / 1e4} or less."
            )
        return goal

    def even(self) -> list[Kept]:
        """Return what stays with equal shares."""
        return share(list(self.columns.values()), self.goal(), lambda _, gone: gone)

    def goals(self, keep: Sequence[Kept]) -> Goals:
        """Return what each tensor loses where so many entries stay."""
        pairs = list(zip(self.columns.items(), keep, strict=True))
        return Goals(
            {key: each.gone(left.most) for (key, each), left in pairs},
            {key: left.more for (key, _), left in pairs if left.more},
        )

    def moved(self, last: Round, power: float, reach: float) -> list[Kept]:
        """Return shares nearer to those at which an entry costs the same everywhere."""
        columns, before = list(self.columns.values()), self.odds(last.keep)

        def order(place: int, gone: float) -> tuple[float, float]:
            times = _odds(gone) / before[place]
            price = max(last.prices[place], 0.0) * times**power
            return (-inf if times < 1 / reach else inf if times > reach else price), times

        return share(columns, self.goal(), order)

    def see(self, layer: Layer) -> None:
        """Find out what a layer can lose."""
        key = layer.module, layer.name
        mask = self.masks[key]
        self.columns[key] = Columns.of(layer.matrix(torch.ones_like(layer.weight) if mask is None else mask))

    def round(self, keep: list[Kept] | None) -> Round:
        """Prune and fit with these shares, by default equal ones, and see what it does to the output."""

        @cache  # by when it is called first, all layers have been seen
        def goals() -> Goals:
            return self.goals(keep or self.even())

        def decide(layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
            self._try(layer, problem, weight, alive, goals().sparsity[layer.module, layer.name])
            return self.decide(goals())(layer, problem, weight, alive)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is to be told, the fit on all data tells
            found, _ = self.fitted.fit(decide, check=self.see)
        return Round(keep or self.even(), *self._measure(found))

    def _try(self, layer: Layer, problem: Problem, weight: Tensor, alive: Tensor, gone: float) -> None:
        """Remember how a layer's weights and bias differ between a little less and a little more that goes."""
        inputs = weight.shape[-1]
        odds, kept = _odds(max(gone, 0.5 / inputs)), round(inputs * (1 - gone))
        many = min(max(round(inputs / (1 + odds / APART)), kept + 1), inputs)
        few = max(min(round(inputs / (1 + odds * APART)), kept - 1), 1)
        scores = wanda_scores(problem, weight * alive)
        less, more = (nm_mask(scores, NM(n, inputs, dim=2), alive) for n in (many, few))
        low, high = (refit(problem, weight, mask) for mask in (less, more))
        middle, change = (layer.shaped(each).to(layer.weight) for each in ((low + high) / 2, high - low))
        bias: tuple[Tensor | None, Tensor | None] = None, None
        if layer.module in self.task.biases:
            low, high = (problem.best_bias(each).flatten().to(layer.weight) for each in (low, high))
            bias = (low + high) / 2, high - low
        self.tried[layer.module, layer.name] = Tried((middle, bias[0]), (change, bias[1]), int((less - more).sum()))

    def _measure(self, found: Sequence[Fitted]) -> tuple[float, list[float]]:
        """Return the error of the output on what is kept aside, and by how much it rises for each entry that goes.

        From a little less to a little more of one layer, the error rises by the gradient half way times the way, as far
        as it is quadratic. So there the gradient is taken, of all layers at once.
        """
        tried = [self.tried[each.target.module, each.target.name] for each in found]
        total, rises = 0.0, [0.0] * len(found)
        with calibrating(self.task.model, list(self.columns), {**self.task.options, "progress": False}) as run:
            pruned = _tables(found, [(each.weight * each.mask, each.bias) for each in found])
            between = _tables(found, [each.middle for each in tried])
            weights = [value for _, _, value in between]
            changes = [(n, each) for n, ends in enumerate(tried) for each in ends.change if each is not None]
            batches = [batch for batch in run.batches(self.aside, "") if counted(batch)]
            with torch.no_grad(), torch.autocast(run.device.type, enabled=False):
                compare = _distance(run, batches)
            for batch in batches:
                with torch.autocast(run.device.type, enabled=False):
                    with torch.no_grad():
                        with holding(self.task.reference):
                            dense = run.output(batch.inputs)
                        error = partial(_error, compare, run, dense, batch)
                        with holding(pruned):
                            total += float(error())
                    with holding(between):
                        _, slopes = gradients(error, weights, NONE)
                for (place, change), gradient in zip(changes, slopes, strict=True):
                    if gradient is not None:
                        rises[place] += float((gradient.double() * change).sum())
            if not all(map(isfinite, rises)):
                raise ValueError(
                    "the gradient of the output's error is NaN or infinity on the data kept aside. Check the data; NaN "
                    "in samples that sample_mask leaves out gets into it too: put zeros there."
                )
        sums = torch.tensor([total, *rises, len(batches)], dtype=torch.float64, device="cpu")
        total, *rises, all_counts = Ranks(self.task.options.get("process_group")).sum(sums).tolist()
        if not all_counts:
            raise ValueError(
                f"allocation='auto' keeps one of {ASIDE} batches aside, from the first on, and sample_mask leaves out "
                "all samples of these. Pass batches that hold some that count."
            )
        prices = [rise / max(ends.entries, 1) / all_counts for rise, ends in zip(rises, tried, strict=True)]
        return total / all_counts, prices


def _distance(run: Run, batches: Sequence[Batch]) -> Distance:
    """Return what compares outputs of the model, over the rows that count."""
    calls, name = Calls(run, {}), "the model"
    masked = next((batch for batch in batches if batch.mask is not None), None)
    axes = None if masked is None else sample_axes(calls, masked, calls.outputs(masked.inputs), [name])[0]
    return Distance(name, axes, remedy="Leave allocation='auto' out, or pass amounts as target_sparsity=.")


def _tables(found: Sequence[Fitted], values: Sequence[Solution]) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """Return where the modules hold new weights and biases, and these."""
    return [
        (each.target.module._parameters, name, nn.Parameter(value))
        for each, pair in zip(found, values, strict=True)
        for name, value in zip((each.target.name, "bias"), pair, strict=True)
        if value is not None
    ]


def _odds(gone: float) -> float:
    return gone / (1 - gone) if gone < 1 else inf


def _error(compare: Distance, run: Run, dense: Any, batch: Batch) -> Tensor:
    """Return how far the output of the model is from the dense one's, over what counts of ``batch``."""
    error = compare(run.output(batch.inputs), dense, batch)
    if not error.isfinite():
        raise ValueError(
            "the model's output holds NaN or infinity on the data kept aside, or squares beyond the range. Check the "
            "data, or leave allocation out."
        )
    return error
