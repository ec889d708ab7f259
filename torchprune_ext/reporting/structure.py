"""Which structure there is in what is left of a tensor: whole units that are zero, and N:M patterns that hold."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext.patterns import NM, Channel, Kernel, Unit

GROUPS = (2, 4, 8, 16)  # the M of the N:M patterns that are looked for
SAMPLE = 8192  # entries that are looked at before all are


def units_of(module: nn.Module, axes: int) -> dict[str, Unit]:
    """Return the units, larger than an entry, that a tensor of ``module`` with so many ``axes`` consists of, by name.

    Example:
        >>> list(units_of(nn.Linear(2, 2), 2)), list(units_of(nn.Conv2d(1, 1, 3), 4)), units_of(nn.Linear(2, 2), 1)
        (['rows', 'columns'], ['kernels', 'filters', 'channels'], {})
    """
    if axes < 2:
        return {}
    if axes == 2:
        return {"rows": Channel(0), "columns": Channel(1)}
    if axes == 3 and not isinstance(module, _ConvNd):
        return {"slices": Channel(0)}
    groups = module.groups if isinstance(module, _ConvNd) else 1
    ends = Channel(0), Channel(1, groups)
    filters, channels = reversed(ends) if isinstance(module, _ConvTransposeNd) else ends
    return {"kernels": Kernel(), "filters": filters, "channels": channels}


def count_zero(alive: Tensor, unit: Unit) -> tuple[int, int]:
    """Return how many units of a tensor have no entry ``alive``, and how many units there are.

    Example:
        >>> count_zero(torch.tensor([[True, False], [False, False], [True, True]]), Channel(0))
        (1, 3)
    """
    split, axes = unit.split(alive)
    left = _any(split, axes) if axes else split
    return left.numel() - int(left.count_nonzero()), left.numel()


def patterns_in(alive: Tensor, parts: int = 1, kept: int | None = None) -> tuple[NM, ...]:
    """Return the N:M patterns that hold in a tensor, by axis and M.

    Looked for are groups of 2, 4, 8 and 16 consecutive entries along each axis that is as long. N:M holds if no group
    has more than N entries ``alive``, where N is a power of two and at most half of M, so that at least half of each
    group is gone. For any other N < M each group must have exactly N, and not just because whole slices of the axis are
    gone. A short last group counts as filled with zeros (``pad=True``). Nothing holds in a tensor in which all entries
    are alive, none is, or which has one axis.

    Args:
        alive: which entries are kept, bool.
        parts: number of equal parts of axis 0 whose borders no group crosses: the groups of a transposed convolution.
        kept: how many are, if that is known.

    Example:
        >>> [f"{pattern.n}:{pattern.m}" for pattern in patterns_in(torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool())]
        ['2:4']
    """
    kept = int(alive.count_nonzero()) if kept is None else kept
    if alive.dim() < 2 or kept in (0, alive.numel()):
        return ()
    return tuple(found for axis in range(alive.dim()) for found in _along(alive, axis, parts if axis == 0 else 1))


def _along(alive: Tensor, axis: int, parts: int) -> Iterator[NM]:
    """Yield the patterns that hold along ``axis``."""
    other = 0 if axis else 1
    few = alive.narrow(other, 0, min(alive.shape[other], 1 + SAMPLE * alive.shape[other] // alive.numel()))
    if not any(_candidates(few, axis, parts)):  # as in most tensors, which are not looked through then
        return
    for pattern in _candidates(alive, axis, parts):
        if pattern.n <= pattern.m // 2 or not _of_slices(alive, axis):
            yield pattern


def _candidates(alive: Tensor, axis: int, parts: int) -> Iterator[NM]:
    """Yield the patterns that hold along ``axis``, those too that hold because whole slices are gone."""
    size = alive.shape[axis] // parts
    counts = alive.view(torch.uint8).movedim(axis, -1).unflatten(-1, (parts, size))
    for m in GROUPS:
        if m > size:
            return
        if counts.shape[-1] % 2:
            counts = F.pad(counts, (0, 1))
        counts = counts[..., ::2] + counts[..., 1::2]  # of the groups of m
        low, high = (int(end) for end in torch.aminmax(counts))
        pad = size % m > 0
        for n in range(max(high, 1), m):
            if (n <= m // 2 and n & (n - 1) == 0) or (low == high == n and not pad):
                yield NM(n, m, axis, pad, parts)


def _of_slices(alive: Tensor, axis: int) -> bool:
    """Return whether all that is gone is gone in whole slices of ``axis``."""
    slices = _any(alive, tuple(other for other in range(alive.dim()) if other != axis))
    return int(slices.count_nonzero()) * (alive.numel() // len(slices)) == int(alive.count_nonzero())


def _any(alive: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return where something is alive along ``axes``; as ``any`` does, much faster."""
    return alive.view(torch.uint8).amax(axes) if alive.numel() else alive.any(dim=axes)


def tightest(patterns: tuple[NM, ...]) -> list[NM]:
    """Return those of the ``patterns`` of one tensor that follow from no other.

    Example:
        >>> tightest((NM(1, 2, 1), NM(1, 4, 1), NM(2, 4, 1)))  # each two neighbours of four are two
        [NM(n=1, m=4, dim=1, pad=False, groups=1)]
    """
    return [each for each in patterns if not any(_implies(other, each) for other in patterns if other != each)]


def _implies(one: NM, other: NM) -> bool:
    """Return whether ``other`` holds wherever ``one`` does; both have one of :data:`GROUPS`."""
    most = one.n * (other.m // one.m) if one.m <= other.m else min(one.n, other.m)
    return one.dim == other.dim and most <= other.n
