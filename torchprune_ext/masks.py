"""Scores and a pattern in, a mask out. No modules, no hooks, no randomness.

Every mask has the shape, dtype, device and memory format of the tensor it is made for and holds only 0 and 1. A
``default_mask`` is what earlier pruning left, None standing for all ones; a new mask never keeps what it has dropped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

from torchprune_ext._checks import check_finite
from torchprune_ext.patterns import NM, Unit
from torchprune_ext.selection import CHUNK, DEAD, Cut, Scores, kept, score_dtype

NM_TABLE = 4  # longest group whose comparisons, 6 of 4 entries, index a table of masks
NM_NETWORK = 32  # longest group for which a network of minima and maxima beats selecting row by row


def identity(scores: Tensor) -> Tensor:
    """Return ``scores``: the criterion of scores that are computed already."""
    return scores


def finish(mask: Tensor, like: Tensor) -> Tensor:
    """Return ``mask``, row-major and perhaps flat, in the shape, dtype and memory format of ``like``."""
    mask = mask.reshape(like.shape)
    if mask.dtype == like.dtype and mask.stride() == like.stride():
        return mask
    return torch.empty_like(like, requires_grad=False).copy_(mask)


def entry_mask(scores: Scores, cut: Cut, like: Tensor) -> Tensor:
    """Keep the entries above ``cut``.

    Args:
        scores: scores of the entries of one tensor and which of them are alive.
        cut: where the kept scores begin, from :func:`torchprune_ext.selection.select_smallest`.
        like: tensor whose shape, dtype, device and memory format the mask gets.

    Returns:
        The mask.
    """
    return finish(kept(scores, cut, out=_flat(like)), like)


def unit_scores(scores: Tensor, pattern: Unit, n: float, default_mask: Tensor | None = None) -> Scores:
    """Return the Ln norm of each unit; a unit with nothing left counts as dead.

    Args:
        scores: weights or scores, of the tensor's shape; what ``default_mask`` dropped counts as zero.
        pattern: what a unit is.
        n: order of the norm, any that :func:`torch.linalg.vector_norm` takes.
        default_mask: earlier mask.

    Returns:
        One score per unit, in row-major order of the units; float64, whose range holds the powers of float32.

    Raises:
        ValueError: a norm is not finite.
    """
    scores, axes = pattern.split(scores.detach())
    if default_mask is not None:
        scores = scores * (pattern.split(default_mask)[0] != 0)
    norms = torch.empty(0, dtype=torch.float64, device=scores.device)
    if scores.numel():
        scale = 1.0
        if n and (scores.dtype == torch.float64 or abs(n) > 4):  # powers that may leave the range of float64
            scale = float(scores.abs().max()) or 1.0
            scores = scores.double() / scale
        norms = torch.linalg.vector_norm(scores, n, dim=axes, dtype=torch.float64) * scale
    check_finite(f"the norm of order n={n!r}", norms)
    return Scores.of(identity, norms, alive=None if default_mask is None else units_alive(pattern, default_mask))


def units_alive(pattern: Unit, mask: Tensor) -> Tensor:
    """Return, flat and bool, which units of ``mask`` have an entry left."""
    mask, axes = pattern.split(mask)
    return (mask.amax(axes) if mask.numel() else mask.new_empty(0)).reshape(-1) != 0


def unit_mask(keep: Tensor, pattern: Unit, like: Tensor, default_mask: Tensor | None = None) -> Tensor:
    """Spread ``keep``, one flag per unit, over the entries of the units.

    Args:
        keep: flat, one entry per unit in row-major order, non-zero where the unit is kept.
        pattern: what a unit is.
        like: tensor whose shape, dtype, device and memory format the mask gets.
        default_mask: earlier mask.

    Returns:
        A mask where units that are dropped hold zeros only and kept ones what ``default_mask`` left of them.
    """
    mask = torch.ones_like(like, requires_grad=False)
    if default_mask is not None:
        mask.copy_(default_mask != 0)
    if mask.numel():
        blocks, axes = pattern.split(mask)
        sizes = [1 if axis in axes else size for axis, size in enumerate(blocks.shape)]
        blocks.mul_(keep.to(mask.device).view(sizes))
    return mask


def threshold_mask(scores: Scores, threshold: float, like: Tensor) -> Tensor:
    """Drop every entry whose score is strictly below ``threshold``.

    Args:
        scores: scores of the entries of one tensor and which of them are alive.
        threshold: least score that is kept, >= 0.
        like: tensor whose shape, dtype, device and memory format the mask gets.

    Returns:
        The mask.
    """
    flat = _flat(like)
    for index in scores.chunks():
        torch.ge(scores.at(index), threshold, out=flat[index])
    return finish(flat, like)


def every_other_mask(step: int, offset: int, like: Tensor, default_mask: Tensor | None = None) -> Tensor:
    """Drop every ``step``-th of the living entries in row-major order, beginning with number ``offset``.

    Args:
        step: distance between the dropped entries, counted in living entries.
        offset: how many living entries come before the first that is dropped.
        like: tensor whose shape, dtype, device and memory format the mask gets.
        default_mask: earlier mask.

    Returns:
        The mask.
    """
    flat = _flat(like)
    if default_mask is None:
        flat.fill_(1)
        flat[offset::step] = 0
    else:
        flat.copy_(default_mask.reshape(-1) != 0)
        flat[flat.nonzero().squeeze(1)[offset::step]] = 0
    return finish(flat, like)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a tensor keeps under ``n`` of ``m``, for every ``n`` from 0 to ``m``.

    Args:
        entries: entries kept.
        total: sum of their scores.
    """

    entries: list[int]
    total: list[float]


