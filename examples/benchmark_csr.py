"""How fast a sparse ``Linear`` is on the CPU against the dense one: :func:`torchprune_ext.to_csr`.

Times alternate within one run, and each ratio is the median of the ratios of neighbours, with the interquartile range.

Run it with ``python examples/benchmark_csr.py`` on a machine that does nothing else; it takes a minute.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import torchprune_ext as tpe


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(dense, others, rounds):
    """Return the median seconds of ``dense``, and how often faster each other is: the quartiles of the ratios."""
    for call in (dense, *others.values()):
        call(), call()
    rows = [(seconds(dense), *(seconds(call) for call in others.values())) for _ in range(rounds)]
    faster = {
        name: statistics.quantiles([row[0] / row[1 + place] for row in rows], n=4) for place, name in enumerate(others)
    }
    return statistics.median(row[0] for row in rows), faster


def told(quartiles):
    lower, middle, upper = quartiles
    return f"{middle:5.2f}x ({lower:.2f} to {upper:.2f})"


def layer(size, sparsity, side):
    """Return a layer of which ``sparsity`` of the square blocks with this ``side`` are zero."""
    dense = nn.Linear(size, size).eval()
    blocks = torch.rand(size // side, size // side) >= sparsity
    with torch.no_grad():
        dense.weight.mul_(blocks.repeat_interleave(side, 0).repeat_interleave(side, 1))
    return dense


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--size", type=int, default=4096, help="of the square layer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--block", type=int, default=1, help="side of the square blocks that are zero as a whole")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32, {arguments.rounds} rounds")
    for sparsity in arguments.sparsity:
        dense = layer(arguments.size, sparsity, arguments.block)
        sparse = {"rows": tpe.CSRLinear(dense.weight, dense.bias)}
        if arguments.block > 1:
            sparse["blocks"] = tpe.CSRLinear(dense.weight, dense.bias, block=arguments.block)
        for batch in arguments.batch:
            x = torch.randn(batch, arguments.size)
            with torch.inference_mode():
                calls = {name: (lambda module=module, x=x: module(x)) for name, module in sparse.items()}
                base, faster = ratios(lambda x=x, dense=dense: dense(x), calls, arguments.rounds)
                apart = max(float((module(x) - dense(x)).abs().max()) for module in sparse.values())
            print(
                f"Linear {arguments.size}, {sparsity:.0%} zeros, batch {batch:3}: dense {base * 1e3:6.2f} ms; "
                + "; ".join(f"{name} {told(quartiles)}" for name, quartiles in faster.items())
                + f"; largest difference {apart:.0e}"
            )


if __name__ == "__main__":
    main()
