"""One budget over many tensors: which units of the whole list go is decided by one exact selection.

Every function here takes ``(module, name)`` pairs, computes all scores and masks first, and then installs all masks or
none. The scores are compared across the list, the exact number of units goes, and among equal scores the lower index
of the earlier tensor is kept. Tensors that are the same object (tied weights) are scored and counted once and get the
same mask wherever they are listed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune_ext import criteria
from torchprune_ext._budget import (
    Budget,
    Normalize,
    Params,
    PerParameter,
    groups_of,
    install_all,
    listed_for,
    prune,
    prune_units,
    refuse_empty,
    scores_for,
    spread_entries,
    weights_or_scores,
)
from torchprune_ext._checks import check_finite, check_module, check_whole, errors_about
from torchprune_ext._host import Target
from torchprune_ext.masks import Profile, finish, identity, nm_mask, nm_profile
from torchprune_ext.patterns import NM, Channel, Kernel, Vector
from torchprune_ext.scoring import bn_masks, bn_scores, gradient_scores, obd_scores
from torchprune_ext.selection import Cut, Scores, kept


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
        >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = a.weight.data.copy_(torch.tensor([[1.0, 2.0]])), b.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> global_unstructured([(a, "weight"), (b, "weight")], amount=0.5)
        >>> a.weight_mask, b.weight_mask  # one of each tensor stays: 3 went instead of 2
        (tensor([[0., 1.]]), tensor([[0., 1.]]))
    """

    def score(target: Target) -> Scores:
        if importance_scores is None:
            check_finite(target.name, target.parameter)
            return Scores.of(criteria.magnitude, target.parameter, alive=target.mask)
        return Scores.of(identity, scores_for(importance_scores, target), alive=target.mask)

    budget = Budget(amount, target_sparsity, min_keep)
    prune("global_unstructured", params, budget, "entries", score, spread_entries, process_group, reduce)


