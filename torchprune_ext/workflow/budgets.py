"""A budget for each tensor, where there is not one for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torchprune_ext._checks import check_amount, errors_about
from torchprune_ext._ranks import Ranks
from torchprune_ext._statistics import Key
from torchprune_ext.global_pruning.budget import Budget, Listed
from torchprune_ext.selection import Cut, Scores, select_smallest
from torchprune_ext.workflow.apportion import proportional


@dataclass(frozen=True, slots=True)
class Apart(Budget):
    """A budget for each tensor.

    Args:
        shares: what each tensor gives; None if all give the same.
        target_sparsity: of all tensors together, to which ``shares`` are scaled; None if they are meant as they are.
    """

    shares: Mapping[Key, float] | None = None

    compares: ClassVar[bool] = False

    def check(self) -> None:
        """Raise unless the floor is in range."""
        check_amount(self.min_keep, "min_keep")

    def covers(self, listed: Listed) -> bool:
        """Return whether ``listed`` is to be pruned."""
        return self.shares is None or any(key in self.shares for key in listed.pairs())

    def share(self, listed: Listed) -> float:
        """Return what ``listed`` gives."""
        if self.shares is None:
            return 1.0
        found = {self.shares[key] for key in listed.pairs() if key in self.shares}
        if len(found) > 1:
            raise ValueError(
                f"{listed.where} is tied, and its names have different amounts, {sorted(found)}. Give it one."
            )
        return float(found.pop())

    def cuts(self, groups: Sequence[Listed], parts: Sequence[Scores], units: str, ranks: Ranks) -> list[Cut]:
        """Return the cuts that take from each of ``parts`` what it gives."""
        goals = self._as_they_are if self.target_sparsity is None else self._scaled
        return [
            select_smallest([part], goal - (len(part) - part.count_alive()))[0]
            for part, goal in zip(parts, goals(groups, parts, units), strict=True)
        ]

    def _as_they_are(self, groups: Sequence[Listed], parts: Sequence[Scores], units: str) -> list[int]:
        """Return how many units of each tensor shall be pruned in the end."""
        goals = []
        for listed, part in zip(groups, parts, strict=True):
            with errors_about(listed.where):
                own = Budget(None, self.share(listed), self.min_keep, self.param)
                alive = part.count_alive()
                k = own.count(alive, len(part), units)
                own.check_floor(k, alive, own.floor(alive, len(part)), units)
                goals.append(len(part) - alive + k)
        return goals

    def _scaled(self, groups: Sequence[Listed], parts: Sequence[Scores], units: str) -> list[int]:
        """Return how many units of each tensor shall be pruned in the end, so that all add up to the target."""
        sizes = [len(part) for part in parts]
        alive = [part.count_alive() for part in parts]
        dead = [size - left for size, left in zip(sizes, alive, strict=True)]
        floors = [self.floor(left, size) for left, size in zip(alive, sizes, strict=True)]
        k = self.count(sum(alive), sum(sizes), units)
        self.check_floor(k, sum(alive), sum(floors), units)
        goal = sum(dead) + k
        weights = [self.share(listed) * size for listed, size in zip(groups, sizes, strict=True)]
        most = [size - floor for size, floor in zip(sizes, floors, strict=True)]
        if goal > sum(top for top, weight in zip(most, weights, strict=True) if weight):
            raise ValueError(f"{self.asked()}: scope= takes all of it from tensors that have less. Raise its zeros.")
        counts = proportional(weights, goal, most)
        for listed, count, weight, size, gone in zip(groups, counts, weights, sizes, dead, strict=True):
            if weight * goal > size * sum(weights):
                raise ValueError(
                    f"{listed.where}: {self.asked()} is more than scope= adds up to, {sum(weights) / sum(sizes):.4f}, "
                    f"and scaled to it, takes more than the {size} {units} of this tensor. Ask for less."
                )
            if gone > count:
                raise ValueError(
                    f"{listed.where}: {self.asked()} takes {count} of the {size} {units} of this tensor, but {gone} "
                    "are pruned already. Ask for more, or undo() it first."
                )
        return counts

    def arguments(self, listed: Listed | None = None) -> dict[str, Any]:
        """Return what the history of ``listed`` tells of this."""
        if self.target_sparsity is not None:
            how: Any = "layer" if self.shares is None else ...
            return {self.param: self.target_sparsity, "scope": how, "min_keep": self.min_keep}
        return {self.param: ... if listed is None else self.share(listed), "min_keep": self.min_keep}
