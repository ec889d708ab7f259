"""Amounts that lose least for a sparsity of all, from what each layer loses alone."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal

from torchprune_ext._checks import check_sparsity
from torchprune_ext._statistics import Key
from torchprune_ext._tables import percent
from torchprune_ext.workflow.apportion import level, nearest
from torchprune_ext.workflow.sensitivity import Sensitivity

__all__ = ["from_sensitivity"]

ROUNDING = 1e-9  # of a difference of metrics, relative to these


def from_sensitivity(
    curve: Sensitivity,
    target_sparsity: float,
    max_drop: float = math.inf,
    *,
    cost: Literal["parameters", "macs"] = "parameters",
) -> dict[Key, float]:
    """Return amounts for a sparsity of all at which the layer that loses most loses least.

    All layers are pruned as far as a common drop of the metric allows, and the drop is the smallest with which the
    target is met. The drop of a layer is that of ``curve`` in straight lines between what was measured, from 0 at a
    sparsity of 0, and never less than at a lower sparsity; beyond the largest sparsity measured, no layer is pruned.
    Where a layer could go further without losing more, all that can go the same part of the way. Drops were measured
    one layer at a time: together they cost more, so evaluate the result.

    Args:
        curve: what :func:`.sensitivity.sensitivity` returned.
        target_sparsity: fraction of all entries of these layers that shall be pruned, or, by ``cost``, of their
            multiplications, in [0, 1).
        max_drop: most that a single layer may lose, in units of the metric.
        cost: ``"parameters"`` or ``"macs"``, the multiplications of the evaluation.

    Returns:
        ``{(module, name): sparsity}``, in whole units, that add up to ``round(target_sparsity * total)`` exactly;
        where units cost different amounts, to that or more by less than one unit.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, the target cannot be met within ``max_drop``, or the multiplications of a
            layer are not known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.arange(1.0, 17.0).view(4, 4) / 16)
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
        >>> x, params = torch.ones(1, 4), tpe.prunable_parameters(model)
        >>> curve = tpe.allocation.sensitivity(model, lambda model: model(x).item(), params, progress=False)
        >>> list(tpe.allocation.from_sensitivity(curve, 0.6).values())  # 12 of 20
        [0.625, 0.5]
    """
    if not isinstance(curve, Sensitivity):
        raise TypeError(f"curve is a {type(curve).__name__}. Pass what allocation.sensitivity(...) returned.")
    check_sparsity("target_sparsity", target_sparsity)
    if isinstance(max_drop, bool) or not isinstance(max_drop, numbers.Real):
        raise TypeError(f"max_drop={max_drop!r} is a {type(max_drop).__name__}. Pass a number, e.g. 0.02.")
    if not max_drop >= 0:
        raise ValueError(f"max_drop={max_drop!r} is not a drop. Pass a number >= 0, in units of the metric.")
    costs = _costs(curve, cost)
    knots = [_knots(curve.drops(layer.path)) for layer in curve.layers]
    goal = round(target_sparsity * sum(costs))

    def ideals(drop: float) -> list[float]:
        return [_furthest(each, drop) * total for each, total in zip(knots, costs, strict=True)]

    exact = ROUNDING * max(abs(metric) for metric in (curve.dense, *(row.metric for row in curve.rows)))
    most = min(float(max_drop) + exact, max(each[-1][1] for each in knots))  # 0.98 - 0.96 is more than 0.02
    if sum(ideals(most)) < goal * (1 - 1e-12):
        _refuse(curve, knots, costs, target_sparsity, most, f"max_drop={max_drop!r}", cost)
    ideal = level(ideals, goal, -1.0, most)  # at a negative drop nothing goes
    per_unit = [total // max(layer.units, 1) for layer, total in zip(curve.layers, costs, strict=True)]
    kept = [max(price, 1) for price in per_unit]
    limits = [
        round(each[-1][0] * layer.units) if price else 0
        for each, layer, price in zip(knots, curve.layers, per_unit, strict=True)
    ]
    counts = nearest([part / price for part, price in zip(ideal, kept, strict=True)], goal, limits, kept)
    return {
        key: count / max(layer.units, 1)
        for layer, count in zip(curve.layers, counts, strict=True)
        for key in layer.keys
    }


def _refuse(
    curve: Sensitivity,
    knots: Sequence[Sequence[tuple[float, float]]],
    costs: Sequence[int],
    target_sparsity: float,
    most: float,
    told: str,
    cost: str,
) -> None:
    """Raise: the target cannot be met."""

    def reach(drop: float) -> float:
        gone = sum(_furthest(each, drop) * total for each, total in zip(knots, costs, strict=True))
        return gone / max(sum(costs), 1)

    furthest = ", ".join(
        f"{layer.path} {percent(_furthest(each, most))}" for layer, each in zip(curve.layers, knots, strict=True)
    )
    low, high = most, max(each[-1][1] for each in knots)
    remedy = "Measure larger sparsities, or pass a smaller target"
    if reach(high) >= target_sparsity:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if reach(middle) < target_sparsity else (low, middle)
        short = float(f"{high * 1.005:.3g}")  # rounded up
        remedy = f"max_drop={max(short, high)!r} is enough; or pass a smaller target"
    raise ValueError(
        f"target_sparsity={target_sparsity!r} of the {cost} is out of reach: with {told} the layers go "
        f"as far as {reach(most):.4f} ({furthest}). {remedy}."
    )


def _costs(curve: Sensitivity, cost: str) -> list[int]:
    """Return what each layer costs as a whole."""
    if cost == "parameters":
        return [layer.entries for layer in curve.layers]
    if cost != "macs":
        raise ValueError(f"cost={cost!r} is unknown. Pass 'parameters' or 'macs'.")
    unknown = [layer.path for layer in curve.layers if layer.macs is None]
    if unknown:
        raise ValueError(
            f"cost='macs': the multiplications of {unknown} are not known, as these are no weights of a Linear, a "
            "convolution or the like, or their module was not called. Leave them out, or pass cost='parameters'."
        )
    return [layer.macs or 0 for layer in curve.layers]


def _knots(drops: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return sparsities in rising order, and drops that do not fall, from (0, 0) on."""
    knots = [(0.0, 0.0)]
    for reached, drop in sorted(drops):
        worst = max(drop, knots[-1][1])
        if reached == knots[-1][0]:
            knots[-1] = (reached, worst if reached else 0.0)
        else:
            knots.append((reached, worst))
    return knots


def _furthest(knots: Sequence[tuple[float, float]], drop: float) -> float:
    """Return the largest sparsity at which the lines through ``knots`` are at ``drop`` or below; 0 for less than 0."""
    if drop < 0:
        return 0.0
    place = max(i for i, (_, lost) in enumerate(knots) if lost <= drop)
    here, lost = knots[place]
    if place + 1 == len(knots):
        return here
    there, more = knots[place + 1]
    return here + (there - here) * (drop - lost) / (more - lost)
