"""What re-fitting costs and gains for one large layer: seconds, memory and error, against SparseGPT.

A Linear of 4096 x 4096, random, and 8,192 rows of correlated inputs. The error is that of the outputs on these rows, in
squares relative to their variation. Memory is the rise of the peak in a fresh process, beside the layer and the rows.
Run: ``python examples/benchmark_compensation.py [--size 4096] [--rows 8192] [--threads 2]``.
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import extra_megabytes, in_fresh_process
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext.compensation import Fits

BATCH = 1024
PATTERNS: dict[str, tpe.NM | None] = {"50 %": None, "2:4": tpe.NM(2, 4)}


class Setting:
    """A layer and its inputs."""

    def __init__(self, size: int, rows: int) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(size, size)
        self.params: list[tuple[nn.Module, str]] = [(self.layer, "weight")]
        mixing = torch.randn(size, size) * torch.logspace(0, -1.5, size)  # few directions hold most of the variance
        self.data: list[tuple[Tensor, None]] = [
            (torch.randn(len(rows), size) @ mixing.t(), None) for rows in torch.arange(rows).split(BATCH)
        ]

    def magnitude(self, pattern: tpe.NM | None) -> Fits:
        """Prune by magnitude and re-fit."""
        size = self.layer.in_features
        n, m = (size // 2, size) if pattern is None else (pattern.n, pattern.m)
        tpe.nm_structured(self.layer, "weight", n, m)
        return tpe.compensate(self.layer, self.data, self.params, progress=False)

    def splitting(self, pattern: tpe.NM | None) -> Fits:
        """Let operator splitting choose, and re-fit."""
        goal: dict[str, Any] = {"target_sparsity": 0.5} if pattern is None else {"pattern": pattern}
        return tpe.prune_and_compensate(self.layer, self.data, self.params, progress=False, **goal)

    def sparsegpt(self, pattern: tpe.NM | None) -> Fits:
        """Prune as SparseGPT does."""
        goal: dict[str, Any] = {"target_sparsity": 0.5} if pattern is None else {"pattern": pattern}
        return tpe.sparsegpt(self.layer, self.data, self.params, progress=False, **goal)

    def ways(self) -> dict[str, Callable[[tpe.NM | None], Fits]]:
        """Return what is compared."""
        return {
            "SparseGPT": self.sparsegpt,
            "magnitude, compensated": self.magnitude,
            "splitting, compensated": self.splitting,
        }


def measure(way: str, pattern: str, size: int, rows: int) -> None:
    """Print error before and after, seconds and extra memory of one way; run in a process of its own."""
    Setting(64, 128).ways()[way](PATTERNS[pattern])  # load what loads late
    setting, found = Setting(size, rows), []
    start = time.perf_counter()
    megabytes = extra_megabytes(lambda: found.append(setting.ways()[way](PATTERNS[pattern])))
    seconds = time.perf_counter() - start
    fit = found[0][setting.params[0]]
    print(fit.before, fit.after, seconds, megabytes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rows", type=int, default=8192, help="of data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PATTERN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(*options.measure, options.size, options.rows)
        return

    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads, float32; "
        f"Linear {options.size} x {options.size}, {options.rows:,} rows\n\n"
        f"{'':<32}{'merely zeroed':>14}{'error':>10}{'seconds':>10}{'memory':>11}"
    )
    sizes = [f"--{name}={getattr(options, name)}" for name in ("size", "rows", "threads")]
    for pattern in PATTERNS:
        for way in Setting(4, 4).ways():
            output = in_fresh_process(__file__, *sizes, "--measure", way, pattern)
            before, after, seconds, megabytes = map(float, output.split())
            print(
                f"{f'{way}, {pattern}':<32}{before:>14.4f}{after:>10.4f}{seconds:>10.1f}{megabytes:>8.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