def nm_profile(scores: Tensor, pattern: NM, default_mask: Tensor | None = None) -> Profile:
    """Return what :func:`nm_mask` would keep with each ``n``.

    Args:
        scores: weights or scores of the tensor's shape, finite; their absolute value counts.
        pattern: ``m`` and the axis that the groups run along; its ``n`` does not matter.
        default_mask: earlier mask.

    Returns:
        Numbers of entries and total scores for ``n`` from 0 to ``m``.

    Raises:
        ValueError: ``pattern`` does not fit the shape.

    Example:
        >>> import torch
        >>> nm_profile(torch.tensor([[4.0, 1.0, 3.0, 5.0]]), NM(1, 2))
        Profile(entries=[0, 2, 4], total=[0.0, 9.0, 13.0])
    """
    rows, alive = _rows(scores, pattern, default_mask)
    m = min(pattern.m, max(rows.shape[1], 1))  # a group longer than the rows is filled up, and that is never kept

    entries, total = [0] * (pattern.m + 1), [0.0] * (pattern.m + 1)
    for chunk in _row_chunks(rows):
        ranked = _descending(_nm_groups(rows[chunk], alive, chunk, m), range(m))
        for place, values in enumerate(ranked, start=1):
            entries[place] += int((values >= 0).count_nonzero())  # what is dead is negative
            total[place] += float(values.clamp_min(0).sum(dtype=torch.float64))
    return Profile(list(accumulate(entries)), list(accumulate(total)))


def nm_mask(scores: Tensor, pattern: NM, default_mask: Tensor | None = None) -> Tensor:
    """Keep the ``n`` living entries of largest score in every group of ``m``; among equals the earlier ones.

    Args:
        scores: weights or scores of the tensor's shape, finite; their absolute value counts.
        pattern: ``n``, ``m`` and the axis that the groups run along.
        default_mask: earlier mask; also gives the dtype of the result.

    Returns:
        The mask of largest total score that is contained in ``default_mask`` and keeps at most ``n`` of ``m``; in the
        dtype of ``scores`` if there is no ``default_mask``.

    Raises:
        ValueError: ``pattern`` does not fit the shape.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]), NM(2, 4))
        tensor([[1., 0., 1., 0., 1., 1., 0., 0.]])
    """
    axis = pattern.axis(scores.shape)
    like = scores.detach() if default_mask is None else default_mask
    if pattern.n == pattern.m:
        return torch.ones_like(like) if default_mask is None else (default_mask != 0).to(like.dtype)
    rows, alive = _rows(scores, pattern, default_mask)
    out = torch.empty(rows.shape, dtype=like.dtype, device=like.device)
    m = min(pattern.m, max(rows.shape[1], 1))  # a group longer than the rows is filled up, and that is never kept

    for chunk in _row_chunks(rows):
        keep = _keep_largest(_nm_groups(rows[chunk], alive, chunk, m), min(pattern.n, m))
        keep = keep.view(len(out[chunk]), -1)[:, : rows.shape[1]]
        out[chunk] = keep if alive is None else keep * (alive[chunk] != 0)
    return finish(out.view(scores.movedim(axis, -1).shape).movedim(-1, axis), like)


def _flat(like: Tensor) -> Tensor:
    """Return an uninitialized flat tensor with room for a mask for ``like``."""
    return torch.empty(like.numel(), dtype=like.dtype, device=like.device)


