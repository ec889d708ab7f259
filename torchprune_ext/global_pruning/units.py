"""One budget over the units of many tensors: kernels, vectors, filters and channels."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchprune_ext._checks import (
    check_finite,
    check_order,
)
from torchprune_ext._host import Target
from torchprune_ext._ranks import Ranks
from torchprune_ext.global_pruning.budget import (
    Budget,
    Normalize,
    Params,
    PerParameter,
    given,
    prune,
    weights_or_scores,
)
from torchprune_ext.masks import unit_mask, unit_scores
from torchprune_ext.patterns import Block, Channel, Kernel, Unit, Vector
from torchprune_ext.selection import Cut, Scores, kept

__all__ = ["global_block_ln", "global_kernel_ln", "global_ln_structured", "global_vector_ln"]


def global_kernel_ln(
    params: Params,
    amount: float | None = None,
    n: float = 2,
    *,
    importance_scores: PerParameter | None = None,
    normalize: Normalize | None = "mean",
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    r"""Drop the convolution kernels of smallest Ln norm in the whole list; see :class:`.KernelLn`.

    Norms of units of different sizes cannot be compared as they are: 25 entries have a larger norm than 9 of the same
    size. ``normalize`` says what is compared instead.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        amount: fraction (float) or number (int) of the units of the list not yet pruned. Units count alike, whatever
            their size.
        n: order of the norm, as in :func:`torch.linalg.vector_norm`.
        importance_scores: scores of every listed tensor, keyed by its pair, whose norms are taken instead.
        normalize: ``"mean"`` compares the norm per entry, the power mean :math:`(\frac1k \sum |w|^n)^{1/n}`, which is
            the root mean square for ``n=2`` and the mean magnitude for ``n=1``; a layer of small weights then loses
            more. ``"max"`` and ``"sum"`` divide by the largest norm, or the sum of norms, of the tensor's own living
            units, so that each layer's scale drops out; with ``"sum"`` a layer of many units has small scores.
            ``None`` compares plain norms. Dividing by a statistic of the layer goes back to Molchanov et al. 2017,
            arXiv:1611.06440, section 2.2, who take the l2 norm of the layer's scores.
        target_sparsity: instead of ``amount``, the fraction of all units that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the units of each tensor that stay.
        process_group: ranks that call this together, each with its own tensors, for one budget over all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, or a tensor has no kernels. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 5))
        >>> global_kernel_ln(tpe.prunable_parameters(model), amount=0.25)
        >>> sum(int(conv.weight_mask.amax((2, 3)).sum()) for conv in model)  # of 8 + 8 kernels
        12
    """
    budget = Budget(amount, target_sparsity, min_keep)
    _prune_units("global_kernel_ln", params, budget, Kernel, n, importance_scores, normalize, process_group)


def global_vector_ln(
    params: Params,
    amount: float | None = None,
    n: float = 2,
    dim: int = -1,
    *,
    importance_scores: PerParameter | None = None,
    normalize: Normalize | None = "mean",
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    """Drop the 1-D vectors along ``dim`` of smallest Ln norm in the whole list; see :class:`.VectorLn`.

    Args:
        params: as in :func:`global_kernel_ln`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the vectors of the list not yet pruned.
        n: order of the norm.
        dim: axis that the vectors run along.
        importance_scores: scores whose norms are taken instead.
        normalize: what is compared, see :func:`global_kernel_ln`.
        target_sparsity: instead of ``amount``, the fraction of all vectors that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the vectors of each tensor that stay.
        process_group: ranks that call this together.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> global_vector_ln(tpe.prunable_parameters(model), amount=4, dim=1)
        >>> sum(int(layer.weight_mask.amax(1).sum()) for layer in model)  # of 6 + 2 rows
        4
    """
    budget = Budget(amount, target_sparsity, min_keep)
    _prune_units("global_vector_ln", params, budget, Vector, n, importance_scores, normalize, process_group, dim=dim)


def global_block_ln(
    params: Params,
    amount: float | None = None,
    n: float = 2,
    *,
    block: int | tuple[int, int],
    importance_scores: PerParameter | None = None,
    normalize: Normalize | None = "mean",
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    """Drop the blocks of matrices of smallest Ln norm in the whole list; see :class:`.BlockLn`.

    Args:
        params: as in :func:`global_kernel_ln`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the blocks of the list not yet pruned.
        n: order of the norm.
        block: rows and columns of a block, ``(rows, columns)``, or one number for both.
        importance_scores: scores whose norms are taken instead.
        normalize: what is compared, see :func:`global_kernel_ln`.
        target_sparsity: instead of ``amount``, the fraction of all blocks that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the blocks of each tensor that stay.
        process_group: ranks that call this together.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, or blocks do not cover a tensor. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> global_block_ln(tpe.prunable_parameters(model), amount=2, block=4)
        >>> sum(int(layer.weight_mask.sum()) for layer in model)  # of 4 + 2 blocks of 16 entries
        64
    """
    budget = Budget(amount, target_sparsity, min_keep)
    _prune_units("global_block_ln", params, budget, Block, n, importance_scores, normalize, process_group, block=block)


def global_ln_structured(
    params: Params,
    amount: float | None = None,
    n: float = 2,
    dim: int = 0,
    *,
    importance_scores: PerParameter | None = None,
    normalize: Normalize | None = "mean",
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    """Drop the slices across ``dim`` of smallest Ln norm in the whole list: filters (0) or input channels (1).

    The global form of :func:`torch.nn.utils.prune.ln_structured`, which native pruning refuses because norms of
    slices of different sizes cannot be compared; here they are normalized.

    Args:
        params: as in :func:`global_kernel_ln`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the slices of the list not yet pruned.
        n: order of the norm.
        dim: axis that counts the slices, as in native ``ln_structured``.
        importance_scores: scores whose norms are taken instead.
        normalize: what is compared, see :func:`global_kernel_ln`.
        target_sparsity: instead of ``amount``, the fraction of all slices that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the slices of each tensor that stay.
        process_group: ranks that call this together.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5))
        >>> global_ln_structured(tpe.prunable_parameters(model), amount=0.25, dim=0)
        >>> sum(int(conv.weight_mask.amax((1, 2, 3)).sum()) for conv in model)  # of 4 + 4 filters
        6
    """
    budget = Budget(amount, target_sparsity, min_keep)
    _prune_units(
        "global_ln_structured", params, budget, Channel, n, importance_scores, normalize, process_group, dim=dim
    )


def _prune_units(
    call: str,
    params: Params,
    budget: Budget,
    unit: Callable[..., Unit],
    n: float,
    importance_scores: PerParameter | None,
    normalize: str | None,
    process_group: Any,
    **arguments: Any,
) -> None:
    """Prune units of one kind, ``unit(**arguments)``, by their normalized norms."""
    with Ranks(process_group).together():
        pattern = unit(**arguments)
        check_order(n)
        if normalize not in (None, "mean", "max", "sum"):
            raise ValueError(f"normalize={normalize!r} is unknown. Pass 'mean', 'max', 'sum' or None.")

    score, spread = scoring_of_units(pattern, n, importance_scores, normalize)
    told = {"n": n, **arguments, "normalize": normalize, **given(importance_scores=importance_scores)}
    prune(call, params, budget, pattern.units, score, spread, process_group, **told)


def scoring_of_units(
    pattern: Unit, n: float, importance_scores: PerParameter | None, normalize: str | None
) -> tuple[Callable[[Target], Scores], Callable[[Target, Scores, Cut], Iterator[tuple[Target, Tensor]]]]:
    """Return how units are scored, by their normalized norms, and how what is kept of them becomes a mask."""

    def score(target: Target) -> Scores:
        scores = weights_or_scores(importance_scores, target)
        part = unit_scores(scores, pattern, n, target.mask)
        [norms] = part.inputs
        norms = _normalized(norms, normalize, n, scores.numel() // max(len(norms), 1))
        check_finite(f"the norm of order n={n!r}, normalized by {normalize!r}", norms)
        return replace(part, inputs=(norms,))

    def spread(target: Target, part: Scores, cut: Cut) -> Iterator[tuple[Target, Tensor]]:
        yield target, unit_mask(kept(part, cut), pattern, target.parameter, target.mask)

    return score, spread


def _normalized(norms: Tensor, normalize: str | None, n: float, entries: int) -> Tensor:
    """Return ``norms`` of units of ``entries`` entries each, made comparable across tensors."""
    if normalize is None or not norms.numel() or not entries:
        return norms
    if normalize == "mean":
        try:
            return norms / (entries if n == 0 else entries ** (1 / n))
        except OverflowError:
            raise ValueError(
                f"n={n!r} is too small an order to average over units of {entries} entries. "
                "Pass a larger n, or another normalize=."
            ) from None
    scale = norms.max() if normalize == "max" else norms.sum()
    return norms / scale if scale > 0 else norms
