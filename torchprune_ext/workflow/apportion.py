"""Whole numbers that add up exactly, as near as they can be to what each part should have."""

import math
from collections.abc import Callable, Sequence

HALVINGS = 200


def nearest(ideal: Sequence[float], budget: int, most: Sequence[int], costs: Sequence[int] | None = None) -> list[int]:
    """Return a whole number for each of ``ideal``, rounded such that together they cost ``budget``.

    The method of largest remainders: all are rounded down, and what is missing goes to those that have lost most by
    it, among equals to the first. So each is rounded up or down, unless ``most`` stands in the way.

    Args:
        ideal: what each part should have; together they cost about ``budget``.
        budget: what they shall cost. Where costs differ, it is reached, and exceeded by less than the last unit costs.
        most: what each may have at most; all together cost at least ``budget`` (not checked).
        costs: what a unit of each costs, > 0; by default 1.

    Example:
        >>> nearest([1.5, 2.25, 0.25], 4, most=[9, 9, 9])
        [2, 2, 0]
    """
    costs = [1] * len(ideal) if costs is None else costs
    counts = [min(math.floor(part), high) for part, high in zip(ideal, most, strict=True)]
    spent = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    while spent > budget:  # the sum of ideals was rounded up
        i = max(filter(counts.__getitem__, range(len(counts))), key=lambda i: (counts[i] - ideal[i], i))
        counts[i], spent = counts[i] - 1, spent - costs[i]
    while spent < budget and (free := [i for i in range(len(ideal)) if counts[i] < most[i]]):
        for i in sorted(free, key=lambda i: (counts[i] - ideal[i], i)):
            if spent < budget:
                counts[i], spent = counts[i] + 1, spent + costs[i]
    return counts


def proportional(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Return whole numbers in proportion to ``weights`` that add up to ``total`` and never fall as it rises.

    The divisor method of Webster and Sainte-Laguë: units are given out one by one, the next to the part for which
    ``(count + 1/2) / weight`` is least, among equals to the first. (Largest remainders may take a unit back as the
    total rises, the Alabama paradox.)

    Args:
        weights: what the parts should have, up to a factor; >= 0, and what has 0 gets nothing.
        total: how many units, at most what those of positive weight can have (not checked).
        most: what each part may have at most.

    Example:
        >>> [proportional([3.0, 2.0, 1.0], total, most=[9, 9, 9]) for total in (1, 2, 3, 6)]
        [[1, 0, 0], [1, 1, 0], [2, 1, 0], [3, 2, 1]]
    """

    def given(level: float) -> list[int]:
        """Return how many units of each part have a quotient of at most ``level``."""
        counts = []
        for weight, high in zip(weights, most, strict=True):
            count = max(min(math.floor(weight * level + 0.5), high), 0) if weight else 0
            while weight and count < high and (count + 0.5) / weight <= level:
                count += 1
            while weight and count and (count - 0.5) / weight > level:  # where the product was rounded up
                count -= 1
            counts.append(count)
        return counts

    low, high = 0.0, max(((top + 0.5) / weight for weight, top in zip(weights, most, strict=True) if weight), default=0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sum(given(middle)) <= total else (low, middle)
    counts = given(low)
    for _ in range(total - sum(counts)):
        free = [i for i, weight in enumerate(weights) if weight and counts[i] < most[i]]
        counts[min(free, key=lambda i: ((counts[i] + 0.5) / weights[i], i))] += 1
    return counts


def level(ideals: Callable[[float], list[float]], budget: float, low: float, high: float) -> list[float]:
    """Return the ``ideals`` of the level at which their sum is ``budget``.

    Args:
        ideals: from a level to what each part should have, none of which falls as the level rises.
        budget: a sum between those at ``low`` and ``high``.
        low: level at which the sum is at most ``budget``.
        high: level at which it is at least ``budget``.

    Returns:
        What each part should have. Where the sum jumps past ``budget`` at a level, all parts go the same fraction of
        their jumps.

    Example:
        >>> found = level(lambda depth: [min(depth, 1.0), min(2 * depth, 4.0)], 4.0, 0.0, 4.0)
        >>> [round(part, 9) for part in found]
        [1.0, 3.0]
    """
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sum(ideals(middle)) < budget else (low, middle)
    below, above = ideals(low), ideals(high)
    jump = sum(above) - sum(below)
    part = min(max((budget - sum(below)) / jump, 0.0), 1.0) if jump > 0 else 1.0
    return [down + part * (up - down) for down, up in zip(below, above, strict=True)]