def _rows(scores: Tensor, pattern: NM, default_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``scores`` and ``default_mask`` as matrices whose rows, one a part, lie along the axis of ``pattern``."""
    axis = pattern.axis(scores.shape)

    def matrix(tensor: Tensor) -> Tensor:
        moved = tensor.detach().movedim(axis, -1)
        return moved.reshape(math.prod(moved.shape[:-1]) * pattern.groups, moved.shape[-1] // pattern.groups)

    return matrix(scores), None if default_mask is None else matrix(default_mask)


def _row_chunks(rows: Tensor) -> list[slice]:
    """Return chunks of whole rows, since the groups of one row may end in a short one."""
    if not rows.numel():
        return []
    step = max(1, CHUNK // rows.shape[1]) if rows.is_cpu else len(rows)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _nm_groups(rows: Tensor, alive: Tensor | None, chunk: slice, m: int) -> Tensor:
    """Return the groups of ``rows``, a ``chunk`` of all, for ranking.

    Returns:
        Shape ``(groups, m)``: absolute values where ``alive``, negative ones where dead or filled up.
    """
    size = rows.shape[1]
    short = -size % m
    rows = rows.to(score_dtype(rows)).abs()
    if alive is not None or short:
        # Each dead place gets a value of its own, so that nothing that is dropped anyhow makes a tie.
        dead = DEAD - torch.arange(size + short, dtype=rows.dtype, device=rows.device) % m
        if alive is not None:
            rows = torch.where(alive[chunk] != 0, rows, dead[:size])
        if short:
            rows = torch.cat((rows, dead[size:].expand(len(rows), -1)), dim=1)
    return rows.reshape(-1, m)


def _keep_largest(groups: Tensor, n: int) -> Tensor:
    """Return, as 0 and 1, which ``n`` entries of each row of ``groups`` are largest, the earlier of equal ones."""
    if groups.shape[1] <= NM_TABLE:
        return _by_comparisons(groups, n)
    [least] = _descending(groups, (n - 1,))
    # Spelled out, as comparing with a broadcast column would run an inner loop of m entries only.
    keep = least.repeat_interleave(groups.shape[1]).view(groups.shape).le_(groups)
    if int(keep.count_nonzero()) > n * len(groups):  # ties at the n-th place
        tied = (keep.sum(1) > n).nonzero().squeeze(1)
        order = groups[tied].argsort(dim=1, descending=True, stable=True)
        keep[tied] = keep.new_zeros(order.shape).scatter_(1, order[:, :n], 1.0)
    return keep


def _by_comparisons(groups: Tensor, n: int) -> Tensor:
    """Return what :func:`_keep_largest` does, from all comparisons of the entries of a row, read as one number."""
    wins = groups.new_zeros(len(groups), dtype=torch.uint8)
    for i, j in combinations(range(groups.shape[1]), 2):
        wins.mul_(2).add_((groups[:, i] >= groups[:, j]).view(torch.uint8))
    return _winners(n, groups.shape[1]).to(groups).index_select(0, wins.int())


@lru_cache(maxsize=64)
def _winners(n: int, m: int) -> Tensor:
    """Return, for each outcome of the comparisons ``(0, 1), (0, 2), ...`` of ``m`` entries, who loses fewer than ``n``.

    Returns:
        Shape ``(2 ** pairs, m)``, 0 and 1. The first comparison is the highest bit, 1 if the earlier entry wins.
    """
    pairs = list(combinations(range(m), 2))
    table = torch.zeros(1 << len(pairs), m, device="cpu")
    for outcome, row in enumerate(table):
        losses = [0] * m
        for bit, (earlier, later) in enumerate(reversed(pairs)):
            losses[later if outcome >> bit & 1 else earlier] += 1
        row.copy_(torch.tensor([loss < n for loss in losses], device="cpu"))
    return table


def _descending(groups: Tensor, places: Sequence[int]) -> list[Tensor]:
    """Return, for each of ``places`` (0 for the largest), the entries of the rows of ``groups`` that rank there."""
    m = groups.shape[1]
    if m > NM_NETWORK and len(places) == 1:
        return [groups.kthvalue(m - places[0], dim=1).values]
    if m > NM_NETWORK:
        ranked = groups.sort(dim=1, descending=True).values
        return [ranked[:, place] for place in places]
    wires = list(groups.t().contiguous())  # one wire holds the same place of all groups
    for low, high, need_low, need_high in _network(m, tuple(places)):
        larger = torch.maximum(wires[low], wires[high]) if need_low else wires[low]
        if need_high:
            wires[high] = torch.minimum(wires[low], wires[high])
        wires[low] = larger
    return [wires[place] for place in places]


@lru_cache(maxsize=64)
def _network(m: int, places: tuple[int, ...]) -> Sequence[tuple[int, int, bool, bool]]:
    """Return the comparators that sort ``m`` values, larger first, as far as the wires ``places`` need it.

    This is Batcher's odd-even merge sort (Knuth, *The Art of Computer Programming* 3, 5.2.2, algorithm M), without
    what the wanted wires do not depend on.

    Returns:
        Comparators ``(low, high, need_low, need_high)``: the larger value goes to wire ``low``, the smaller to
        ``high``; the flags say which of the two is used later.
    """
    full = []
    top = 1 << max(m - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            full += [(i, i + d) for i in range(m - d) if i & p == r]
            d, q, r = q - p, q >> 1, p
        p >>= 1
    wanted, network = set(places), []
    for low, high in reversed(full):
        if low in wanted or high in wanted:
            network.append((low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return tuple(reversed(network))
