"""What re-fitting costs and gains for one large layer: seconds, memory and error, against SparseGPT.

A Linear of 4096 x 4096, random, and 8,192 rows of correlated inputs. The error is that of the outputs on these rows, in
squares relative to their variation. Memory is the rise of the peak in a fresh process, beside the layer and the rows.
Then a pass through a few random blocks of the shape of SmolLM2-135M's, 50 %: what its parts cost beside the bare
forward passes of the reference and of the pruned model, in processor seconds, which other programs do not change much.

Run: ``python examples/benchmark_compensation.py [--only layer|pass] [--size 4096] [--rows 8192] [--threads 2]``.
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import extra_megabytes, in_fresh_process
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext.compensation import Fits, calls, fitting, streams

BATCH = 1024
HIDDEN, KEYS, INNER, HEAD, BLOCKS, TOKENS = 576, 192, 1536, 64, 2, 256  # of SmolLM2-135M, which has 30 blocks
PARTS = {  # of a pass, and where the time goes there
    "rehearsal": (streams.Pass, "_rehearse"),
    "moments": (streams.Pass, "_bring"),
    "choosing what to keep": (calls, "split"),
    "re-fitting": (calls, "refit"),
    "errors before and after": (fitting, "_rounded"),
}
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

    def admm(self, pattern: tpe.NM | None) -> Fits:
        """Let ADMM, an operator splitting, choose, and re-fit."""
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
            "admm, compensated": self.admm,
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


# --- a pass ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a language model: attention in which three heads share keys, and a gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k, self.v = nn.Linear(HIDDEN, KEYS, bias=False), nn.Linear(HIDDEN, KEYS, bias=False)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of ``x``, ``(sequences, tokens, HIDDEN)``."""
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (heads.repeat_interleave(HIDDEN // KEYS, 1) for heads in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def timed(work: Callable[[], object]) -> float:
    """Return the processor seconds of ``work``, of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def parts_of_a_pass(sequences: int) -> dict[str, float]:
    """Return the processor seconds, for a block, of two bare forward passes, of a pass and of its parts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS))).eval()
    mixing = torch.randn(HIDDEN, HIDDEN) * torch.logspace(0, -1.5, HIDDEN)
    data = [torch.randn(len(part), TOKENS, HIDDEN) @ mixing.t() for part in torch.arange(sequences).split(8)]
    params = tpe.prunable_parameters(model, types=nn.Linear)
    spent = dict.fromkeys(PARTS, 0.0)
    Setting(64, 128).admm(None)  # load what loads late

    def counting(key: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return real(*args, **options)
            finally:
                spent[key] += time.process_time() - start

        return call

    for key, (owner, name) in PARTS.items():
        setattr(owner, name, counting(key, getattr(owner, name)))
    with torch.no_grad():
        model(data[0])  # warm up
        bare = timed(lambda: [model(x) for _ in range(2) for x in data])
    whole = timed(lambda: tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, progress=False))
    rest = whole - sum(spent.values())
    found = {"two bare forward passes": bare, **spent, "both streams, and the rest": rest, "the whole pass": whole}
    return {name: seconds / BLOCKS for name, seconds in found.items()}


def print_pass(sequences: int, threads: int) -> None:
    """Print what a pass costs."""
    print(
        f"torch {torch.__version__}, {threads} threads, float32; {sequences} sequences of {TOKENS} tokens, 50 %, "
        f"processor seconds for a block of 7 layers, and what they are of two bare passes\n"
    )
    found = parts_of_a_pass(sequences)
    for name, seconds in found.items():
        print(f"{name:<32}{seconds:>10.2f}{seconds / next(iter(found.values())):>10.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rows", type=int, default=8192, help="of data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64, help="that a pass goes through the blocks with")
    parser.add_argument("--only", choices=["layer", "pass"], help="one of the two parts")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "PATTERN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(*options.measure, options.size, options.rows)
        return
    if options.only != "pass":
        print_layer(options)
    if options.only != "layer":
        print_pass(options.sequences, options.threads)


def print_layer(options: argparse.Namespace) -> None:
    """Print what each way costs and gains for one layer."""
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
    print()


if __name__ == "__main__":
    main()
