r"""The exact ``k`` smallest scores of one or of many tensors, without concatenating or sorting them.

This is the SELECT algorithm of Floyd & Rivest 1975 (*Expected time bounds for selection*, CACM 18(3)), arranged for
memory that is much slower than arithmetic. A random sample of the scores gives two values that very probably enclose
the ``k``-th smallest. One pass counts the scores at or below the lower value and collects those strictly between the
two, about one percent; the ``k``-th smallest is then found among the collected ones, by histograms of their bits. If
the sample was unlucky, the bracket is widened and the pass repeated, so the result never depends on the sample.
Scores are computed in chunks that stay in the processor's cache, so the cost is about that of reading the tensors.
Over several processes only the sample, the counts and the histograms travel, never scores or masks.

Ties are part of the definition: among equal scores, the entry with the lower index, in the earlier tensor, on the
lower rank, is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchprune_ext._ranks import Ranks

SAMPLE = 65_536
CHUNK = 1 << 20
DIGIT = 11  # bits of one histogram
DEAD = -1.0  # below every score, so that what is pruned already sorts first
ALONE = Ranks()


def score_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to score ``tensors`` in: float64 if any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of the entries of one tensor, computed from ``inputs`` one chunk at a time.

    Use :meth:`of` to make one.

    Args:
        criterion: elementwise function of one chunk of each input, with values >= 0; see
            :mod:`torchprune_ext.criteria`.
        inputs: flat tensors of one length.
        alive: flat tensor of the same length, zero where an entry is pruned already; None if none is.
        dtype: what the scores are computed and compared in; the same for all parts of one selection.
        safe: entries above this cut count as infinitely important; None if none do.
    """

    criterion: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    alive: Tensor | None
    dtype: torch.dtype
    safe: "Cut | None" = None

    @classmethod
    def of(cls, criterion: Callable[..., Tensor], *inputs: Tensor, alive: Tensor | None = None) -> "Scores":
        """Flatten the tensors, all of one shape, in row-major order; views where they are contiguous."""
        flat = tuple(tensor.detach().reshape(-1) for tensor in inputs)
        alive = None if alive is None else alive.detach().reshape(-1)
        return cls(criterion, flat, alive, score_dtype(*inputs))

    def __len__(self) -> int:
        """Return the number of entries, pruned ones included."""
        return self.inputs[0].numel()

    def count_alive(self) -> int:
        """Return the number of entries that are not pruned yet."""
        return len(self) if self.alive is None else int(self.alive.count_nonzero())

    def at(self, index: slice | Tensor) -> Tensor:
        """Return the scores at ``index``, with ``DEAD`` where pruned."""
        scores = self.criterion(*(tensor[index].to(self.dtype) for tensor in self.inputs))
        if self.alive is not None:
            scores = scores.masked_fill(self.alive[index] == 0, DEAD)
        if self.safe is not None:
            if isinstance(index, slice):
                index = torch.arange(*index.indices(len(self)), device=scores.device)
            ties = (scores == self.safe.value).logical_and_(index < self.safe.position)
            scores = scores.masked_fill(ties.logical_or_(scores > self.safe.value), float("inf"))
        return scores

    def chunks(self) -> list[slice]:
        """Return the indices of consecutive chunks."""
        size = CHUNK if self.inputs[0].is_cpu else len(self) or 1  # elsewhere one launch beats staying in a cache
        return [slice(start, start + size) for start in range(0, len(self), size)]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the kept scores of one tensor begin.

    An entry is kept if its score is above ``value``, or equal to it and at a flat index below ``position``.
    """

    value: float
    position: int = 0


def select_smallest(parts: Sequence[Scores], k: int, ranks: Ranks = ALONE) -> list[Cut]:
    """Return the cuts below which lie exactly the ``k`` smallest scores of all that are not pruned yet.

    Args:
        parts: the scores, finite and >= 0, of one or more tensors; any sizes and devices, one dtype.
        k: how many to cut off, between 0 and all that are alive (not checked); with ``ranks``, on all of them.
        ranks: processes that call this together, each with its own parts.

    Returns:
        One cut for each of this process's parts; pass them to :func:`kept`.

    Example:
        >>> import torch
        >>> from torchprune_ext.criteria import magnitude
        >>> scores = Scores.of(magnitude, torch.tensor([3.0, -1.0, 2.0, 1.0]))
        >>> [cut] = select_smallest([scores], 1)  # the two ones tie: the later goes
        >>> kept(scores, cut)
        tensor([ True,  True,  True, False])
    """
    if k == 0:
        return [Cut(DEAD) for _ in parts]
    total, dead, double = ranks.totals(
        sum(map(len, parts)),
        sum(len(part) - part.count_alive() for part in parts),
        sum(part.dtype == torch.float64 for part in parts),  # a rank without parts has to know too
    )
    none = torch.empty(0, dtype=torch.float64 if double else torch.float32, device="cpu")
    value, below, equal = _order_statistic(parts, dead + k, total, none, ranks)  # what is dead sorts first
    surplus = below + equal - dead - k  # of the entries equal to the value, so many stay: the first ones
    if surplus and ranks.size > 1:
        surplus -= sum(ranks.counts(_count(parts, torch.eq, value))[: ranks.rank])
    cuts = []
    for part in parts:
        position, found = _position_of_tie(part, value, surplus) if surplus > 0 else (0, 0)
        surplus -= found
        cuts.append(Cut(value, position))
    return cuts


def select_with_floors(parts: Sequence[Scores], k: int, floors: Sequence[int], ranks: Ranks = ALONE) -> list[Cut]:
    """Return cuts as :func:`select_smallest`, but leave at least ``floors[i]`` entries of part ``i``.

    What a floor saves is taken from the next smallest scores elsewhere, so exactly ``k`` go all the same.

    Args:
        parts: as in :func:`select_smallest`.
        k: how many to cut off, at most what the floors leave (not checked).
        floors: least number of entries kept of each part, at most what is alive of it.
        ranks: as in :func:`select_smallest`.

    Returns:
        One cut for each of this process's parts.
    """
    shared = select_smallest(parts, k, ranks)
    if not ranks.total(sum(not keeps(*each) for each in zip(parts, shared, floors, strict=True))):
        return shared
    most = [part.count_alive() - floor for part, floor in zip(parts, floors, strict=True)]
    lowest = [select_smallest([part], count)[0] for part, count in zip(parts, most, strict=True)]
    guarded = [replace(part, safe=cut) for part, cut in zip(parts, lowest, strict=True)]
    shared = select_smallest(guarded, k, ranks)
    return [min(pair, key=lambda cut: (cut.value, -cut.position)) for pair in zip(shared, lowest, strict=True)]


def kept(part: Scores, cut: Cut, *, out: Tensor | None = None) -> Tensor:
    """Return which entries of ``part`` lie above ``cut``.

    Args:
        part: scores of one tensor.
        cut: what :func:`select_smallest` returned for it.
        out: flat tensor to write 0 and 1 into; a new bool tensor if not given.

    Returns:
        ``out``, flat, 1 where the entry is kept.
    """
    if out is None:
        out = part.inputs[0].new_empty(len(part), dtype=torch.bool)

    for index in part.chunks():
        scores, target = part.at(index), out[index]
        ties = _ties(cut, index.start, scores)
        torch.ge(scores[:ties], cut.value, out=target[:ties])
        torch.gt(scores[ties:], cut.value, out=target[ties:])
    return out


def _ties(cut: Cut, start: int, scores: Tensor) -> int:
    """Return how many of ``scores``, the chunk that begins at ``start``, are kept if they equal the cut."""
    return min(max(cut.position - start, 0), len(scores))


def keeps(part: Scores, cut: Cut, floor: int) -> bool:
    """Return whether ``cut`` leaves at least ``floor`` entries of ``part``; looks no further than it must."""
    for index in part.chunks():
        if floor <= 0:
            break
        scores = part.at(index)
        ties = _ties(cut, index.start, scores)
        floor -= int((scores[:ties] >= cut.value).count_nonzero()) + int((scores[ties:] > cut.value).count_nonzero())
    return floor <= 0


def _order_statistic(
    parts: Sequence[Scores], rank: int, total: int, none: Tensor, ranks: Ranks
) -> tuple[float, int, int]:
    """Return the ``rank``-th smallest score (1-based), how many are below it and how many equal it.

    Args:
        parts: scores of this process.
        rank: which of the ``total`` scores, dead ones included.
        total: number of scores of all processes.
        none: empty tensor of the dtype that all processes score in.
        ranks: processes that call this together.
    """
    sample = _sample(parts, total, none, ranks)
    share, size = rank / total, len(sample)
    spread = 3 * (size * share * (1 - share)) ** 0.5 + 2  # three standard deviations
    while True:
        first, last = int(share * size - spread), int(share * size + spread) + 1
        # half way to the dead rather than among them: they are below the rank, and too many to collect
        low = max(float(sample[first]), DEAD / 2) if 0 <= first < size else DEAD / 2
        high = float(sample[last]) if 0 <= last < size else float("inf")
        up_to_low, between = _scan(parts, low, high, none)
        up_to_low, inside = ranks.totals(up_to_low, len(between))
        if up_to_low < rank <= up_to_low + inside:
            value, below, equal = _by_digits(between, rank - up_to_low, ranks)
            return value, up_to_low + below, equal
        if rank <= up_to_low and (below := ranks.total(_count(parts, torch.lt, low))) < rank:
            return low, below, up_to_low - below
        up_to_high = ranks.total(_count(parts, torch.le, high))
        if up_to_low + inside < rank <= up_to_high:
            return high, up_to_low + inside, up_to_high - up_to_low - inside
        spread *= 8


def _sample(parts: Sequence[Scores], total: int, none: Tensor, ranks: Ranks) -> Tensor:
    """Return sorted scores at random positions in all parts of all ranks; none where collecting all is cheaper."""
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64, device="cpu")
    own = int(sizes.sum())
    if total <= 4 * SAMPLE:
        return none
    generator = torch.Generator("cpu").manual_seed(total)  # our own: the user's random state stays untouched
    drawn = torch.randint(max(own, 1), (SAMPLE * own // total,), generator=generator, device="cpu").sort().values
    chosen = [none]
    ends = sizes.cumsum(0)
    for part, end, positions in zip(
        parts, ends.tolist(), drawn.tensor_split(torch.searchsorted(drawn, ends)[:-1]), strict=bool(parts)
    ):
        index = (positions - (end - len(part))).to(part.inputs[0].device)
        chosen.append(part.at(index).cpu())
    return ranks.concatenate(torch.cat(chosen)).sort().values


def _scan(parts: Sequence[Scores], low: float, high: float, none: Tensor) -> tuple[int, Tensor]:
    """Return how many scores are at most ``low``, and those strictly between ``low`` and ``high``."""
    up_to_low, between = 0, [none]
    for part in parts:
        for index in part.chunks():
            scores = part.at(index)
            above = scores > low
            up_to_low += len(scores) - int(above.count_nonzero())
            between.append(scores[above.logical_and_(scores < high).nonzero().squeeze(1)].cpu())
    return up_to_low, torch.cat(between)


def _by_digits(scores: Tensor, rank: int, ranks: Ranks) -> tuple[float, int, int]:
    """Return the ``rank``-th smallest of all ranks' ``scores``, how many are below it and how many equal it.

    Bit patterns of floats >= 0 rank as the floats do, so the value is found digit by digit, like a word in a
    dictionary: each histogram says which digit comes next.
    """
    scores = scores + 0.0  # the bits of -0.0 would rank last
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    width = 64 if scores.dtype == torch.float64 else 32
    below, equal, prefix = 0, 0, 0
    for shift in reversed(range(0, width, DIGIT)):
        histogram = ranks.sum(((bits >> shift) & ((1 << DIGIT) - 1)).bincount(minlength=1 << DIGIT))
        ends = histogram.cumsum(0)
        digit = int(torch.searchsorted(ends, rank - below))
        equal = int(histogram[digit])
        below += int(ends[digit]) - equal
        prefix = prefix << DIGIT | digit
        bits = bits[(bits >> shift) == prefix]
    value = torch.tensor(prefix, dtype=torch.int64, device="cpu").to(bits.dtype).view(scores.dtype)
    return float(value), below, equal


def _count(parts: Sequence[Scores], compare: Callable[[Tensor, float], Tensor], value: float) -> int:
    """Return for how many scores ``compare(score, value)`` holds."""
    return sum(int(compare(part.at(index), value).count_nonzero()) for part in parts for index in part.chunks())


def _position_of_tie(part: Scores, value: float, count: int) -> tuple[int, int]:
    """Return the index behind the ``count``-th score equal to ``value``, or behind all, and how many were found."""
    found = 0
    for index in part.chunks():
        equal = part.at(index) == value
        here = int(equal.count_nonzero())
        if found + here >= count:
            return index.start + int(equal.nonzero()[count - found - 1]) + 1, count
        found += here
    return len(part), found
