"""How a tensor with zeros is written: its survivors, and where they stand.

A tensor is a row of entries, in row-major order. Where survivors stand is written as one of

- ``mask``: 1 bit per entry, 1 for a survivor;
- ``gaps``: for each survivor, the number of entries skipped since the last, in ``bits`` bits; the largest number that
  fits, ``2**bits - 1``, says instead that so many entries are skipped and no survivor follows yet.

Bits fill each byte from its lowest. Everything works on blocks of :data:`ENTRIES` entries, so memory stays small.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_ext.deploy.container import BLOCK, CODES, DAMAGED, Part, check_shape, short

ENTRIES = 2**18  # entries handled at a time, a multiple of 8
GAP_BITS = range(2, 9)
OVERHEAD = 256  # bytes of the header that a sparse tensor takes more than a dense one, roughly
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
OTHERS = ("complex32", "bcomplex32", "complex128", "float4_e2m1fn_x2")  # dtypes that the container does not know
DTYPES = {
    str(d).removeprefix("torch."): d for d in [*CODE_OF, *(getattr(torch, n) for n in OTHERS if hasattr(torch, n))]
}
SIGNED_ZERO = {
    getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor stands in a file.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        encoding: ``"dense"``, ``"mask"`` or ``"gaps"``.
        bits: bits of a gap; 0 unless the encoding is ``"gaps"``.
        survivors: number of entries that are written; 0 if dense, which writes all.
        index_bytes: bytes that say where the survivors stand; 0 if dense.
        negative_zeros: whether a second mask says which of the others are -0.0 rather than 0.0.
        history: for a pruned tensor, what pruned it, step by step; None for one that is not.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str = "dense"
    bits: int = 0
    survivors: int = 0
    index_bytes: int = 0
    negative_zeros: bool = False
    history: tuple[str, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def parts(self, name: str) -> dict[str, Part]:
        """Return the parts of the container that the tensor ``name`` is written as; they do not say where."""
        if self.encoding == "dense":
            return {name: _stored(self.dtype, self.shape)}
        parts = {
            f"{name}.values": _stored(self.dtype, (self.survivors,)),
            f"{name}.{self.encoding}": Part("U8", (self.index_bytes,)),
        }
        if self.negative_zeros:
            parts[f"{name}.negative_zeros"] = Part("U8", (-(-self.numel // 8),))
        return parts

    def nbytes(self, name: str = "") -> int:
        """Return how many bytes of data the tensor takes in the file."""
        return sum(part.nbytes for part in self.parts(name).values())

    def as_json(self) -> dict[str, object] | None:
        """Return what the metadata say of the tensor; None if its only part says all."""
        if self.encoding == "dense" and self.dtype in CODE_OF:
            return None
        said: dict[str, object] = {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        said["encoding"] = self.encoding
        if self.encoding == "gaps":
            said["bits"] = self.bits
        if self.history is not None:
            said["history"] = list(self.history)
        return said

    @classmethod
    def of_json(cls, name: str, said: object, parts: dict[str, Part]) -> "Layout":
        """Return the layout of tensor ``name`` that the metadata describe, checked against the ``parts`` of the file.

        Raises:
            ValueError: it does not fit them.
        """
        where = f"tensor {short(name)}"
        if not isinstance(said, dict) or not {"dtype", "shape", "encoding"} <= set(said) <= KEYS:
            raise ValueError(f"{where}: its metadata hold other keys than {', '.join(sorted(KEYS))}. {DAMAGED}")
        dtype, encoding, bits, history = said["dtype"], said["encoding"], said.get("bits", 0), said.get("history")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{where}: dtype={short(dtype)} is unknown to this torch. Known are {', '.join(DTYPES)}.")
        check_shape(where, said["shape"])
        if encoding not in ("dense", "mask", "gaps"):
            raise ValueError(f"{where}: encoding={short(encoding)} is not dense, mask or gaps. {DAMAGED}")
        if ("bits" in said) != (encoding == "gaps") or type(bits) is not int or bits not in (*GAP_BITS, 0):
            raise ValueError(f"{where}: bits={short(bits)} does not fit encoding {encoding!r}. {DAMAGED}")
        if encoding == "gaps" and not bits:
            raise ValueError(f"{where}: bits=0 is not the width of a gap. {DAMAGED}")
        if history is not None and not (isinstance(history, list) and all(isinstance(step, str) for step in history)):
            raise ValueError(f"{where}: its history is not a list of strings. {DAMAGED}")
        if history is not None and encoding == "dense":
            raise ValueError(f"{where}: it has a history of pruning, but is written dense. {DAMAGED}")
        values, index = parts.get(f"{name}.values"), parts.get(f"{name}.{encoding}")
        layout = cls(DTYPES[dtype], tuple(said["shape"]), history=None if history is None else tuple(history))
        if encoding != "dense":
            layout = cls(
                layout.dtype,
                layout.shape,
                encoding,
                bits,
                survivors=values.shape[0] if values and values.shape else -1,
                index_bytes=index.shape[0] if index and index.shape else -1,
                negative_zeros=f"{name}.negative_zeros" in parts,
                history=layout.history,
            )
        layout._check(where, name, parts)
        return layout

    def _check(self, where: str, name: str, parts: dict[str, Part]) -> None:
        """Raise ``ValueError`` unless the parts of the file are those that the layout needs."""
        for key, needed in self.parts(name).items():
            part = parts.get(key)
            if part is None:
                raise ValueError(f"{where}: its part {short(key)} is missing. {DAMAGED}")
            if (part.code, part.shape) != (needed.code, needed.shape):
                raise ValueError(
                    f"{where}: its part {short(key)} has dtype {part.code} and shape {short(part.shape)}, "
                    f"but {needed.code} and {short(needed.shape)} are needed. {DAMAGED}"
                )
        if not 0 <= self.survivors <= self.numel or (
            self.encoding == "mask" and self.index_bytes != -(-self.numel // 8)
        ):
            raise ValueError(
                f"{where}: {self.survivors} survivors and {self.index_bytes} bytes of {self.encoding} do not fit its "
                f"{self.numel} entries. {DAMAGED}"
            )
        if self.negative_zeros and (self.history is not None or self.dtype not in SIGNED_ZERO):
            raise ValueError(f"{where}: it has a part of negative zeros, but cannot have any. {DAMAGED}")


KEYS = {"dtype", "shape", "encoding", "bits", "history"}


def _stored(dtype: torch.dtype, shape: tuple[int, ...]) -> Part:
    """Return the part that holds a tensor; a dtype that the container does not know is held as bytes."""
    return Part(CODE_OF[dtype], shape) if dtype in CODE_OF else Part("U8", (*shape, dtype.itemsize))


def words(tensor: Tensor) -> Tensor:
    """Return the entries of a 1-D contiguous tensor as integers of the same bits, ``[n]``; ``[n, 2]`` of 16 bytes."""
    size = tensor.element_size()
    found = tensor.view(WORDS[size])
    return found.view(-1, 2) if size == 16 else found


def nonzero(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which entries, given as words of ``dtype``, are neither 0 nor -0.0: bool ``[n]``."""
    alive = entries != 0
    if dtype in SIGNED_ZERO:
        alive &= entries != torch.iinfo(entries.dtype).min
    return alive.any(1) if alive.ndim > 1 else alive


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return numbers of ``bits`` bits, uint8 ``[n]``, as bytes, lowest bit first; zeros fill the last byte."""
    stream = ((codes.unsqueeze(1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8))
    return (stream.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=stream.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers of ``bits`` bits that are complete in the bytes ``packed``, as uint8."""
    stream = ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten()
    if bits == 1:
        return stream
    stream = stream[: len(stream) // bits * bits].view(-1, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=stream.device)).sum(1, dtype=torch.uint8)


def gaps_of(masks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the gaps before the survivors of a tensor, whose mask comes in blocks: int64."""
    start, last = 0, -1
    for alive in masks:
        places = alive.nonzero().flatten() + start
        yield torch.diff(places, prepend=torch.tensor([last], device=places.device)) - 1
        start, last = start + len(alive), int(places[-1]) if len(places) else last


def gap_bytes(masks: Iterable[Tensor]) -> dict[int, int]:
    """Return how many bytes the gaps of a tensor take, for each number of bits."""
    codes = dict.fromkeys(GAP_BITS, 0)
    for gaps in gaps_of(masks):
        for bits in GAP_BITS:
            codes[bits] += len(gaps) + int((gaps // (2**bits - 1)).sum())
    return {bits: -(-count * bits // 8) for bits, count in codes.items()}


def pack_gaps(masks: Iterable[Tensor], bits: int) -> Iterator[Tensor]:
    """Yield the gaps of a tensor in ``bits`` bits each, as bytes."""
    top, rest = 2**bits - 1, torch.empty(0, dtype=torch.uint8, device="cpu")
    for gaps in gaps_of(masks):
        ends = (gaps // top + 1).cumsum(0)  # a long gap is several codes
        codes = torch.full((int(ends[-1]) if len(ends) else 0,), top, dtype=torch.uint8, device=gaps.device)
        codes[ends - 1] = (gaps % top).to(torch.uint8)
        codes = torch.cat([rest, codes])
        whole = len(codes) // 8 * 8  # 8 codes fill whole bytes
        yield pack(codes[:whole], bits)
        rest = codes[whole:]
    yield pack(rest, bits)


def unpack_gaps(take: Callable[[int], Tensor], layout: Layout) -> Iterator[Tensor]:
    """Yield the places of the survivors, int64, ascending, in blocks that the bytes of the file bound, all checked.

    Args:
        take: returns the next bytes of the gaps, at most as many as it is given.
        layout: of the tensor.

    Raises:
        ValueError: the gaps do not end with the last survivor, or lead out of the tensor.
    """
    top, last, seen, used, final = 2**layout.bits - 1, -1, 0, 0, 0
    while len(packed := take(BLOCK // 128 * layout.bits)):  # a multiple of bits, so that no code is cut in two
        codes, final = unpack(packed, layout.bits), int(packed[-1])
        survives = codes != top
        places = last + (codes.to(torch.int64) + survives).cumsum(0)
        found, last = places[survives], int(places[-1])
        if seen + len(found) >= layout.survivors:  # the zeros that fill the last byte look like codes
            found = found[: layout.survivors - seen]
            ends = survives.nonzero().flatten()[: len(found)]
            codes = codes[: int(ends[-1]) + 1 if len(ends) else 0]
        used, seen = used + len(codes), seen + len(found)
        if len(found) and int(found[-1]) >= layout.numel:
            raise ValueError(f"its gaps lead to entry {int(found[-1])} of {layout.numel}. {DAMAGED}")
        yield found
    free = 8 * layout.index_bytes - used * layout.bits
    if seen < layout.survivors or free >= 8 or final >> (8 - free):
        raise ValueError(f"its gaps do not end with the last of its {layout.survivors} survivors. {DAMAGED}")
