"""Prune a little by one threshold over the whole model and re-fit all of it, again and again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_whole, errors_about
from torchprune_ext._host import Target
from torchprune_ext._loading import PassOptions, with_progress
from torchprune_ext._ranks import Ranks
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.fitting import Fits, Task, tell
from torchprune_ext.compensation.goals import Sparsity, goals_of
from torchprune_ext.compensation.reference import Dense
from torchprune_ext.global_pruning.budget import Budget
from torchprune_ext.global_pruning.entries import global_unstructured
from torchprune_ext.schedules import geometric_mean

SAME = (
    "Let it return the same on all ranks: pass process_group= to the calls of calibration in it, or add up what each "
    "rank finds by torch.distributed.all_reduce."
)
Criterion = Callable[[nn.Module], Mapping[Key, Tensor]]


def prune_in_rounds(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    criterion: Criterion,
    *,
    target_sparsity: Sparsity,
    steps: int = 10,
    dense: Dense | None = None,
    create_bias: bool = False,
    dense_inputs: float = 1.0,
    **options: Unpack[PassOptions],
) -> Fits:
    """Prune by one threshold over all listed tensors and re-fit them, in rounds, without training.

    Each round computes ``criterion(model)``, prunes by it as :func:`.global_unstructured` does, and re-fits all layers
    as :func:`.compensate` does. The kept fraction falls geometrically, and every round is fitted to the same reference
    model.

    Args:
        model: as for :func:`.compensate`, and so are ``loader``, ``params`` and the arguments not listed here.
        loader: batches.
        params: ``(module, name)`` pairs.
        criterion: from the model to scores of all listed tensors, ``{(module, name): tensor}``; for example a function
            that calls one of :mod:`torchprune_ext.calibration`.
        target_sparsity: fraction of the entries that shall be pruned in the end, in [0, 1); or one for each listed
            tensor, as ``{(module, name): fraction}``, and then each has a threshold of its own.
        steps: number of rounds.
        dense: the reference model, see :func:`.compensate`.
        create_bias: give layers without a bias one.
        dense_inputs: weight of a layer's inputs in the reference model, see :func:`.compensate`.
        **options: see :class:`.PassOptions`.

    Returns:
        The error of each layer before and after the last re-fit, as :class:`.Fit`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`.compensate`, or an argument out of range. Nothing is changed then.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> params, data = tpe.prunable_parameters(model), [(torch.randn(64, 8), None)]
        >>> def magnitude(model):
        ...     return {(module, name): module.weight.detach().abs() for module, name in params}
        >>> fits = tpe.prune_in_rounds(model, data, params, magnitude, target_sparsity=0.75, steps=3, progress=False)
        >>> sum(int(layer.weight_mask.sum()) for layer, _ in params)  # of 96
        24
    """
    ranks = Ranks(options.get("process_group"))
    with ranks.together():
        if not callable(criterion):
            raise TypeError(
                f"criterion={criterion!r} is a {type(criterion).__name__}. Pass a function of the model that returns "
                "{(module, name): scores}; for the criteria that have names, see prune_and_compensate."
            )
        check_whole("steps", steps, 1)
        task = Task.of(model, loader, params, dense, options, create_bias=create_bias, dense_inputs=dense_inputs)
        goals = goals_of(task.targets, target_sparsity)
        if not all(goal < 1 for goal in goals.values()):
            raise ValueError(f"target_sparsity={target_sparsity!r} leaves nothing to re-fit. Pass less than 1.0.")
        budgets = [([key], goal) for key, goal in goals.items()]
        if not isinstance(target_sparsity, Mapping):
            budgets = [(list(goals), target_sparsity)]
        left = []
        for keys, goal in budgets:
            alive, total = _counts(Target.of(*key) for key in keys)
            Budget(None, goal, 1).count(alive, total, "entries")  # raises where more is pruned already
            left.append(alive / max(total, 1))
    task.agree("prune_in_rounds", goals=goals, each=len(budgets), steps=steps)
    fits = Fits()
    with all_or_nothing(target.module for target in task.targets):
        bar: Any = with_progress(range(1, steps + 1), "prune and compensate", None, options.get("progress"))
        for step in bar:
            with ranks.together():
                scores = _scores(criterion, model, task)
            task.agree_on("the scores of criterion(model)", scores, SAME)
            for (keys, goal), share in zip(budgets, left, strict=True):
                now = 1 - geometric_mean(share, 1 - goal, step / steps) if step < steps else goal
                with ranks.together(), errors_about("criterion(model)"):
                    global_unstructured(keys, target_sparsity=now, importance_scores={key: scores[key] for key in keys})
            found, fits = task.fit(progress=False)
            task.install(found, lambda _: None)
            alive, total = _counts(fitted.target for fitted in found)
            tell(bar, 1 - alive / max(total, 1), max(fit.after for fit in fits.values()))
    return fits


def _scores(criterion: Criterion, model: nn.Module, task: Task) -> Mapping[Key, Tensor]:
    """Return the scores of all listed tensors."""
    scores = criterion(model)
    if not isinstance(scores, Mapping):
        raise TypeError(f"criterion(model) gave a {type(scores).__name__}. Let it return {{(module, name): scores}}.")
    for target in task.targets:
        if (target.module, target.name) not in scores:
            raise ValueError(f"criterion(model) gave no scores for {target.where}. Let it score all of params.")
    return scores


def _counts(targets: Iterable[Target]) -> tuple[int, int]:
    """Return how many entries of ``targets`` are not pruned, and how many there are."""
    sizes = [
        (t.parameter.numel() if t.mask is None else int(t.mask.count_nonzero()), t.parameter.numel()) for t in targets
    ]
    return sum(alive for alive, _ in sizes), sum(total for _, total in sizes)
