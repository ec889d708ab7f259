"""How a budget of multiplications or parameters is shared among groups of units. No modules, no data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import prod

UNEVEN = 1.5  # times its even share is the most that a group may lose


@dataclass(frozen=True, slots=True)
class Price:
    """What a tensor takes of a budget: so much for each entry that is left of it.

    Args:
        each: price of an entry.
        shape: of the tensor, with all units.
        losses: ``(axis, group, places)``: how many places along an axis go with a unit of a group.
    """

    each: float
    shape: tuple[int, ...]
    losses: tuple[tuple[int, int, int], ...]

    def left(self, gone: Sequence[int]) -> float:
        """Return the price of what is left when so many units of each group are ``gone``."""
        shape = list(self.shape)
        for axis, group, places in self.losses:
            shape[axis] -= places * gone[group]
        return self.each * prod(shape)


@dataclass(frozen=True, slots=True)
class Shares:
    """What the units of a model take of a budget, and how many of each group may stay.

    Args:
        prices: of all tensors that lose something with a unit.
        rest: the price of all else.
        sizes: number of units of each group.
        counts: of each group, how many units it may keep, falling from what it has now.
    """

    prices: Sequence[Price]
    rest: float
    sizes: Sequence[int]
    counts: Sequence[Sequence[int]]

    @property
    def most(self) -> list[int]:
        """The units of each group now."""
        return [counts[0] for counts in self.counts]

    @property
    def fewest(self) -> list[int]:
        """The fewest units that each group may keep."""
        return [counts[-1] for counts in self.counts]

    def total(self, kept: Sequence[int]) -> float:
        """Return the price of what is left when so many units of each group are ``kept``."""
        gone = [size - left for size, left in zip(self.sizes, kept, strict=True)]
        return self.rest + sum(price.left(gone) for price in self.prices)

    def fraction(self, kept: Sequence[int]) -> float:
        """Return which fraction that is of the price of all units."""
        return self.total(kept) / (self.total(self.sizes) or 1.0)

    def can_reach(self, target: float) -> bool:
        """Return whether it is possible that at most ``target`` of the price is left."""
        return self.total(self.fewest) <= self._goal(target)

    def near_even(self, target: float) -> "Shares":
        """Return the same with fewer counts: no group loses more than ``UNEVEN`` times what all lose in equal shares.

        Costs are errors of single layers, seen on few data, and say only so much about the whole model.

        Args:
            target: a fraction that can be reached.
        """
        goal = self._goal(target)
        walk = _Walk(self, [[0.0] * (size + 1) for size in self.sizes])
        ahead = [(-walk.after(group), group) for group, counts in enumerate(self.counts) if len(counts) > 1]
        heapify(ahead)
        while walk.left > goal and ahead:
            _, group = heappop(ahead)
            if walk.step(group, 1)[0] > 0:
                walk.take(group, 1)
                if walk.place[group] + 1 < len(self.counts[group]):
                    heappush(ahead, (-walk.after(group), group))
        moved = [(left, size) for left, size, now in zip(walk.kept, self.sizes, self.most, strict=True) if left < now]
        lost = max((1 - left / size for left, size in moved), default=0.0)
        least = [size * (1 - UNEVEN * lost) for size in self.sizes]
        counts = [
            [count for count in counts if count >= bound or count >= left]
            for counts, bound, left in zip(self.counts, least, walk.kept, strict=True)
        ]
        return replace(self, counts=counts)

    def _goal(self, target: float) -> Fraction:
        return Fraction(str(float(target))) * Fraction(self.total(self.sizes))

    def spread(self, target: float, costs: Sequence[Sequence[float]]) -> list[int]:
        """Return how many units each group keeps so that at most ``target`` of the price is left.

        Again and again the step is taken, from one of a group's counts to the next, that costs least for what it saves.
        Then those that turn out not to be needed are taken back, the dearest first.

        Args:
            target: a fraction that can be reached.
            costs: of each group, what it costs when the first so many of its units go.
        """
        goal = self._goal(target)
        walk = _Walk(self, costs)
        ahead = {group: walk.step(group, 1) for group in range(len(self.sizes))}
        while walk.left > goal:
            open_steps = {group: rise / saved for group, (saved, rise) in ahead.items() if saved > 0}
            if not open_steps:
                break  # but for rounding it is reached
            group = min(open_steps, key=open_steps.__getitem__)
            walk.take(group, 1)
            ahead |= {other: walk.step(other, 1) for other in walk.near[group]}
        while True:
            back = {group: walk.step(group, -1) for group in range(len(self.sizes))}
            back = {group: step for group, step in back.items() if step[0] < 0 and walk.left - step[0] <= goal}
            if not back:
                return walk.kept
            walk.take(min(back, key=lambda group: back[group][1]), -1)


class _Walk:
    """Goes from count to count.

    Args:
        shares: what there is to share.
        costs: of each group, what it costs when the first so many of its units go.
    """

    def __init__(self, shares: Shares, costs: Sequence[Sequence[float]]) -> None:
        self.shares, self.costs = shares, costs
        self.place = [0] * len(shares.sizes)
        self.gone = [size - left for size, left in zip(shares.sizes, self.kept, strict=True)]
        self.left = shares.total(self.kept)
        self.touching: list[list[Price]] = [[] for _ in shares.sizes]
        for price in shares.prices:
            for group in {group for _, group, _ in price.losses}:
                self.touching[group].append(price)
        self.near = [
            {group, *(g for price in prices for _, g, _ in price.losses)} for group, prices in enumerate(self.touching)
        ]

    @property
    def kept(self) -> list[int]:
        """How many units each group keeps."""
        return [counts[place] for counts, place in zip(self.shares.counts, self.place, strict=True)]

    def after(self, group: int) -> float:
        """Return which fraction of its units a group keeps after the next step."""
        return self.shares.counts[group][self.place[group] + 1] / self.shares.sizes[group]

    def step(self, group: int, by: int) -> tuple[float, float]:
        """Return what going on ``by`` counts saves, and what it costs; of going back less than 0; 0 where it ends."""
        counts, place = self.shares.counts[group], self.place[group]
        if not 0 <= place + by < len(counts):
            return 0.0, 0.0
        fewer, gone = counts[place] - counts[place + by], counts[0] - counts[place]
        before = sum(price.left(self.gone) for price in self.touching[group])
        self.gone[group] += fewer
        after = sum(price.left(self.gone) for price in self.touching[group])
        self.gone[group] -= fewer
        return before - after, self.costs[group][gone + fewer] - self.costs[group][gone]

    def take(self, group: int, by: int) -> None:
        """Go on ``by`` counts."""
        self.left -= self.step(group, by)[0]
        counts = self.shares.counts[group]
        self.gone[group] += counts[self.place[group]] - counts[self.place[group] + by]
        self.place[group] += by
