"""Seconds and memory for the benchmarks: medians of alternating runs, peak memory in a fresh process."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of each call; the calls alternate, so that a busy machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm up
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def extra_megabytes(call: Callable[[], object]) -> float:
    """Return by how much ``call`` raised the peak of this process's resident memory, in MB (10**6 bytes).

    Only on Linux, and only in a process that has done nothing large before.
    """
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _peak()
    result = call()  # held until the peak is read: what the call leaves behind counts
    extra = _peak() - before
    del result
    return extra


def peak_megabytes(call: Callable[[], object], device: str = "cpu") -> float:
    """Return the most memory that this process had during ``call``, in MB (10**6 bytes), all in all.

    On a GPU what its tensors held; else what was resident, only on Linux.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    call()
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def in_fresh_process(script: str, *arguments: str) -> str:
    """Run ``script`` with ``arguments`` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def difference(weights: Sequence[Tensor], ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """Say whether two sets of masks agree, and if not, whether only ties at the threshold were cut differently."""
    apart = torch.cat([weight[a != b] for weight, a, b in zip(weights, ours, theirs, strict=True)]).abs()
    if not len(apart):
        return "identical"
    ties = sum(int((weight.abs() == apart[0]).sum()) for weight in weights)
    kept = sum(map(torch.sum, ours)) == sum(map(torch.sum, theirs))
    if kept and bool((apart == apart[0]).all()):
        return f"identical but for {len(apart)} of {ties} ties at the threshold"
    return f"DIFFERENT in {len(apart)} entries"
