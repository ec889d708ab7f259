"""Fit the listed layers of a model in one pass over the data: what to install in each, and how far off it is.

Nothing here changes the model: what a pass has found is returned, and whoever asked for it installs it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_module, check_weight, leave_out, warn
from torchprune_ext._fingerprints import agree_on, agree_on_values
from torchprune_ext._host import Target, install, pruned, remember_dense, rewrite, targets_of, warn_of_zeros
from torchprune_ext._layers import Layer, Solution
from torchprune_ext._loading import Options, PassOptions, taken, with_progress, without_offload
from torchprune_ext._ranks import Ranks
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext._runs import Run, calibrating, refuse_lazy, wide
from torchprune_ext._statistics import Key
from torchprune_ext._tables import percent, table
from torchprune_ext.compensation.reference import Dense, reference_tables
from torchprune_ext.compensation.solvers import Moments, Problem, refit
from torchprune_ext.compensation.streams import Pass, Solve, Tables, weights_of
from torchprune_ext.masks import finish
from torchprune_ext.methods import GlobalPruning

Decide = Callable[[Layer, Problem, Tensor, Tensor], tuple[Tensor, Tensor]]  # from weights and mask to new ones
See = Callable[[Layer, Problem, Tensor, Tensor], object]


@dataclass(frozen=True, slots=True)
class Fit:
    """What a layer's outputs are off the reference model's, in squares relative to their variation, on the data given.

    It is the mean over the layer's inputs in the model as pruned before it and in the reference model, weighted as by
    ``dense_inputs``; :func:`.sparsegpt` sees only the former. Where the layer is fitted to a sum, as with a residual
    stream, the errors are those of the sum, and so in the scale of a BatchNorm that comes before it.

    Args:
        before: with what was pruned merely zeroed.
        after: with the survivors re-fitted.
        rows: how many rows of data the layer saw; fewer than it has inputs do not determine its weights.
        path: of the weight in the model.
        entries: of the weight.
        pruned: how many of them are.
    """

    before: float
    after: float
    rows: int
    path: str = ""
    entries: int = 0
    pruned: int = 0

    @property
    def sparsity(self) -> float:
        """Which fraction of the weight is pruned."""
        return self.pruned / max(self.entries, 1)


class Fits(dict[Key, Fit]):
    """The fit of each listed tensor, by ``(module, name)``; printed, a table.

    Attributes:
        rounds: with ``allocation="auto"``, the error of the model's output on the data kept aside, first with equal
            shares, then after each round; the shares taken are those of the least.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> print(Fits({(layer, "weight"): Fit(0.5, 0.25, 64, "head.weight", 8, 4)}))
        weight       entries  pruned  error if zeroed  re-fitted
        head.weight        8  50.0 %              0.5       0.25
        all                8  50.0 %
    """

    rounds: Sequence[float] = ()

    def __str__(self) -> str:
        """Return a table of the layers."""
        rows = [
            [fit.path, f"{fit.entries:,}", percent(fit.sparsity), f"{fit.before:.3g}", f"{fit.after:.3g}"]
            for fit in self.values()
        ]
        entries, gone = (
            sum(counts) for counts in ([f.entries for f in self.values()], [f.pruned for f in self.values()])
        )
        rows.append(["all", f"{entries:,}", percent(gone / max(entries, 1)), "", ""])
        told = table(["weight", "entries", "pruned", "error if zeroed", "re-fitted"], rows)
        if self.rounds:
            rest = ", ".join(f"{error:.3g}" for error in self.rounds[1:])
            told += f"\nerror of the output on data kept aside: {self.rounds[0]:.3g} with equal shares, then {rest}"
        return told


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a pass has found for one target: its mask, all its values and, if it is new, the bias."""

    target: Target
    mask: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a call fits, to what, and on which data: the same in all of its passes. Use :meth:`of` to make one.

    Args:
        model: the model.
        targets: the listed tensors, as they were at first.
        biases: the modules whose bias is fitted too.
        reference: what the modules hold while the model runs as the reference model.
        whole: whether the reference is a whole model, and not this one without the listed masks.
        batches: what the loader gave.
        options: how the data is read.
        offload: folder for what goes from block to block of the model; None to hold it in memory.
        dense_inputs: weight of a layer's inputs in the reference model, beside those in the pruned one.
        sums: fit what is added to a layer's output along with it.
    """

    model: nn.Module
    targets: list[Target]
    biases: frozenset[nn.Module]
    reference: Tables
    whole: bool
    batches: list[Any]
    options: Options
    offload: str | None
    dense_inputs: float
    sums: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        params: Iterable[Key],
        dense: Dense | None,
        options: PassOptions,
        *,
        biases: bool = True,
        create_bias: bool = False,
        dense_inputs: float = 1.0,
        sums: bool = True,
    ) -> "Task":
        """Check the arguments and read the data.

        Args:
            model: the model.
            loader: batches.
            params: ``(module, name)`` pairs; tensors that several modules share are refused.
            dense: where the reference model's values come from.
            options: how the data is read.
            biases: fit the layers' biases too, but those that are pruned, shared, or computed.
            create_bias: also give layers that were made without a bias one.
            dense_inputs: weight of a layer's inputs in the reference model, beside those in the pruned one.
            sums: fit what is added to a layer's output along with it.
        """
        check_weight("dense_inputs", dense_inputs)
        targets = _targets(model, params)
        refuse_lazy(model)
        warn_of_zeros({target.where: target for target in targets})
        reference = reference_tables(model, targets, dense)
        free = _free_biases(model, targets, create_bias) if biases else frozenset()
        plain, offload = without_offload(options)
        batches = taken(loader, plain)
        return cls(
            model, targets, free, reference, dense is not None, batches, plain, offload, float(dense_inputs), sums
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that share the call."""
        return Ranks(self.options.get("process_group"))

    def agree(self, call: str, **arguments: object) -> None:
        """Raise ``RuntimeError`` on all ranks unless all make the same ``call`` of the same model.

        Args:
            call: name of the function.
            arguments: its arguments, but for the data; what is given for each tensor is keyed by tensors.
        """
        ranks = self.ranks
        if ranks.group is None:
            return
        listed = self._names()

        def told(value: object) -> object:
            return {listed.get(key, key): each for key, each in value.items()} if isinstance(value, Mapping) else value

        words = [f"{key}={told(value)!r}" for key, value in arguments.items()]
        fitted = [name for key, name in listed.items() if key[0] in self.biases]
        words += [f"dense={'given' if self.whole else None}", f"dense_inputs={self.dense_inputs}"]
        ranks.agree("the calls", f"{call}({', '.join(words)}) of {list(listed.values())}, with the biases of {fitted}")
        agree_on_values(ranks, self.model)
        dense = {str(i): value for i, (_, _, value) in enumerate(self.reference) if isinstance(value, Tensor)}
        if self.whole:
            agree_on(ranks, "the tensors of dense=", dense, "Pass the same on all ranks.")

    def agree_on(self, what: str, tensors: Mapping[Key, Any], remedy: str) -> None:
        """Raise ``RuntimeError`` on all ranks unless ``what`` all pass for the listed tensors is the same."""
        agree_on(self.ranks, what, {name: tensors[key] for key, name in self._names().items()}, remedy)

    def _names(self) -> dict[Key, str]:
        """Return the names of the listed tensors in the model."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            (each.module, each.name): names[id(Target.of(each.module, each.name).parameter)] for each in self.targets
        }

    def fit(
        self,
        decide: Decide | None = None,
        *,
        check: Callable[[Layer], object] | None = None,
        keep_better: bool = True,
        progress: bool | None = None,
    ) -> tuple[list[Fitted], Fits]:
        """Fit all layers in sequence and return what to install; changes nothing.

        Args:
            decide: from a layer, its problem, its weights and mask to new ones; None to re-fit what the mask leaves.
            check: raises for a layer that cannot be treated; called with all before the first is.
            keep_better: let no row get worse than it is with what was pruned merely zeroed.
            progress: show a bar over the layers; by default as the options say.
        """
        fits = Fits()
        masks: dict[Key, Tensor] = {}
        few: list[str] = []
        targets = [Target.of(target.module, target.name) for target in self.targets]
        quiet: Options = {**self.options, "progress": False}  # the bar counts layers
        with calibrating(self.model, [(target.module, target.name) for target in targets], quiet) as run:
            with run.ranks.together():
                layers = [Layer(each.module, each.name, name) for each, name in zip(targets, run.names, strict=True)]
                bar = with_progress(
                    layers, "compensate", None, self.options.get("progress") if progress is None else progress
                )
                batches = list(run.batches(self.batches, ""))
            given = dict(zip(layers, targets, strict=True))
            steps = iter(bar)

            def solve(layer: Layer, moments: Moments) -> Solution:
                if check is not None and not masks:
                    for each in layers:
                        check(each)
                free = layer.module in self.biases
                problem, weight, alive = self._posed(layer, given[layer], moments)
                if decide is None:
                    found, keep = refit(problem, weight, alive), alive
                else:
                    found, keep = decide(layer, problem, weight, alive)
                new, bias, before, after = _rounded(layer, problem, weight * keep, found, free, keep_better)
                key, whole = (layer.module, layer.name), problem.total(problem.variation) or 1.0
                rows = round(problem.count / sum(weights_of(self.dense_inputs)))
                errors = problem.total(before) / whole, problem.total(after) / whole
                fits[key] = Fit(*errors, rows, layer.label, keep.numel(), int((keep == 0).sum()))
                masks[key] = layer.shaped(keep)
                if rows < weight.shape[-1]:
                    few.append(f"{layer.label} ({rows} of {weight.shape[-1]})")
                next(steps, None)
                tell(bar, 1 - float(keep.mean()), fits[key].after)
                return layer.shaped(new), None if bias is None else bias.reshape(-1)

            walk = self._pass(run, layers, solve)
            walk.over(batches)
            next(steps, None)
            for key, fit in fits.items():
                errors = run.ranks.first(
                    torch.tensor([fit.before, fit.after], dtype=torch.float64, device="cpu")
                ).tolist()
                masks[key], fits[key] = run.ranks.first(masks[key]), replace(fit, before=errors[0], after=errors[1])
        found = []
        for layer, target in zip(layers, targets, strict=True):
            weight, bias = walk.solved[layer]
            like = target.parameter.detach() if target.mask is None else target.mask
            mask = finish(masks[layer.module, layer.name].to(like.dtype), like)
            values = torch.where(mask != 0, weight, target.parameter.detach())
            found.append(Fitted(target, mask, values, bias))
        self._warn(fits, few)
        keys = [(target.module, target.name) for target in targets]
        return found, Fits({key: fits[key] for key in keys})

    def look(self, keys: Sequence[Key], see: See) -> None:
        """Let ``see`` look at some of the layers, each with its problem, weights and mask, in the model as it is."""
        quiet: Options = {**self.options, "progress": False}
        targets = [Target.of(*key) for key in keys]
        with calibrating(self.model, keys, quiet) as run:
            with run.ranks.together():
                layers = [Layer(*key, name) for key, name in zip(keys, run.names, strict=True)]
                steps = iter(with_progress(layers, "costs of units", None, self.options.get("progress")))
                batches = list(run.batches(self.batches, ""))
            given = dict(zip(layers, targets, strict=True))

            def solve(layer: Layer, moments: Moments) -> Solution:
                see(layer, *self._posed(layer, given[layer], moments))
                next(steps, None)
                return layer.weight, None

            self._pass(run, layers, solve).over(batches)
            next(steps, None)

    def _pass(self, run: Run, layers: Sequence[Layer], solve: Solve) -> Pass:
        return Pass(run, layers, self.reference, solve, self.offload, dense_inputs=self.dense_inputs, sums=self.sums)

    def _posed(self, layer: Layer, target: Target, moments: Moments) -> tuple[Problem, Tensor, Tensor]:
        """Return the least squares of a layer, its weights and its mask, the last two as matrices."""
        problem = moments.problem(None if layer.module in self.biases else layer.bias_rows())
        weight = layer.matrix(target.weight())
        weight = weight.to(wide(weight.dtype))
        if target.mask is None:
            return problem, weight, weight.new_ones(()).expand_as(weight)
        return problem, weight, layer.matrix(target.mask != 0).to(weight)

    def install(self, found: Sequence[Fitted], entry: Callable[[Target], GlobalPruning | None]) -> None:
        """Install what a pass has found, with a mask and an ``entry`` in the history if there is one, or nothing."""
        dense = {(id(table), key): value for table, key, value in self.reference}
        with all_or_nothing(target.module for target in self.targets), self.ranks.together():
            for fitted in found:
                target = fitted.target
                if target.mask is not None:
                    old = dense.get((id(target.module._parameters), target.name), target.parameter)
                    remember_dense(target, old)
            entries = [(each.target, entry(each.target), each.mask) for each in found]
            install(
                [(target, method, mask) for target, method, mask in entries if method is not None], values_change=True
            )
            rewrite([(each.target, each.weight, each.bias) for each in found])

    def _warn(self, fits: Fits, few: Sequence[str]) -> None:
        """Warn where a fit says less than it seems to; ``few`` are the layers that too little data reaches."""
        if few:
            warn(
                f"fewer rows of data than the layer has inputs reach {', '.join(few)}, so the fit follows their noise. "
                "Pass more data."
            )
        listed = {(target.module, target.name) for target in self.targets}
        others = [t.where for t in pruned(self.model) if t.name != "bias" and (t.module, t.name) not in listed]
        if not self.whole and others and all(fit.before <= 1e-6 for fit in fits.values()):
            more = f" and {len(others) - 1} more" * (len(others) > 1)
            warn(
                f"nothing was off in any of the {len(fits)} layers: what is pruned but not listed, {others[0]}{more}, "
                "is pruned in the reference model too. List it as well, or pass dense=."
            )


def _rounded(
    layer: Layer, problem: Problem, start: Tensor, found: Tensor, free: bool, keep_better: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return weights and bias in the layer's dtype, and the errors of each row before and after.

    Args:
        layer: the layer.
        problem: its least squares.
        start: weights that are merely masked.
        found: new weights.
        free: whether the bias is fitted.
        keep_better: take a row only if it is no worse than ``start``, and not merely finite.
    """
    bias, dtype = layer.bias_rows(), layer.weight.dtype
    rounded = found.to(dtype)
    best = problem.best_bias(rounded).to(dtype) if free else None
    before = problem.error(start, bias if free else None)
    after = problem.error(rounded, None if best is None else best.double())
    # Rounding to the model's precision may have cost more than was gained, or gone beyond its range.
    worse = ~(after <= before) if keep_better else ~after.isfinite()
    rounded[worse] = start[worse].to(dtype)
    after = torch.where(worse, before, after)
    if best is not None:
        best = torch.where(worse, bias, best.double()).to(dtype)
    return rounded, best, before, after