def global_gradient_magnitude(
    params: Params,
    amount: float | None = None,
    *,
    grads: PerParameter | None = None,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
    reduce: Literal["mean"] | None = None,
) -> None:
    """Drop the entries whose loss gradient is smallest in the whole list; see :class:`.GradientMagnitude`.

    Args:
        params: as in :func:`global_unstructured`, and so are the other arguments that are not listed here.
        amount: fraction (float) or number (int) of the entries of the list not yet pruned.
        grads: gradient of every listed tensor, keyed by its pair; by default those that ``backward()`` left.
        target_sparsity: instead of ``amount``, the sparsity of the list in the end.
        min_keep: least number (int) or fraction (float) of the entries of each tensor that stay.
        process_group: ranks that call this together.
        reduce: ``"mean"`` averages the gradients over the ranks, as data-parallel training does.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, or a tensor has no gradient. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> global_gradient_magnitude(tpe.prunable_parameters(model), amount=0.5)
        >>> sum(int(layer.weight_mask.sum()) for layer in model)  # of 16 + 8
        12
    """

    def score(target: Target) -> Scores:
        return gradient_scores(target, None if grads is None else listed_for("grads", grads, target))

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
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 5))
        >>> global_kernel_ln(tpe.prunable_parameters(model), amount=0.5)
        >>> sum(int(conv.weight_mask.amax((2, 3)).sum()) for conv in model)  # of 8 + 8 kernels
        8
    """
    budget = Budget(amount, target_sparsity, min_keep)
    prune_units("global_kernel_ln", params, budget, Kernel, n, importance_scores, normalize, process_group)


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
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> global_vector_ln(tpe.prunable_parameters(model), amount=4, dim=1)
        >>> sum(int(layer.weight_mask.amax(1).sum()) for layer in model)  # of 6 + 2 rows
        4
    """
    budget = Budget(amount, target_sparsity, min_keep)
    prune_units("global_vector_ln", params, budget, Vector, n, importance_scores, normalize, process_group, dim=dim)


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
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5))
        >>> global_ln_structured(tpe.prunable_parameters(model), amount=0.5, dim=0)
        >>> sum(int(conv.weight_mask.amax((1, 2, 3)).sum()) for conv in model)  # of 4 + 4 filters
        4
    """
    budget = Budget(amount, target_sparsity, min_keep)
    prune_units(
        "global_ln_structured", params, budget, Channel, n, importance_scores, normalize, process_group, dim=dim
    )


def global_bn_scaling(
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    amount: float | None = None,
    *,
    paired: bool = True,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    r"""Drop the output channels whose BatchNorm scale :math:`|\gamma|` is smallest in the whole list.

    Args:
        pairs: ``(layer, bn)`` pairs, any iterable; see :func:`.bn_pairs`.
        amount: fraction (float) or number (int) of the channels of the list not yet pruned.
        paired: also mask the layers' biases and the weights and biases of the BatchNorms, see :class:`.BNScaling`.
        target_sparsity: instead of ``amount``, the fraction of all channels that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the channels of each layer that stay.
        process_group: ranks that call this together, each with its own layers, for one budget over all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured` and :class:`.BNScaling`, or a layer or BatchNorm is in two pairs.
            Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, arXiv:1708.06519:
    one global threshold on all scales.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3))
        >>> global_bn_scaling(tpe.bn_pairs(model, torch.ones(1, 1, 8, 8)), amount=0.5)
        >>> int(model[0].weight_mask.amax((1, 2, 3)).sum())
        2
    """
    partner: dict[nn.Module, nn.Module] = {}

    def spread(target: Target, part: Scores, cut: Cut) -> Iterator[tuple[Target, Tensor]]:
        for each, _, mask in bn_masks(target, partner[target.module], kept(part, cut), paired=paired):
            yield each, mask

    prune(
        "global_bn_scaling",
        _layers(pairs, partner),
        Budget(amount, target_sparsity, min_keep),
        "channels",
        lambda target: bn_scores(target, partner[target.module]),
        spread,
        process_group,
        param="pairs",
        paired=paired,
    )


def global_nm_structured(
    params: Params,
    m: int,
    amount: float | None = None,
    *,
    choices: Iterable[int] | None = None,
    dim: int = 1,
    pad: bool = False,
    importance_scores: PerParameter | None = None,
    target_sparsity: float | None = None,
    min_keep: int = 1,
) -> None:
    r"""Choose for each tensor how many of ``m`` to keep, so that the whole list keeps the largest total score.

    Keeping one more entry per group gains the next largest score of each group and costs one entry per group. Within
    a tensor the gain per entry falls with ``n`` (where earlier pruning or ``choices`` break this, several steps are
    taken as one), so taking the best step of all tensors again and again keeps the largest possible total for the
    number of entries reached. Only the last steps, which have to fit into what is left of the budget, may lose
    something: at most the gain of one step.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        m: group length (count).
        amount: fraction (float) or number (int) of the entries of the list not yet pruned that shall go at least;
            exceeded by less than the groups of one tensor times the size of a step, where steps do not fit.
        choices: values of ``n`` to choose from, by default all; those below ``min_keep`` do not count.
        dim: axis that the groups run along, see :class:`.NMStructured`.
        pad: let a short last group count as filled up with zeros.
        importance_scores: scores of every listed tensor, keyed by its pair; by default :math:`|w|`.
        target_sparsity: instead of ``amount``, the sparsity of the list in the end.
        min_keep: least ``n`` of any tensor; 0 lets tensors be emptied, with a warning.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, ``m`` does not divide an axis, a choice is not between 0 and ``m``,
            or the smallest choice keeps more than asked for. Nothing is pruned then.

    Example:
        >>> small, large = nn.Linear(8, 8), nn.Linear(8, 8)
        >>> _ = small.weight.data.uniform_(0.1, 0.2), large.weight.data.uniform_(0.8, 0.9)
        >>> global_nm_structured([(small, "weight"), (large, "weight")], m=4, amount=0.5)
        >>> [int(layer.weight_mask[0, :4].sum()) for layer in (small, large)]
        [1, 3]
    """
    budget = Budget(amount, target_sparsity, min_keep)
    budget.check()
    NM(1, m, dim, pad)
    check_whole("min_keep", min_keep, 0)
    if choices is not None and (isinstance(choices, str) or not isinstance(choices, Iterable)):
        raise TypeError(f"choices={choices!r} is a {type(choices).__name__}. Pass the values of n to choose from.")
    choices = list(range(m + 1) if choices is None else choices)
    for n in choices:
        check_whole(f"choices={choices!r}, of which n", n, 0)
    ns = sorted({int(n) for n in choices if n >= min_keep})
    if not ns or ns[-1] > m:
        raise ValueError(f"choices={choices!r}, min_keep={min_keep!r} must leave an n with {min_keep} <= n <= m={m}.")
    groups = groups_of(params)
    refuse_empty(groups)
    scores, profiles = [], []
    for listed in groups:
        with errors_about(listed.where):
            scores.append(weights_or_scores(importance_scores, listed.target))
            profiles.append(nm_profile(scores[-1], NM(1, m, dim, pad), listed.target.mask))
    alive = sum(profile.entries[m] for profile in profiles)
    keep = alive - budget.count(alive, sum(listed.target.parameter.numel() for listed in groups), "entries")
    least = sum(profile.entries[ns[0]] for profile in profiles)
    if least > keep:
        raise ValueError(
            f"{budget.asked()} leaves {keep} entries, but {ns[0]} of {m} everywhere keep {least}. "
            "Ask for less, or allow a smaller n by choices= or min_keep=."
        )
    masks = []
    for listed, score, n in zip(groups, scores, _best_ns(profiles, ns, keep), strict=True):
        like = listed.target.parameter
        if n:
            mask = finish(nm_mask(score, NM(n, m, dim, pad), listed.target.mask), like)
        else:
            mask = torch.zeros_like(like, requires_grad=False)
        masks += [(listed, target, mask, {"n": n, "m": m, "dim": dim}) for target in listed.everywhere()]
    install_all("global_nm_structured", budget, masks)


def _layers(
    pairs: Iterable[tuple[nn.Module, nn.Module]], partner: dict[nn.Module, nn.Module]
) -> Iterator[tuple[nn.Module, str]]:
    """Yield the layers of ``pairs`` as a list of tensors, and fill ``partner`` with the BatchNorm of each."""
    if isinstance(pairs, nn.Module) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is a {type(pairs).__name__}. Pass (layer, bn) pairs, e.g. of bn_pairs(model, inputs).")
    feeds: dict[int, nn.Module] = {}  # the layer before each BatchNorm, and the one that a weight was first seen in
    for place, pair in enumerate(pairs):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"pairs[{place}]={pair!r} is no (layer, bn) pair, e.g. (model.conv1, model.bn1).")
        layer, bn = pair
        with errors_about(f"pairs[{place}]"):
            check_module("layer", layer)
            weight = Target.of(layer, "weight").parameter
        if partner.setdefault(layer, bn) is not bn or feeds.setdefault(id(bn), layer) is not layer:
            raise ValueError(
                f"pairs[{place}]: {type(layer).__name__} or {type(bn).__name__} stands in another pair too, so its "
                "channels belong to no pair alone. Prune it with bn_scaling(..., paired=False) or leave it out."
            )
        if feeds.setdefault(id(weight), layer) is not layer:
            raise ValueError(
                f"pairs[{place}]: the weight of {type(layer).__name__} of shape {tuple(weight.shape)} is tied to "
                "that of an earlier layer, so its channels belong to no pair alone. Untie them, or leave it out."
            )
        yield layer, "weight"


def _best_ns(profiles: Sequence[Profile], ns: Sequence[int], keep: int) -> list[int]:
    """Return the ``n`` of each tensor, from ``ns``, for the largest total score with at most ``keep`` entries."""
    chosen = [ns[0]] * len(profiles)
    left = keep - sum(profile.entries[ns[0]] for profile in profiles)
    steps = [(-gain, place, n) for place, profile in enumerate(profiles) for gain, n in _steps(profile, ns)]
    for _, place, n in sorted(steps):  # gains per entry fall within a tensor, so its steps come in order
        cost = profiles[place].entries[n] - profiles[place].entries[chosen[place]]
        if cost <= left:
            chosen[place] = n
            left -= cost
    return chosen


def _steps(profile: Profile, ns: Sequence[int]) -> list[tuple[float, int]]:
    """Return the steps ``(gain per entry, n after it)`` of one tensor: its upper concave envelope over ``ns``."""
    hull: list[tuple[float, int]] = []
    for n in ns[1:]:
        while True:
            start = hull[-1][1] if hull else ns[0]
            cost = profile.entries[n] - profile.entries[start]
            if not cost:
                break  # nothing is left to keep more of
            gain = (profile.total[n] - profile.total[start]) / cost
            if not hull or gain <= hull[-1][0]:
                hull.append((gain, n))
                break
            hull.pop()  # the step before was worse: take both as one
    return hull
