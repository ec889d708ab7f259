"""Prune a network that reads handwritten digits by every method, at equal sparsity, and compare.

Trains the pruning chapter's LeNet on scikit-learn's digits (or loads ``--checkpoint``), prunes copies of it by the
methods of torchprune_ext and by PyTorch's own, fine-tunes each copy briefly, prints one table and saves four pictures:

    python examples/prune_digits.py
    python examples/prune_digits.py --mnist DIR --checkpoint model.pt

The comparison prunes half of conv2, fc1 and fc2, which hold 97 % of the parameters. The first and the last layer stay
dense, as usual: they are small, and pruning an output of the last layer would delete a class.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import Digits, LabelledImages, load_mnist, load_sklearn_digits
from lenet import BATCH_SIZE, CHAPTER_AMOUNTS, LeNet, accuracy, dense_network, new_network, progress, train
from pictures import save_pictures
from recipes import AMOUNT, RECIPES, Layer, Recipe, smallest_left
from torch import Tensor
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import calibration

LAYERS = ("conv2", "fc1", "fc2")
MOST_TRAINING_IMAGES = 10_000  # of a larger set, a random part of this size: the run stays short
STATISTICS_IMAGES = 1_000
FINE_TUNING_LR = 0.005


# --- what is known about a network ----------------------------------------------------------------


def statistics_of(model: LeNet, data: LabelledImages) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each layer, the gradient of the loss over ``data`` and the Fisher information, for its Hessian."""
    params = [(model.get_submodule(path), "weight") for path in LAYERS]
    loader = list(zip(data.images.split(BATCH_SIZE), data.labels.split(BATCH_SIZE), strict=True))
    gradients, fisher = (
        statistic(model, F.cross_entropy, loader, params, progress=False)
        for statistic in (calibration.gradients, calibration.fisher)
    )
    return {path: (gradients[pair], fisher[pair]) for path, pair in zip(LAYERS, params, strict=True)}