def _targets(model: nn.Module, params: Iterable[Key]) -> list[Target]:
    """Find the listed tensors; those that several modules share are refused."""
    check_module("model", model)
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found = targets_of(params)
    if not found:
        raise ValueError("params=[] lists no tensor. Pass (module, name) pairs, e.g. of prunable_parameters(model).")
    for place, target in found.items():
        names = places.get(id(target.parameter), [])
        if not names:
            raise ValueError(f"params[{place}], {target.where}, is not a part of the model.")
        if [each.module for each in found.values()].count(target.module) > 1:
            raise TypeError(
                f"params[{place}], {target.where}, is one of several tensors of its module, which therefore does not "
                f"multiply as Linear does. {leave_out(names[0])}."
            )
        if target.mask is not None and not ((target.mask == 0) | (target.mask == 1)).all():
            raise ValueError(
                f"params[{place}], {target.where}, has a mask with values besides 0 and 1. Prune it by a mask of those."
            )
        if len(names) > 1:
            raise ValueError(
                f"params[{place}], {target.where}, is tied: {' and '.join(names)} would have to make up for different "
                "errors. Leave it out, as prunable_parameters(model, tied=False) does, or untie it."
            )
    return list(found.values())


def _free_biases(model: nn.Module, targets: Sequence[Target], create: bool) -> frozenset[nn.Module]:
    """Return the modules whose bias may be changed: not one that is pruned, shared, or computed."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = set()
    for target in targets:
        bias = Target.found(target.module, "bias")
        if bias is None:
            free = create and "bias" in target.module._parameters
        else:
            free = bias.mask is None and owners[id(bias.parameter)] == 1
        if free:
            found.add(target.module)
    return frozenset(found)


def tell(bar: Any, sparsity: float, error: float) -> None:
    """Show what was reached, if ``bar`` is a progress bar."""
    if hasattr(bar, "set_postfix"):
        bar.set_postfix(sparsity=f"{sparsity:.1%}", error=f"{error:.3g}")
