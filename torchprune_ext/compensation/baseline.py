"""SparseGPT as published: the baseline that re-fitting by least squares is compared with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._host import Target
from torchprune_ext._layers import Layer
from torchprune_ext._loading import PassOptions
from torchprune_ext._ranks import Ranks
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.fitting import Fits, Task
from torchprune_ext.compensation.goals import Sparsity, along_inputs, check_goal, goals_of
from torchprune_ext.compensation.reference import Dense
from torchprune_ext.compensation.solvers import BLOCK, Problem, prune_columns
from torchprune_ext.masks import nm_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import NM


def sparsegpt(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    target_sparsity: Sparsity | None = None,
    pattern: NM | None = None,
    dense: Dense | None = None,
    **options: Unpack[PassOptions],
) -> Fits:
    """Prune as SparseGPT does: column by column, each error made up for by the columns behind it; the baseline.

    As in the paper, biases stay, and weights of inputs that are always 0 become 0. Weights that were re-fitted or
    trained before are pruned as they are; ``dense`` only tells what the errors are about.

    Args:
        model: as for :func:`.compensate`, and so are ``loader`` and ``params``.
        loader: batches.
        params: ``(module, name)`` pairs.
        target_sparsity: fraction of the entries of every 128 columns of each weight that shall be pruned in the end,
            what is pruned already counted in; or one for each listed tensor, as ``{(module, name): fraction}``.
        pattern: instead of it, ``NM(n, m)`` along the input features or channels.
        dense: the reference model, see :func:`.compensate`.
        **options: see :class:`.PassOptions`.

    Returns:
        The error of each layer before and after, as :class:`.Fit`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`.compensate`, or an argument out of range. Nothing is changed then.

    Source: Frantar & Alistarh 2023, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
    arXiv:2301.00774.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> layer, data = nn.Linear(8, 4), [(torch.randn(64, 8), None)]
        >>> fits = tpe.sparsegpt(layer, data, [(layer, "weight")], pattern=tpe.NM(2, 4), progress=False)
        >>> int(layer.weight_mask.sum())
        16
    """
    with Ranks(options.get("process_group")).together():
        check_goal(target_sparsity, pattern)
        task = Task.of(model, loader, params, dense, options, biases=False, dense_inputs=0, sums=False)
        goals = {} if target_sparsity is None else goals_of(task.targets, target_sparsity)
    task.agree("sparsegpt", goals=goals, pattern=pattern)

    def decide(layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        goal = pattern if pattern is not None else goals[layer.module, layer.name]
        return _by_columns(layer, problem.gram.to(weight.dtype), weight * alive, alive, goal)

    def entry(target: Target) -> GlobalPruning:
        asked = {"target_sparsity": goals[target.module, target.name]} if pattern is None else {"pattern": pattern}
        return GlobalPruning("sparsegpt", **asked)

    found, fits = task.fit(decide, keep_better=False)  # as published
    task.install(found, entry)
    return fits


def _by_columns(layer: Layer, gram: Tensor, weight: Tensor, alive: Tensor, goal: NM | float) -> tuple[Tensor, Tensor]:
    """Return the new weights and the mask of a layer, both ``(groups, outputs, inputs)``."""
    pattern = along_inputs(goal, layer) if isinstance(goal, NM) else None
    if pattern is not None and pattern.axis(layer.weight.shape) != (0 if layer.swapped else 1):
        raise ValueError(
            f"pattern={pattern!r} runs along another axis of {layer.label} than its inputs, which SparseGPT treats one "
            "after the other. Leave dim out."
        )
    order = layer.input_order(1 if pattern is None else pattern.m)
    real, width = order < weight.shape[-1], BLOCK if pattern is None else pattern.m
    weight, alive, gram = (F.pad(t, (0, 1)) for t in (weight, alive, gram))
    for group, moments in enumerate(F.pad(gram, (0, 0, 0, 1))):
        choose = _Choice(alive[group][:, order], goal)
        found, mask = prune_columns(moments[order][:, order], weight[group][:, order], width, choose)
        weight[group][:, order[real]], alive[group][:, order[real]] = found[:, real], mask[:, real]
    return weight[..., :-1], alive[..., :-1]


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Chooses what to keep of some columns: the largest ``n`` of ``m`` of each row, or a fraction of all entries.

    Args:
        alive: what earlier pruning has left, ``(outputs, columns)``.
        goal: the pattern, or the fraction to prune.
    """

    alive: Tensor
    goal: NM | float

    def __call__(self, scores: Tensor, start: int) -> Tensor:
        """Return the mask for the ``scores`` of the columns from ``start`` on."""
        alive = self.alive[:, start : start + scores.shape[1]]
        if isinstance(self.goal, NM):
            return nm_mask(scores, NM(self.goal.n, self.goal.m, dim=1, pad=self.goal.pad), alive)
        keep = scores.numel() - round(self.goal * scores.numel())
        if not keep:
            return torch.zeros_like(alive)
        flat = scores.reshape(1, -1), alive.reshape(1, -1)
        return nm_mask(flat[0], NM(keep, scores.numel(), dim=1), flat[1]).view_as(scores)