def layers_of(model: LeNet, statistics: dict[str, tuple[Tensor, Tensor]]) -> list[Layer]:
    """Return the layers of ``model`` that the comparison prunes."""
    return [
        Layer(model.get_submodule(path), model.get_submodule(f"bn_{path}"), *statistics.get(path, (None, None)))
        for path in LAYERS
    ]


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table; accuracies in percent, ``None`` where there is nothing to tell."""

    call: str
    unit: str
    asked: float
    reached: float
    before: float
    after: float | None
    seconds: float | None

    def __str__(self) -> str:
        after = "-" if self.after is None else f"{self.after:.2f} %"
        seconds = "-" if self.seconds is None else f"{self.seconds:.4f}"
        cells = f"{self.call:<42}{self.unit:<22}{self.asked:>7.1%}{self.reached:>9.1%}"
        return f"{cells}{self.before:>10.2f} %{after:>12}{seconds:>10}"


HEADER = f"{'method':<42}{'unit':<22}{'asked':>7}{'reached':>9}{'accuracy':>12}{'fine-tuned':>12}{'seconds':>10}"


@dataclass(frozen=True)
class Comparison:
    """Everything that the rows of the table have in common."""

    digits: Digits
    seed: int
    epochs: int  # of the fine-tuning

    def row(self, call: str, unit: str, asked: float, model: LeNet, seconds: float | None = None) -> Row:
        """Return the table's line for ``model``, which is fine-tuned in place."""
        reached = sparsity(model)
        before, after = accuracy(model, self.digits.test), None
        if self.digits.train is not None:
            train(model, self.digits.train, epochs=self.epochs, seed=self.seed, lr=FINE_TUNING_LR)
            after = accuracy(model, self.digits.test)
            assert sparsity(model) == reached, "fine-tuning has brought pruned weights back"
        return Row(call, unit, asked, reached, before, after, seconds)

    def pruned_row(self, recipe: Recipe, dense: LeNet, statistics: dict[str, tuple[Tensor, Tensor]]) -> Row:
        """Return the table's line for a copy of ``dense`` that is pruned by ``recipe``."""
        warm_up, model = copy.deepcopy(dense), copy.deepcopy(dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # for the random method
            recipe.prune(layers_of(warm_up, statistics))
            layers = layers_of(model, statistics)
            start = time.perf_counter()
            recipe.prune(layers)
            seconds = time.perf_counter() - start
        return self.row(recipe.call, recipe.unit, AMOUNT, model, seconds)


def effective_weight(model: LeNet, path: str) -> Tensor:
    """Return the weight that the layer at ``path`` computes with, its pruned entries being 0."""
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def sparsity(model: LeNet) -> float:
    """Return the fraction of the weights in ``LAYERS`` that is 0."""
    weights = [effective_weight(model, path) for path in LAYERS]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def compare(dense: LeNet, digits: Digits, *, seed: int, epochs: int) -> list[Row]:
    """Return the table: the dense network and copies of it, pruned by each recipe and then fine-tuned.

    Args:
        dense: the trained network; left as it is.
        digits: without training images, only the recipes that need none are compared, and nothing is fine-tuned.
        seed: of everything random.
        epochs: of training the variant with BatchNorm; the fine-tuning takes a fifth of them.
    """
    comparison = Comparison(digits, seed, max(1, epochs // 5))
    rows = [comparison.row("none", "-", 0.0, copy.deepcopy(dense))]
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    with_batch_norm = None
    if digits.train is not None:
        statistics = statistics_of(dense, digits.train.subset(STATISTICS_IMAGES, seed))
        with_batch_norm = new_network(seed, batch_norm=True)
        title = "training, BatchNorm"
        train(with_batch_norm, digits.train, epochs=epochs, seed=seed, penalty=tpe.bn_l1_penalty, title=title)
    for recipe in progress(RECIPES, "pruning and fine-tuning"):
        if recipe.needs_batch_norm and with_batch_norm is not None:
            rows.append(comparison.row("none, LeNet with BatchNorm", "-", 0.0, copy.deepcopy(with_batch_norm)))
            rows.append(comparison.pruned_row(recipe, with_batch_norm, statistics))
        elif not recipe.needs_batch_norm and (statistics or not recipe.needs_gradients):
            rows.append(comparison.pruned_row(recipe, dense, statistics))
    return rows


def prune_like_the_chapter(dense: LeNet) -> dict[str, LeNet]:
    """Return two copies of ``dense``, pruned to the chapter's sparsities: by PyTorch's method and by a threshold."""
    native, ours = copy.deepcopy(dense), copy.deepcopy(dense)
    for path, amount in CHAPTER_AMOUNTS.items():
        prune.l1_unstructured(native.get_submodule(path), "weight", amount)
        threshold = smallest_left(effective_weight(ours, path), amount)
        tpe.threshold(ours.get_submodule(path), "weight", threshold=threshold)
    return {"prune.l1_unstructured": native, "tpe.threshold": ours}


# --- the program ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="pictures (%(default)s)")
    parser.add_argument("--epochs", type=int, help="of training (default: 20, or 4 on more than 5,000 images)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Train or load, compare, print and draw."""
    torch.set_num_threads(1)  # the network is tiny, and the results do not depend on the number of cores
    start = time.perf_counter()
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    if digits.train is not None:
        digits = replace(digits, train=digits.train.subset(MOST_TRAINING_IMAGES, arguments.seed))
    epochs = arguments.epochs
    if epochs is None:
        epochs = 20 if digits.train is None or len(digits.train) <= 5_000 else 4
    print(f"{digits.name}: {len(digits.train or ()):,} training and {len(digits.test):,} test images")
    dense = dense_network(arguments.checkpoint, digits, epochs=epochs, seed=arguments.seed)
    print(f"dense LeNet: {accuracy(dense, digits.test):.2f} % of the test images right")

    rows = compare(dense, digits, seed=arguments.seed, epochs=epochs)
    print(
        f"\nHalf of the weights of {', '.join(LAYERS)} pruned; accuracy of the copies, before and after fine-tuning:\n"
    )
    print(HEADER, *rows, sep="\n")
    if digits.train is None:
        print("No training images: nothing fine-tuned; gradient_magnitude, obd_saliency and bn_scaling left out.")

    chapter = prune_like_the_chapter(dense)
    amounts = ", ".join(f"{path} {amount:.0%}" for path, amount in CHAPTER_AMOUNTS.items())
    print(f"\nThe chapter's sparsities by magnitude, not fine-tuned ({amounts}):\n")
    for call, model in chapter.items():
        print(f"{call:<42}{accuracy(model, digits.test):.2f} %")
    paths = save_pictures(dense, chapter["tpe.threshold"], arguments.out, arguments.seed)
    print("\nPictures:", *paths, sep="\n  ")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
