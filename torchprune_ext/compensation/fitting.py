"""Fit the listed layers of a model in one pass over the data: what to install in each, and how far off it is.

Nothing here changes the model: what a pass has found is returned, and whoever asked for it installs it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_whole
from torchprune_ext._host import Target
from torchprune_ext._layers import Layer
from torchprune_ext._runs import Key, Options, calibrating, wide, with_progress
from torchprune_ext.compensation.solvers import Problem, refit
from torchprune_ext.compensation.streams import Pass, Solution
from torchprune_ext.masks import finish

SampleMask = Callable[[Any], Tensor]
Decide = Callable[[Layer, Problem, Tensor, Tensor], tuple[Tensor, Tensor]]  # from weights and mask to new ones


@dataclass(frozen=True, slots=True)
class Fit:
    """What a layer's outputs are off the dense model's, in squares relative to their variation, on the data given.

    Args:
        before: with what was pruned merely zeroed.
        after: with the survivors re-fitted.
    """

    before: float
    after: float


Fits = dict[Key, Fit]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a pass has found for one target: its mask, all its values and, if it is new, the bias."""

    target: Target
    mask: Tensor
    weight: Tensor
    bias: Tensor | None


def fit_layers(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[Target],
    dense: Sequence[tuple[Tensor, Tensor | None]],
    decide: Decide | None,
    sample_mask: SampleMask | None,
    free: Sequence[bool],
    options: Options,
) -> tuple[list[Fitted], Fits]:
    """Fit all layers in sequence and return what to install; changes nothing.

    Args:
        model: the model.
        loader: batches.
        targets: the tensors to fit.
        dense: weight and bias that the dense stream has for each.
        decide: from a layer, its problem, its weights and mask to new ones; None to re-fit what the mask leaves.
        sample_mask: which samples count.
        free: whether the bias of each layer is fitted too.
        options: how the data is read.
    """
    fits: Fits = {}
    masks: dict[Key, Tensor] = {}
    if options.get("process_group") is not None:
        raise ValueError("process_group= is not supported here: each layer is fitted in one process. Leave it out.")
    raw = taken(loader, options)
    rows = [None if sample_mask is None else _bool_mask(sample_mask(batch)) for batch in raw]
    quiet: Options = {**options, "progress": False}  # the bar counts layers
    with calibrating(model, [(target.module, target.name) for target in targets], quiet) as run:
        layers = [
            Layer(Target.of(target.module, target.name), name, *values, bias)
            for target, name, values, bias in zip(targets, run.names, dense, free, strict=True)
        ]
        given = dict(zip(layers, targets, strict=True))
        bar = with_progress(layers, "compensate", None, options.get("progress"))
        steps = iter(bar)

        def solve(layer: Layer, problem: Problem) -> Solution:
            weight, mask = given[layer].weight(), given[layer].mask
            weight = layer.matrix(weight).to(wide(weight.dtype))
            alive = weight.new_ones(()).expand_as(weight) if mask is None else layer.matrix(mask != 0).to(weight)
            bias = layer.bias_rows()
            if decide is None:
                found, keep = refit(problem, weight, alive), alive
            else:
                found, keep = decide(layer, problem, weight, alive)
            start = weight * keep
            rounded = found.to(layer.dense.dtype)
            best = problem.best_bias(rounded).to(layer.dense.dtype) if layer.bias else None
            before = problem.error(start, bias if layer.bias else None)
            after = problem.error(rounded, None if best is None else best.double())
            # Rounding to the model's precision may have cost more than was gained, or gone beyond its range.
            worse = ~(after <= before) if decide is None else ~after.isfinite()
            rounded[worse] = start[worse].to(rounded.dtype)
            after = torch.where(worse, before, after)
            if best is not None:
                best = torch.where(worse, bias, best.double()).to(best.dtype)
            key, whole = (layer.module, layer.name), float(problem.variation.sum()) or 1.0
            fits[key] = Fit(float(before.sum()) / whole, float(after.sum()) / whole)
            masks[key] = layer.shaped(keep)
            next(steps, None)
            tell(bar, 1 - float(keep.mean()), fits[key].after)
            return layer.shaped(rounded), None if best is None else best.reshape(-1)

        walk = Pass(run, layers, solve)
        walk.over(list(run.batches(raw, "")), rows)
        next(steps, None)
    new = []
    for layer, target in zip(layers, targets, strict=True):
        weight, bias = walk.solved[layer]
        like = target.parameter.detach() if target.mask is None else target.mask
        mask = finish(masks[layer.module, layer.name].to(like.dtype), like)
        values = torch.where(mask != 0, weight, target.parameter.detach())
        new.append(Fitted(target, mask, values, bias))
    return new, {(target.module, target.name): fits[target.module, target.name] for target in targets}


def dense_values(targets: Sequence[Target]) -> list[tuple[Tensor, Tensor | None]]:
    """Return the values under the masks, and the biases."""
    biases = [Target.found(target.module, "bias") for target in targets]
    return [
        (target.parameter.detach(), None if bias is None else bias.parameter.detach())
        for target, bias in zip(targets, biases, strict=True)
    ]


def taken(loader: Iterable[Any], options: Options) -> list[Any]:
    """Return the batches that the options ask for."""
    most = options.get("max_batches")
    if most is not None:
        check_whole("max_batches", most, 1)
    with torch.random.fork_rng() if options.get("keep_rng") else nullcontext():
        return list(islice(loader, most))


def _bool_mask(mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"sample_mask gave {what}. Let it return a bool tensor, True where a sample counts.")
    return mask


def free_biases(model: nn.Module, targets: Sequence[Target], create: bool) -> list[bool]:
    """Return whether the bias of each layer may be changed: not if it is pruned, shared, or computed."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = []
    for target in targets:
        bias = Target.found(target.module, "bias")
        if bias is None:
            found.append(create and "bias" in target.module._parameters)
        else:
            found.append(bias.mask is None and owners[id(bias.parameter)] == 1)
    return found


def tell(bar: Any, sparsity: float, error: float) -> None:
    """Show what was reached, if ``bar`` is a progress bar."""
    if hasattr(bar, "set_postfix"):
        bar.set_postfix(sparsity=f"{sparsity:.1%}", error=f"{error:.3g}")
