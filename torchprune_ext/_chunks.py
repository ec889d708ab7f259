"""Work on large CPU tensors chunk by chunk, the chunks shared among threads.

Splitting each small operation over all cores, as torch does by itself, makes them wait for each other after each one,
which costs more than it gains as soon as another process wants a core. Here each thread takes whole chunks and works
through all operations of one while it lies in the cache.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar

import torch

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def over_chunks(work: Callable[[Chunk], Result], chunks: Iterable[Chunk]) -> Iterator[Result]:
    """Yield ``work(chunk)`` for all ``chunks`` in order, computed on as many threads as torch uses.

    Args:
        work: computes without gradients and writes, if at all, into memory that belongs to its chunk.
        chunks: what to work on.
    """
    chunks = list(chunks)
    threads = min(torch.get_num_threads(), len(chunks))
    if threads <= 1:
        yield from map(work, chunks)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(_like_the_caller(work), chunks, repeat(torch.is_inference_mode_enabled()))


def _like_the_caller(work: Callable[[Chunk], Result]) -> Callable[[Chunk, bool], Result]:
    """Return ``work`` with the modes that torch keeps per thread set as the caller has them."""

    def run(chunk: Chunk, inference: bool) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(chunk)

    return run
