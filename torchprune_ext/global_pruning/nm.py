"""One budget over many tensors that is spent by choosing how many of each group to keep."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchprune_ext._checks import check_whole, errors_about
from torchprune_ext._host import warn_of_zeros
from torchprune_ext._ranks import Ranks
from torchprune_ext._reduction import reduction_axis
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext.global_pruning.budget import (
    Budget,
    Listed,
    Params,
    PerParameter,
    given,
    groups_of,
    install_all,
    refuse_empty,
    weights_or_scores,
)
from torchprune_ext.masks import Profile, finish, nm_mask, nm_profile
from torchprune_ext.patterns import NM

__all__ = ["global_nm_structured"]


def global_nm_structured(
    params: Params,
    amount: float | None = None,
    *,
    m: int,
    choices: Iterable[int] | None = None,
    dim: int | None = None,
    pad: bool = False,
    importance_scores: PerParameter | None = None,
    target_sparsity: float | None = None,
    min_keep: int = 1,
    process_group: Any = None,
) -> None:
    r"""Choose for each tensor how many of ``m`` to keep, so that the whole list keeps the largest total score.

    Keeping one more entry per group gains the next largest score of each group and costs one entry per group. Within
    a tensor the gain per entry falls with ``n`` (where earlier pruning or ``choices`` break this, several steps are
    taken as one), so taking the best step of all tensors again and again keeps the largest possible total for the
    number of entries reached. Only the last steps, which have to fit into what is left of the budget, may lose
    something: at most the gain of one step.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        amount: fraction (float) or number (int) of the entries of the list not yet pruned that shall go at least;
            exceeded by less than the groups of one tensor times the size of a step, where steps do not fit.
        m: group length (count).
        choices: values of ``n`` to choose from, by default all; those below ``min_keep`` do not count.
        dim: axis that the groups run along, by default that of each tensor that its layer sums over; see
            :class:`.NMStructured`.
        pad: let a short last group count as filled up with zeros.
        importance_scores: scores of every listed tensor, keyed by its pair; by default :math:`|w|`.
        target_sparsity: instead of ``amount``, the sparsity of the list in the end.
        min_keep: least ``n`` of any tensor; 0 lets tensors be emptied, with a warning.
        process_group: ranks that call this together, each with its own tensors, for one budget over all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured`, ``m`` does not divide an axis, a choice is not between 0 and ``m``,
            or the smallest choice keeps more than asked for. Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Example:
        >>> from torch import nn
        >>> small, large = nn.Linear(8, 8), nn.Linear(8, 8)
        >>> _ = small.weight.data.uniform_(0.1, 0.2), large.weight.data.uniform_(0.8, 0.9)
        >>> global_nm_structured([(small, "weight"), (large, "weight")], m=4, amount=0.5)
        >>> [int(layer.weight_mask[0, :4].sum()) for layer in (small, large)]
        [1, 3]
    """
    budget, ranks = Budget(amount, target_sparsity, min_keep), Ranks(process_group)
    with ranks.together():
        budget.check()
        pattern, ns = NM(1, m, dim, pad), _choices(m, choices, min_keep)
        groups = groups_of(params)
        if process_group is None:
            refuse_empty(groups)
        warn_of_zeros({listed.where: listed.target for listed in groups})
        parts = []
        for listed in groups:
            with errors_about(listed.where):
                scores, along = weights_or_scores(importance_scores, listed.target), _along_inputs(pattern, listed)
                parts.append((listed, scores, along, nm_profile(scores, along, listed.target.mask)))
    ranks.agree("the arguments", f"global_nm_structured({budget.asked()}, choices={ns}, {pattern})")
    profiles = _of_all([profile for _, _, _, profile in parts], m, ranks)
    total = ranks.total(sum(listed.target.parameter.numel() for listed in groups))
    alive = sum(profile.entries[m] for profile in profiles)
    keep = alive - budget.count(alive, total, "entries")
    least = sum(profile.entries[ns[0]] for profile in profiles)
    if least > keep:
        raise ValueError(
            f"{budget.asked()} leaves {keep} entries, but {ns[0]} of {m} everywhere keep {least}. "
            "Ask for less, or allow a smaller n by choices= or min_keep=."
        )
    chosen = _best_ns(profiles, ns, keep)[sum(ranks.counts(len(parts))[: ranks.rank]) :][: len(parts)]
    with all_or_nothing(target.module for each in groups for target in each.everywhere()), ranks.together():
        masks = []
        for (listed, scores, along, _), n in zip(parts, chosen, strict=True):
            like = listed.target.parameter
            if n:
                mask = finish(nm_mask(scores, replace(along, n=n), listed.target.mask), like)
            else:
                mask = torch.zeros_like(like, requires_grad=False)
            told = {"n": n, "m": m, "dim": along.dim, **given(importance_scores=importance_scores)}
            masks += [(listed, target, mask, told) for target in listed.everywhere()]
        install_all("global_nm_structured", budget, masks)


def _choices(m: int, choices: Iterable[int] | None, min_keep: int) -> list[int]:
    """Return the values of ``n`` to choose from, in rising order."""
    check_whole("min_keep", min_keep, 0)
    if choices is not None and (isinstance(choices, str) or not isinstance(choices, Iterable)):
        raise TypeError(f"choices={choices!r} is a {type(choices).__name__}. Pass the values of n to choose from.")
    choices = list(range(m + 1) if choices is None else choices)
    for n in choices:
        check_whole(f"choices={choices!r}, of which n", n, 0)
    ns = sorted({int(n) for n in choices if n >= min_keep})
    if not ns or ns[-1] > m:
        raise ValueError(f"choices={choices!r}, min_keep={min_keep!r} must leave an n with {min_keep} <= n <= m={m}.")
    return ns


def _of_all(profiles: Sequence[Profile], m: int, ranks: Ranks) -> list[Profile]:
    """Return the profiles of the tensors of all ranks, in rank order."""
    entries = torch.tensor([p.entries for p in profiles], dtype=torch.int64, device="cpu").reshape(-1)
    total = torch.tensor([p.total for p in profiles], dtype=torch.float64, device="cpu").reshape(-1)
    both = ranks.concatenate(entries).view(-1, m + 1).tolist(), ranks.concatenate(total).view(-1, m + 1).tolist()
    return [Profile(*each) for each in zip(*both, strict=True)]


def _along_inputs(pattern: NM, listed: Listed) -> NM:
    """Return ``pattern`` along the reduction axis of the tensor, where it names none itself."""
    if pattern.dim is not None:
        return pattern
    axes = {reduction_axis(target) for target in listed.everywhere()}
    if len(axes) > 1:
        raise ValueError(
            "dim=None stands for the axis that the layer's product sums over, but the tensor is tied, and its layers "
            "sum over different ones. Pass dim= for all, or leave the tensor out."
        )
    return pattern.along(*axes.pop())


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
