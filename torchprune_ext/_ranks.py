"""The processes that share one call: a thin layer over ``torch.distributed`` that also serves a single process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, or this process alone.

    Args:
        group: a ``torch.distributed`` process group; None for this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over the ranks, on the device that the group communicates with."""
        if self.group is None:
            return tensor
        total = tensor.to(self._device(), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of ``tensor`` over the ranks."""
        return self.sum(tensor / self.size)  # the sum of large values could overflow

    def totals(self, *counts: int) -> list[int]:
        """Return the sum of each of ``counts`` over the ranks."""
        return self.sum(torch.tensor(counts, dtype=torch.int64, device="cpu")).tolist()

    def total(self, count: int) -> int:
        """Return the sum of ``count`` over the ranks."""
        return self.totals(count)[0]

    def agree(self, what: str, text: str) -> None:
        """Raise ``RuntimeError`` on all ranks unless all pass the same ``text``, which tells ``what``."""
        if not self.alike(crc32(text.encode())):
            raise RuntimeError(f"{what} differ between ranks; here: {text}. Call all ranks alike. Nothing is pruned.")

    def alike(self, number: int) -> bool:
        """Return whether all ranks pass the same ``number``."""
        return self.size == 1 or len(set(self.counts(number))) == 1

    def counts(self, count: int) -> list[int]:
        """Return the ``count`` of every rank, in rank order."""
        places = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        places[self.rank] = count
        return self.sum(places).tolist()

    def concatenate(self, tensor: Tensor) -> Tensor:
        """Return the 1-D tensors of all ranks, of any lengths, one behind the other."""
        if self.group is None:
            return tensor
        counts = self.counts(len(tensor))
        places = torch.zeros(sum(counts), dtype=tensor.dtype, device="cpu")
        start = sum(counts[: self.rank])
        places[start : start + len(tensor)] = tensor
        return self.sum(places)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body, which must not communicate, on every rank; an error on one stops all, so that none waits.

        Raises:
            Exception: what the body raised on this rank.
            RuntimeError: the body raised on another rank.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = [rank for rank, bad in enumerate(self.counts(int(error is not None))) if bad]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"ranks {failed} refused their part of this call; see their errors. Nothing is changed.")

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
