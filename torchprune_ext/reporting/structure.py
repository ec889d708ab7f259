"""Which structure there is in what is left of a tensor: whole units that are zero, and N:M patterns that hold."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext.patterns import NM, Channel, Kernel, Unit

GROUPS = (2, 4, 8, 16)  # the M of the N:M patterns that are looked for
SAMPLE = 8192  # entries that are looked at before all are
CHANCE = 0.05  # probability from which on a pattern need not mean anything


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
    """Return the N:M patterns that a tensor has, by axis and M.

    Looked for are groups of 2, 4, 8 and 16 consecutive entries along each axis that is as long. N:M holds if no group
    has more than N entries ``alive``, where N is a power of two and at most half of M, so that at least half of each
    group is gone, or if each group has exactly N < M. A short last group counts as filled with zeros (``pad=True``).

    What holds by chance is left out: a pattern that as many entries, strewn at random, would show with a probability of
    5 % or more, as loose ones in almost empty tensors. Where whole rows, kernels or the like are gone, these are what
    is strewn. A pattern that follows from one that is found is found too.

    Args:
        alive: which entries are kept, bool.
        parts: number of equal parts of axis 0 whose borders no group crosses: the groups of a transposed convolution.
        kept: how many are, if that is known.

    Example:
        >>> mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
        >>> patterns_in(mask)
        (NM(n=2, m=4, dim=1, pad=False, groups=1),)
    """
    kept = int(alive.count_nonzero()) if kept is None else kept
    if alive.dim() < 2 or kept in (0, alive.numel()):
        return ()
    density = kept / alive.numel()
    for axis in range(alive.dim()):
        if _is_constant(alive, axis):
            alive = alive.narrow(axis, 0, 1)
    axes = [axis for axis in range(alive.dim()) if alive.shape[axis] > 1]
    return tuple(found for axis in axes for found in _along(alive, axis, parts if axis == 0 else 1, density))


def _is_constant(alive: Tensor, axis: int) -> bool:
    """Return whether all slices of ``axis`` are alike, as where whole rows or kernels are gone."""
    first, last = alive.select(axis, 0), alive.select(axis, -1)
    return torch.equal(first, last) and bool((alive == first.unsqueeze(axis)).all())


def _along(alive: Tensor, axis: int, parts: int, density: float) -> list[NM]:
    """Return the patterns along ``axis``."""
    other = 0 if axis else 1
    if alive.numel() > SAMPLE:  # most tensors have no pattern, and are not looked through then
        some = min(alive.shape[other], 1 + SAMPLE * alive.shape[other] // alive.numel())
        held = _holding(alive.narrow(other, 0, some), axis, parts, density, alive.shape[other] / some)
        if not any(chance < CHANCE for _, chance in held):
            return []
    holding = dict(_holding(alive, axis, parts, density))
    sure = [pattern for pattern, chance in holding.items() if chance < CHANCE]
    found = [each for each in holding if any(each == one or _implies(one, each) for one in sure)]
    size = alive.shape[axis] // parts
    return [NM(n, m, axis, size % m > 0, parts) for n, m in found]


def _holding(
    alive: Tensor, axis: int, parts: int, density: float, times: float = 1.0
) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield each N and M that hold along ``axis``, and how probable that is in entries strewn with this density.

    Of a tensor that is as many ``times`` larger.
    """
    size = alive.shape[axis] // parts
    counts = alive.view(torch.uint8).movedim(axis, -1).unflatten(-1, (parts, size))
    for m in GROUPS:
        if m > size:
            return
        if counts.shape[-1] % 2:
            counts = F.pad(counts, (0, 1))
        counts = counts[..., ::2] + counts[..., 1::2]  # of the groups of m
        low, high = torch.stack(torch.aminmax(counts)).tolist()
        for n in range(max(high, 1), m):
            exact = low == high == n and size % m == 0
            if exact or (n <= m // 2 and n & (n - 1) == 0):
                several = [n] if exact else range(n + 1)
                one = sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in several)
                yield (n, m), min(one, 1.0) ** (counts.numel() * times)


def _implies(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether the second N of M holds along an axis along which the first does; each M is a power of two."""
    (n, m), (most, group) = one, other
    return (n * (group // m) if m <= group else min(n, group)) <= most


def _any(alive: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return where something is alive along ``axes``; as ``any`` does, much faster."""
    return alive.view(torch.uint8).amax(axes) if alive.numel() else alive.any(dim=axes)


def tightest(patterns: tuple[NM, ...]) -> list[NM]:
    """Return those of the ``patterns`` of one tensor that follow from no other.

    Example:
        >>> tightest((NM(1, 2, 1), NM(1, 4, 1), NM(2, 4, 1)))  # each two neighbours of four are two
        [NM(n=1, m=4, dim=1, pad=False, groups=1)]
    """
    return [
        each
        for each in patterns
        if not any(
            other.dim == each.dim and _implies((other.n, other.m), (each.n, each.m))
            for other in patterns
            if other != each
        )
    ]
