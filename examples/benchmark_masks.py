"""Cost of the masks against what users have now: ``topk``, a table of patterns, native ``L1Unstructured``.

Ratios travel, seconds do not; a plain copy of the tensor into new memory stands beside them as the physical limit.
Run: ``python examples/benchmark_masks.py [--size 4096] [--threads 2] [--rounds 5]``.
"""

import argparse
import itertools
import platform

import torch
from measure import difference, extra_megabytes, in_fresh_process, seconds
from torch import Tensor
from torch.nn.utils import prune

import torchprune_ext as tpe


def topk_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """N:M by ``topk`` over groups, the obvious way."""
    groups = weight.abs().view(-1, m)
    return torch.zeros_like(groups).scatter_(1, groups.topk(n, dim=1).indices, 1.0).view_as(weight)


def table_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """N:M by the product with a table of all patterns and ``argmax``, as the pruning chapter teaches."""
    patterns = torch.tensor([p for p in itertools.product((0.0, 1.0), repeat=m) if sum(p) == n])
    return patterns[(weight.abs().view(-1, m) @ patterns.t()).argmax(dim=1)].view_as(weight)


def our_entries(weight: Tensor, amount: float) -> Tensor:
    """Return the mask that ``gradient_magnitude(layer, "weight", amount, grad=weight)`` installs."""
    scores = tpe.selection.Scores.of(tpe.criteria.gradient_magnitude, weight)
    [cut] = tpe.selection.select_smallest([scores], round(amount * weight.numel()))
    return tpe.masks.entry_mask(scores, cut, weight)


def native_entries(weight: Tensor, amount: float) -> Tensor:
    """Return native's mask; like ours, without the time for a mask of ones to start from."""
    return prune.L1Unstructured(amount).compute_mask(weight, weight.new_ones(()).expand_as(weight))


def memory(size: int, which: str, amount: float) -> None:
    """Print the extra peak memory of one mask, in MB; run in a process of its own."""
    mask = {"ours": our_entries, "native": native_entries}[which]
    mask(torch.randn(64, 64), amount)  # what the libraries load on first use does not count
    weight = torch.randn(size, size)
    print(extra_megabytes(lambda: mask(weight, amount)))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("WHICH", "AMOUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory(options.size, options.memory[0], float(options.memory[1]))
        return

    torch.manual_seed(0)
    weight = torch.randn(options.size, options.size)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads, float32 "
        f"{options.size}x{options.size}, medians of {options.rounds} alternating runs"
    )
    copy = seconds({"copy": weight.clone}, options.rounds)["copy"]
    print(f"a copy of the tensor: {copy * 1e3:.1f} ms\n")

    print(f"{'N:M mask':<12}{'ours':>12}{'copies':>8}{'topk':>12}{'ratio':>8}{'table':>12}{'ratio':>8}")
    for n, m in [(2, 4), (1, 4), (4, 8), (8, 16)]:
        pattern = tpe.NM(n, m)
        calls = {
            "ours": lambda pattern=pattern: tpe.masks.nm_mask(weight, pattern),
            "topk": lambda n=n, m=m: topk_mask(weight, n, m),
        }
        if m == 4:
            calls["table"] = lambda n=n, m=m: table_mask(weight, n, m)
        same = all(torch.equal(calls["ours"](), call()) for call in calls.values())  # no ties in random numbers
        taken = seconds(calls, options.rounds)
        row = f"{f'{n}:{m}':<12}{taken['ours'] * 1e3:>9.1f} ms{taken['ours'] / copy:>8.1f}"
        for other in list(calls)[1:]:
            row += f"{taken[other] * 1e3:>9.1f} ms{taken[other] / taken['ours']:>7.1f}x"
        print(row + ("" if same else "  MASKS DIFFER"))

    print(
        f"\n{'entry mask':<12}{'ours':>12}{'copies':>8}{'native':>12}{'ratio':>8}{'ours':>12}{'native':>12}{'ratio':>8}"
    )
    for amount in (0.5, 0.9):
        calls = {
            "ours": lambda amount=amount: our_entries(weight, amount),
            "native": lambda amount=amount: native_entries(weight, amount),
        }
        same = difference([weight], [calls["ours"]()], [calls["native"]()])
        taken = seconds(calls, options.rounds)
        extra = {
            name: float(in_fresh_process(__file__, "--size", str(options.size), "--memory", name, str(amount)))
            for name in calls
        }
        print(
            f"{amount:<12}{taken['ours'] * 1e3:>9.1f} ms{taken['ours'] / copy:>8.1f}{taken['native'] * 1e3:>9.1f} ms"
            f"{taken['native'] / taken['ours']:>7.1f}x{extra['ours']:>9.0f} MB{extra['native']:>9.0f} MB"
            f"{extra['ours'] / extra['native']:>7.2f}x  masks {same}"
        )
    print("\nThe last three columns are the extra peak memory, each in a fresh process.")


if __name__ == "__main__":
    main()
