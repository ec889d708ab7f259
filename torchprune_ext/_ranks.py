"""The processes that share one call: a thin layer over ``torch.distributed`` that also serves a single process."""

from collections.abc import Iterator, Mapping
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

    Raises:
        TypeError: ``group`` is something else, or this process is not in it.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"process_group={group!r} is not a group that this process is in. Pass "
                "torch.distributed.group.WORLD after init_process_group(), or what new_group(ranks) gave on its ranks."
            )
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

    def first(self, tensor: Tensor) -> Tensor:
        """Return the ``tensor`` of the first rank, bit for bit; all pass one of its shape and dtype."""
        if self.group is None or not tensor.numel():
            return tensor
        sent = tensor.detach().to(self._device(), copy=True, memory_format=torch.contiguous_format)
        dist.broadcast(sent.view(-1).view(torch.uint8), dist.get_global_rank(self.group, 0), group=self.group)
        return sent.to(tensor.device)

    def agree(self, what: str, text: str) -> None:
        """Raise ``RuntimeError`` on all ranks unless all pass the same ``text``, which tells ``what``."""
        if not self.alike(crc32(text.encode())):
            raise self._told(
                RuntimeError(f"{what} differ between ranks; here: {text}. Call all ranks alike. Nothing is pruned.")
            )

    def equal(self, what: str, checksums: Mapping[str, int], remedy: str) -> None:
        """Raise ``RuntimeError`` on all ranks unless all pass the same ``checksums``, of ``what``, by name."""
        if self.group is None:
            return
        self.agree(f"the names of {what}", str(list(checksums)))
        places = self.of_all(*checksums.values())
        others = [name for name, same in zip(checksums, (places == places[0]).all(0).tolist(), strict=True) if not same]
        if others:
            more = f" and {len(others) - 3} more" * (len(others) > 3)
            raise self._told(
                RuntimeError(
                    f"{what} differ between ranks: {', '.join(others[:3])}{more}. {remedy} Nothing is changed."
                )
            )

    def alike(self, number: int) -> bool:
        """Return whether all ranks pass the same ``number``."""
        return self.size == 1 or len(set(self.counts(number))) == 1

    def counts(self, count: int) -> list[int]:
        """Return the ``count`` of every rank, in rank order."""
        return self.of_all(count).flatten().tolist()

    def of_all(self, *numbers: int) -> Tensor:
        """Return the ``numbers`` of every rank, ``(ranks, numbers)``, int64."""
        places = torch.zeros(self.size, len(numbers), dtype=torch.int64, device="cpu")
        places[self.rank] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        return self.sum(places)

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
        """Run the body on every rank; an error on one stops all, so that none waits.

        The body may communicate where it does so in such a body itself: each error is told once.

        Raises:
            BaseException: what the body raised on this rank.
            RuntimeError: the body raised on another rank.
        """
        try:
            yield
        except BaseException as error:
            if self.group is not None and self.group not in getattr(error, "told", ()):
                self._told(error)
                self.counts(1)
            raise
        failed = [rank for rank, bad in enumerate(self.counts(0)) if bad]
        if failed:
            raise self._told(
                RuntimeError(f"ranks {failed} refused their part of this call; see their errors. Nothing is changed.")
            )

    def _told(self, error: Any) -> Any:
        """Return ``error``, marked as one that all ranks know of."""
        error.told = [*getattr(error, "told", ()), self.group]
        return error

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
