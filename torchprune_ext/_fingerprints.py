"""A few numbers that tell whether a tensor still has the values that it had: no copy is kept, and it is read once."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._ranks import Ranks

LENGTH = 1 << 14  # entries that share a row of directions
NUMBERS = 8  # projections; all of them would have to agree by chance
WORDS, ODD = 1 << 16, 0x9E3779B97F4A7C15  # summed at once; what each sum moves those before it by
ROUNDING = 1e-5  # of the norm: what sums in another order may differ by


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Projections of a tensor's values onto fixed random directions.

    A change moves each projection by about its own norm times a standard normal number, so one that is missed is tiny
    beside the tensor, or an accident of a probability of about ``(ROUNDING * norm / change) ** NUMBERS``.

    Args:
        shape: the tensor's shape.
        projections: one number per direction, in the units of the tensor.
        norm: L2 norm of the tensor.
        precision: machine epsilon of its dtype.
    """

    shape: tuple[int, ...]
    projections: tuple[float, ...]
    norm: float
    precision: float

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        """Take the fingerprint of a floating-point tensor, on its device."""
        with torch.autocast(tensor.device.type, enabled=False):  # else products would be in half precision
            return cls._of(tensor)

    @classmethod
    def _of(cls, tensor: Tensor) -> "Fingerprint":
        flat = tensor.detach().reshape(-1)
        wide = torch.promote_types(flat.dtype, torch.float32)
        directions = _directions().to(flat.device, wide)
        whole = len(flat) // LENGTH * LENGTH
        sums, number = torch.zeros(NUMBERS, dtype=torch.float64, device=flat.device), 0
        for rows in flat[:whole].view(-1, LENGTH).split(LENGTH // 16):
            weights = torch.arange(number + 1, number + 1 + len(rows), dtype=torch.float64, device=flat.device).cos()
            sums += weights @ (rows.to(wide) @ directions).double()
            number += len(rows)
        sums += (flat[whole:].to(wide) @ directions[: len(flat) - whole]).double()
        norm = float(torch.linalg.vector_norm(flat, dtype=wide)) if len(flat) else 0.0
        return cls(tuple(tensor.shape), tuple(sums.tolist()), norm, torch.finfo(tensor.dtype).eps)

    def matches(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` has the values that this was taken of, but for a rounding to another dtype."""
        now = Fingerprint.of(tensor)
        if not (math.isfinite(self.norm) and math.isfinite(now.norm)):  # nothing can be told of NaN and infinity
            return self.shape == now.shape and not (math.isfinite(self.norm) or math.isfinite(now.norm))
        coarse = 0.0 if now.precision == self.precision else 8 * max(now.precision, self.precision)
        bound = max(ROUNDING, coarse) * max(self.norm, now.norm)
        close = (abs(a - b) <= bound for a, b in zip(self.projections, now.projections, strict=True))
        return self.shape == now.shape and all(close)


LOST = Fingerprint((), (math.nan,) * NUMBERS, 0.0, 0.0)  # of values that are gone: no tensor matches it


def checksum(tensor: Tensor) -> int:
    """Return a number that differs, in all likelihood, if any bit of ``tensor`` does; the same on all devices."""
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    factors = _factors().to(words.device)
    total = len(words)
    for some in words.split(WORDS):
        total = total * ODD + int((some.long() * factors[: len(some)]).sum())  # which wraps around
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def agree_on(ranks: Ranks, what: str, tensors: Mapping[str, Any], remedy: str) -> None:
    """Raise ``RuntimeError`` on all ranks unless all pass the same ``tensors``, bit for bit."""
    if ranks.group is not None:
        with ranks.together():
            checksums = {name: checksum(_tensor(tensor)) for name, tensor in tensors.items()}
        ranks.equal(what, checksums, remedy)


def _tensor(values: Any) -> Tensor:
    """Return ``values``, such as numbers in a list, as a tensor; tensors stay where they are."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def agree_on_values(ranks: Ranks, model: nn.Module, *, but: Collection[Tensor] = ()) -> None:
    """Raise ``RuntimeError`` on all ranks unless their models have the same values, ``but`` for those of some."""
    left = {id(tensor) for tensor in but}
    tensors = {n: t for n, t in chain(model.named_parameters(), model.named_buffers()) if id(t) not in left}
    remedy = "Give all ranks those of the first, e.g. by torch.distributed.broadcast(tensor, 0) for each of them."
    agree_on(ranks, "the values of the model", tensors, remedy)


@lru_cache(maxsize=1)
def _factors() -> Tensor:
    """Return odd numbers of 64 bits, ``(WORDS,)``: the same everywhere."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randint(-(2**63), 2**63 - 1, (WORDS,), generator=generator, device="cpu") | 1


@lru_cache(maxsize=1)
def _directions() -> Tensor:
    """Return the directions, ``(LENGTH, NUMBERS)``: the same everywhere."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        return torch.randn(LENGTH, NUMBERS, generator=generator, device="cpu")
