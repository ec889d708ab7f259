"""How long calls take, side by side in one run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

BLOCK = 2e-4  # seconds that a measurement lasts at least: long for the clock, short for what else the machine does


@dataclass(frozen=True, slots=True)
class Times:
    """How long one call took.

    Args:
        median: seconds.
        spread: interquartile range, in seconds.
        threads: number of threads that torch had, on the CPU.
    """

    median: float
    spread: float
    threads: int


def medians(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 11, threads: int | None = None
) -> dict[str, Times]:
    """Return how long each call takes; the calls alternate, so that a busy machine hits all of them alike.

    Goes through :class:`torch.utils.benchmark.Timer`, which warms up and waits for the GPU.

    Args:
        calls: what to time, by name. Gradients and inference mode are as they are outside.
        rounds: how often each is measured, at least 2.
        threads: number of threads for torch on the CPU; by default as many as it has now.

    Returns:
        The times, by name.

    Example:
        >>> x = torch.ones(100, 100)
        >>> times = medians({"once": lambda: x @ x, "ten times": lambda: [x @ x for _ in range(10)]})
        >>> times["once"].median < times["ten times"].median
        True
    """
    from torch.utils.benchmark import Timer  # not on import: it looks for compilers

    threads = torch.get_num_threads() if threads is None else threads
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    numbers = {name: math.ceil(BLOCK / timer.timeit(1).times[0]) for name, timer in timers.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            taken[name].append(timer.timeit(numbers[name]).times[0])  # .median uses the default device
    return {name: _times(seconds, threads) for name, seconds in taken.items()}


def _times(seconds: list[float], threads: int) -> Times:
    lower, _, upper = quantiles(seconds, n=4)
    return Times(median(seconds), upper - lower, threads)
