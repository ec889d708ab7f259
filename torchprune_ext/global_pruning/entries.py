"""One budget over the entries of many tensors."""

from collections.abc import Callable
from typing import Any, Literal

from torchprune_ext import criteria
from torchprune_ext._checks import check_finite
from torchprune_ext._host import Target
from torchprune_ext._scoring import gradient_scores, obd_scores
from torchprune_ext.global_pruning.budget import (
    Budget,
    Params,
    PerParameter,
    given,
    listed_for,
    prune,
    scores_for,
    spread_entries,
)
from torchprune_ext.masks import identity
from torchprune_ext.selection import Scores

__all__ = ["global_gradient_magnitude", "global_obd_saliency", "global_unstructured"]


def global_unstructured(
    params: Params,
    amount: float | None = None,
    *,
    importance_scores: PerParameter | None = None,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
    reduce: Literal["mean"] | None = None,
) -> None:
    r"""Drop the entries of smallest score in the whole list; :math:`|w|` is the score unless others are given.

    Does what :func:`torch.nn.utils.prune.global_unstructured` does with ``L1Unstructured``, in a fraction of its time
    and memory. Unlike there, given scores must cover every listed tensor: a weight cannot be compared with a score.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        amount: fraction (float) or number (int) of the entries of the list not yet pruned.
        importance_scores: scores of every listed tensor, keyed by its pair: same shape, finite, >= 0.
        target_sparsity: instead of ``amount``, the fraction of all entries of the list that shall be pruned in the
            end, what is pruned already counted in.
        min_keep: least number (int) or fraction (float) of the entries of each tensor that stay. What this saves is
            taken from the next smallest elsewhere. 0 lets tensors be emptied, with a warning.
        process_group: ``torch.distributed`` group whose ranks call this together. Each passes its own tensors, and
            the budget is over all of them, ties in rank order; with ``reduce``, each passes a replica of the same.
        reduce: ``"mean"`` averages the given scores over the ranks first, so that all replicas get the same mask.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, scores that are missing, of another shape, not finite or negative, or an
            amount that ``min_keep`` does not allow. Nothing is pruned then.
        RuntimeError: another rank refused its part, or replicas differ. Nothing is pruned then.

    Source: Han, Pool, Tran & Dally 2015, arXiv:1506.02626, for magnitude; Blalock et al. 2020, arXiv:2003.03033, for
    the comparison with one amount per layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = a.weight.data.copy_(torch.tensor([[1.0, 2.0]])), b.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> global_unstructured([(a, "weight"), (b, "weight")], amount=0.5)
        >>> a.weight_mask, b.weight_mask  # one of each tensor stays: 3 went instead of 2
        (tensor([[0., 1.]]), tensor([[0., 1.]]))
    """
    score, budget = scoring_of_entries(importance_scores), Budget(amount, target_sparsity, min_keep)
    told = given(importance_scores=importance_scores)
    prune("global_unstructured", params, budget, "entries", score, spread_entries, process_group, reduce, **told)


def global_gradient_magnitude(
    params: Params,
    amount: float | None = None,
    *,
    grad: PerParameter | None = None,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
    reduce: Literal["mean"] | None = None,
) -> None:
    """Drop the entries whose loss gradient is smallest in the whole list; see :class:`.GradientMagnitude`.

    Args:
        params: as in :func:`global_unstructured`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the entries of the list not yet pruned.
        grad: gradient of every listed tensor, keyed by its pair; by default those that ``backward()`` left.
        target_sparsity: instead of ``amount``, the sparsity of the list in the end.
        min_keep: least number (int) or fraction (float) of the entries of each tensor that stay.
        process_group: ranks that call this together.
        reduce: ``"mean"`` averages the gradients over the ranks, as data-parallel training does.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, or a tensor has no gradient. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> global_gradient_magnitude(tpe.prunable_parameters(model), amount=0.5)
        >>> sum(int(layer.weight_mask.sum()) for layer in model)  # of 16 + 8
        12
    """

    def score(target: Target) -> Scores:
        return gradient_scores(target, None if grad is None else listed_for("grad", grad, target))

    budget = Budget(amount, target_sparsity, min_keep)
    prune("global_gradient_magnitude", params, budget, "entries", score, spread_entries, process_group, reduce)


def global_obd_saliency(
    params: Params,
    amount: float | None = None,
    *,
    hessian_diag: PerParameter,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
    reduce: Literal["mean"] | None = None,
) -> None:
    """Drop the entries whose deletion is predicted to raise the loss least; see :class:`.OBDSaliency`.

    Args:
        params: as in :func:`global_unstructured`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the entries of the list not yet pruned.
        hessian_diag: second derivative of the loss with respect to each entry, for every listed tensor, keyed by its
            pair.
        target_sparsity: instead of ``amount``, the sparsity of the list in the end.
        min_keep: least number (int) or fraction (float) of the entries of each tensor that stay.
        process_group: ranks that call this together.
        reduce: ``"mean"`` averages ``hessian_diag`` over the ranks.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(4, 2)
        >>> curvature = {(layer, "weight"): torch.ones(2, 4)}
        >>> global_obd_saliency([(layer, "weight")], target_sparsity=0.75, hessian_diag=curvature)
        >>> int(layer.weight_mask.sum())
        2
    """

    def score(target: Target) -> Scores:
        return obd_scores(target, listed_for("hessian_diag", hessian_diag, target))

    budget = Budget(amount, target_sparsity, min_keep)
    prune("global_obd_saliency", params, budget, "entries", score, spread_entries, process_group, reduce)


def scoring_of_entries(importance_scores: PerParameter | None) -> Callable[[Target], Scores]:
    """Return how entries are scored: by what is given for them, or by their size."""

    def score(target: Target) -> Scores:
        if importance_scores is None:
            check_finite(target.name, target.parameter)
            return Scores.of(criteria.magnitude, target.parameter, alive=target.mask)
        return Scores.of(identity, scores_for(importance_scores, target), alive=target.mask)

    return score
