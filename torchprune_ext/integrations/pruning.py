"""What the callbacks of all trainers share: a pruner that is made when the trainer has the model."""

from collections.abc import Callable
from typing import Any

from torch import nn

from torchprune_ext._checks import errors_about
from torchprune_ext.discovery import prunable_parameters
from torchprune_ext.global_pruning.budget import Params
from torchprune_ext.patterns import Unit
from torchprune_ext.schedules import Schedule
from torchprune_ext.workflow.gradual import Gradual, GradualPruner
from torchprune_ext.workflow.targets import Scope, check_unit

Found = Params | Callable[[nn.Module], Params] | None


def params_of(params: Found, model: nn.Module) -> Params:
    """Return the ``(module, name)`` pairs of ``model`` that are meant."""
    if params is None:
        return prunable_parameters(model)
    return params(model) if callable(params) else params


class Pruning:
    """A :class:`.GradualPruner` of a model that is known later."""

    def __init__(
        self,
        schedule: Schedule,
        params: Found = None,
        criterion: Gradual = "magnitude",
        unit: Unit | None = None,
        *,
        scope: Scope = "global",
        min_keep: float = 1,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule={schedule!r} is a {type(schedule).__name__}. Pass one of torchprune_ext.schedules, e.g. "
                "cubic(start=0, end=1000, every=100, final=0.9), or one_shot(step=0, sparsity=0.9)."
            )
        check_unit(unit)
        self.schedule = schedule
        self._params, self._rest = params, {"criterion": criterion, "unit": unit, "scope": scope, "min_keep": min_keep}
        self._pruner: GradualPruner | None = None
        self._sparsity = 0.0

    @property
    def pruner(self) -> GradualPruner:
        """The pruner at work.

        Raises:
            RuntimeError: no training has begun.
        """
        if self._pruner is None:
            raise RuntimeError("There is no pruner yet: it is made when the trainer begins to train the model.")
        return self._pruner

    @property
    def sparsity(self) -> float:
        """The fraction of all units of ``params`` that was pruned after the last step; counted at updates only."""
        return self._sparsity

    def _make(self, model: nn.Module) -> None:
        """Make the pruner of ``model``, unless there is one."""
        if self._pruner is None or self._pruner.model is not model:
            rest: dict[str, Any] = self._rest
            self._pruner = GradualPruner(model, params_of(self._params, model), self.schedule, **rest)
            self._sparsity = self._pruner.sparsity

    def _resume(self, state: dict[str, Any]) -> None:
        """Go on from where a checkpoint was saved."""
        with errors_about("PruningCallback"):
            self.pruner.load_state_dict(state)
        self._sparsity = self.pruner.sparsity

    def _step(self) -> None:
        """Go on by one step of the optimizer."""
        number = self.pruner.steps
        self.pruner.step()
        if number == 0 or self.schedule.is_update(number):
            self._sparsity = self.pruner.sparsity
