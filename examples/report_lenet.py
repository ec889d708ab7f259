"""What pruning did to the chapter's LeNet: the report of each tensor, and the table of the models side by side.

    python examples/report_lenet.py --mnist DIR --checkpoint model.pt

Each layer is pruned by the chapter's amounts, by magnitude and without training, as the chapter does. ``--plots DIR``
draws both. Without ``--mnist`` and ``--checkpoint`` it trains a LeNet on scikit-learn's digits first. ``--layers 1000``
also times the report of a model of so many layers.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from pathlib import Path

import torch
from digits import load_mnist, load_sklearn_digits
from lenet import CHAPTER_AMOUNTS, accuracy, dense_network
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import plots


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="of each latency (%(default)s)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the report and the comparison into this folder")
    parser.add_argument("--layers", type=int, default=0, help="time the report of a model of so many layers")
    return parser.parse_args()


def many_layers(count: int) -> None:
    """Print how long the report of ``count`` layers takes, dense, pruned and made permanent."""
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(count)])
    for state in ("dense", "90 % by magnitude", "made permanent"):
        if state == "90 % by magnitude":
            tpe.prune_to(tpe.prunable_parameters(model), 0.9, scope="layer")
        elif state == "made permanent":
            tpe.remove_all(model)
        start, used = time.perf_counter(), time.process_time()
        tpe.report(model)
        wall, used = time.perf_counter() - start, time.process_time() - used
        print(f"{state:<18}  {wall:.2f} s ({used:.2f} s of the CPU)")


def main(arguments: argparse.Namespace) -> None:
    """Prune as the chapter does, and print what came of it."""
    torch.set_num_threads(arguments.threads)
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    dense = dense_network(arguments.checkpoint, digits, epochs=20, seed=0)
    pruned = copy.deepcopy(dense)
    for path, amount in CHAPTER_AMOUNTS.items():
        prune.l1_unstructured(pruned.get_submodule(path), "weight", amount)
    removed = tpe.remove_all(tpe.copy_pruned(pruned))

    images = digits.test.images[:64]
    report = tpe.report(pruned, images, threads=arguments.threads, rounds=arguments.rounds)
    comparison = tpe.compare(
        {"dense": dense, "pruned": pruned, "made permanent": removed},
        images,
        evaluate=lambda model: {"% right": accuracy(model, digits.test)},
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    print(f"{platform.machine()}, torch {torch.__version__}; {len(digits.test):,} {digits.name} test images\n")
    print(report)
    print(f"\n{comparison}")
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, ax in {"report": plots.density_bars(report), "compare": plots.compare(comparison)}.items():
            ax.figure.savefig(arguments.plots / f"{name}.png", dpi=150)
    if arguments.layers:
        print(f"\nreport of {arguments.layers:,} layers of 256 x 256, without inputs:")
        many_layers(arguments.layers)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
