"""How much goes, in the words that all calls take: what the examples that compare ways of pruning share."""

from typing import Any

from torch import Tensor, nn

import torchprune_ext as tpe

Params = list[tuple[nn.Module, str]]
Goal = tpe.NM | float  # n of m, or how much of each row goes
GOALS: dict[str, Goal] = {"50%": 0.5, "2:4": tpe.NM(2, 4), "60%": 0.6, "70%": 0.7}


def asked(goal: Goal) -> dict[str, Any]:
    """Return the goal as the calls take it."""
    return {"pattern": goal} if isinstance(goal, tpe.NM) else {"target_sparsity": goal}


def by_rows(params: Params, goal: Goal, scores: dict[tuple[nn.Module, str], Tensor] | None = None) -> None:
    """Prune each row by ``scores``, by default by magnitude; nothing is re-fitted."""
    for module, name in params:
        inputs = module.get_parameter(name).shape[1]
        n, m = (goal.n, goal.m) if isinstance(goal, tpe.NM) else (round(inputs * (1 - goal)), inputs)
        tpe.nm_structured(module, name, n, m, importance_scores=None if scores is None else scores[module, name])
