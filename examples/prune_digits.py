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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import Digits, LabelledImages, LeNet, accuracy, load_mnist, load_sklearn_digits, progress, train
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.plots import density_bars, mask_cubes, mask_image, weight_histograms

try:
    import matplotlib
except ImportError:
    sys.exit("error: matplotlib is not installed: pip install torchprune-ext[demo]")
matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

LAYERS = ("conv2", "fc1", "fc2")
AMOUNT = 0.5  # what 2:4 prunes, so that it can be compared
CHAPTER_AMOUNTS = {"conv1": 0.85, "conv2": 0.80, "fc1": 0.75, "fc2": 0.70, "fc3": 0.80}
MOST_TRAINING_IMAGES = 10_000  # of a larger set, a random part of this size: the run stays short
STATISTICS_IMAGES = 1_000
FINE_TUNING_LR = 0.005
GAMMA_PENALTY = 1e-4  # weight of the L1 norm of the BatchNorm scales, as in Network Slimming


# --- the methods ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer to prune, with what a method may want to know besides its weight."""

    module: nn.Module
    batch_norm: nn.Module
    gradient: Tensor | None
    hessian_diag: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The layer's weight as it is now."""
        return self.module.get_parameter("weight").detach()


@dataclass(frozen=True)
class Recipe:
    """A way to prune: the call as a user writes it, the unit that is pruned as a whole, and the function."""

    call: str
    unit: str
    prune: Callable[[Sequence[Layer]], None]
    needs_gradients: bool = False
    needs_batch_norm: bool = False


def each(prune_one: Callable[[Layer], object]) -> Callable[[Sequence[Layer]], None]:
    """Return a function that prunes layer by layer."""

    def prune_all(layers: Iterable[Layer]) -> None:
        for layer in layers:
            prune_one(layer)

    return prune_all


def two_of_four(layer: Layer) -> None:
    """Prune 2 of 4 neighbouring inputs; ``pad`` because conv2 has 6 of them, of which the last 2 then stay."""
    tpe.nm_structured(layer.module, "weight", n=2, m=4, pad=True)


def half_of_each_row(layer: Layer) -> None:
    """Prune half of the inputs of every output: N:M with all inputs as one group, as Wanda compares weights."""
    inputs = layer.weight.shape[1]
    tpe.nm_structured(layer.module, "weight", n=inputs // 2, m=inputs)


def kernels(layer: Layer) -> None:
    """Prune whole kernels of a convolution; in a linear layer, a kernel would be a single entry."""
    if isinstance(layer.module, nn.Conv2d):
        tpe.kernel_ln(layer.module, "weight", AMOUNT, n=2)
    else:
        prune.l1_unstructured(layer.module, "weight", AMOUNT)


def by_curvature(layer: Layer) -> None:
    """Prune the entries whose removal raises the loss least, to second order."""
    assert layer.hessian_diag is not None
    tpe.obd_saliency(layer.module, "weight", AMOUNT, hessian_diag=layer.hessian_diag)


def smallest_left(weight: Tensor, amount: float) -> float:
    """Return the smallest magnitude that is left when the fraction ``amount`` of smaller ones is pruned."""
    magnitudes = weight.abs().flatten().sort().values
    return magnitudes[round(amount * len(magnitudes))].item()


def below_the_median(layer: Layer) -> None:
    """Prune the smaller half of the entries by the magnitude that divides it from the other half."""
    tpe.threshold(layer.module, "weight", threshold=smallest_left(layer.weight, AMOUNT))


def globally(layers: Iterable[Layer]) -> None:
    """Prune the smallest entries of all layers taken together, as PyTorch does."""
    prune.global_unstructured([(layer.module, "weight") for layer in layers], prune.L1Unstructured, amount=AMOUNT)


def rows_globally(layers: Iterable[Layer]) -> None:
    """Prune the filters and rows of smallest root mean square in all layers taken together."""
    tpe.global_ln_structured([(layer.module, "weight") for layer in layers], amount=AMOUNT, n=2, dim=0)


def patterns_globally(layers: Iterable[Layer]) -> None:
    """Give each layer its own n of 4, two of four on average."""
    tpe.global_nm_structured([(layer.module, "weight") for layer in layers], m=4, amount=AMOUNT, pad=True)


RECIPES = (
    Recipe("tpe.nm_structured(n=2, m=4, pad=True)", "2 of 4 inputs", each(two_of_four)),
    Recipe("tpe.nm_structured(n=inputs//2, m=inputs)", "half of each row", each(half_of_each_row)),
    Recipe("tpe.kernel_ln", "kernel (fc: entry)", each(kernels)),
    Recipe(
        "tpe.vector_ln(dim=-1)",
        "kernel row (fc: row)",
        each(lambda layer: tpe.vector_ln(layer.module, "weight", AMOUNT, n=2, dim=-1)),
    ),
    Recipe(
        "tpe.gradient_magnitude",
        "entry",
        each(lambda layer: tpe.gradient_magnitude(layer.module, "weight", AMOUNT, grad=layer.gradient)),
        needs_gradients=True,
    ),
    Recipe("tpe.obd_saliency", "entry", each(by_curvature), needs_gradients=True),
    Recipe("tpe.threshold(median)", "entry", each(below_the_median)),
    Recipe(
        "tpe.every_other(step=2)",
        "every second entry",
        each(lambda layer: tpe.every_other(layer.module, "weight", step=2)),
    ),
    Recipe(
        "tpe.global_unstructured",
        "entry of any layer",
        lambda layers: tpe.global_unstructured([(layer.module, "weight") for layer in layers], amount=AMOUNT),
    ),
    Recipe("tpe.global_nm_structured(m=4, pad=True)", "n of 4 inputs", patterns_globally),
    Recipe("tpe.global_ln_structured(dim=0)", "filter (fc: row)", rows_globally),
    Recipe(
        "prune.l1_unstructured",
        "entry",
        each(lambda layer: prune.l1_unstructured(layer.module, "weight", AMOUNT)),
    ),
    Recipe("prune.global_unstructured", "entry of any layer", globally),
    Recipe(
        "prune.random_unstructured",
        "entry",
        each(lambda layer: prune.random_unstructured(layer.module, "weight", AMOUNT)),
    ),
    Recipe(
        "prune.ln_structured(dim=0)",
        "filter (fc: row)",
        each(lambda layer: prune.ln_structured(layer.module, "weight", AMOUNT, n=2, dim=0)),
    ),
    Recipe(
        "prune.ln_structured(dim=1)",
        "input channel",
        each(lambda layer: prune.ln_structured(layer.module, "weight", AMOUNT, n=2, dim=1)),
    ),
    Recipe(
        "tpe.bn_scaling",
        "output channel",
        each(lambda layer: tpe.bn_scaling(layer.module, "weight", AMOUNT, bn=layer.batch_norm)),
        needs_batch_norm=True,
    ),
)


# --- networks and what is known about them --------------------------------------------------------


def new_network(seed: int, *, batch_norm: bool = False) -> LeNet:
    """Return a LeNet whose random weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet(batch_norm=batch_norm)


def load_checkpoint(file: Path) -> LeNet:
    """Return the LeNet whose state dict is in ``file``."""
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {file}: expected the state dict of the chapter's LeNet")
    model = LeNet()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


def dense_network(checkpoint: Path | None, digits: Digits, *, epochs: int, seed: int) -> LeNet:
    """Return the LeNet of ``checkpoint``, or else one trained here."""
    if checkpoint is not None:
        return load_checkpoint(checkpoint)
    if digits.train is None:
        raise FileNotFoundError("no training images in the MNIST folder: add them, or pass --checkpoint")
    model = new_network(seed)
    train(model, digits.train, epochs=epochs, seed=seed, title="training")
    return model


def gamma_penalty(model: nn.Module) -> Tensor:
    """Return the L1 norm of the BatchNorm scales, which makes those of unimportant channels small."""
    parameters = model.named_parameters()
    scales: list[Tensor] = [scale for name, scale in parameters if name.startswith("bn_") and name.endswith("weight")]
    return GAMMA_PENALTY * torch.cat(scales).abs().sum()


def collect_gradients(model: LeNet, data: LabelledImages) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, per layer, the gradient of the loss over ``data`` and a stand-in for the diagonal of its Hessian.

    The stand-in is the plain empirical Fisher: the mean of squared gradients over small batches. It is cheap and never
    negative, and large where the loss is sensitive, but it is not the curvature.
    """
    weights = [model.get_submodule(path).get_parameter("weight") for path in LAYERS]
    batches = list(zip(data.images.split(8), data.labels.split(8), strict=True))
    gradient = [torch.zeros_like(weight) for weight in weights]
    fisher = [torch.zeros_like(weight) for weight in weights]
    for images, labels in batches:
        found = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
        for position, one in enumerate(found):
            gradient[position] += one / len(batches)
            fisher[position] += one.square() / len(batches)
    return dict(zip(LAYERS, zip(gradient, fisher, strict=True), strict=True))


def layers_of(model: LeNet, gradients: dict[str, tuple[Tensor, Tensor]]) -> list[Layer]:
    """Return the layers of ``model`` that the comparison prunes."""
    return [
        Layer(model.get_submodule(path), model.get_submodule(f"bn_{path}"), *gradients.get(path, (None, None)))
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

    def pruned_row(self, recipe: Recipe, dense: LeNet, gradients: dict[str, tuple[Tensor, Tensor]]) -> Row:
        """Return the table's line for a copy of ``dense`` that is pruned by ``recipe``."""
        warm_up, model = copy.deepcopy(dense), copy.deepcopy(dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # for the random method
            recipe.prune(layers_of(warm_up, gradients))
            layers = layers_of(model, gradients)
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
    gradients, with_batch_norm = {}, None
    if digits.train is not None:
        gradients = collect_gradients(dense, digits.train.subset(STATISTICS_IMAGES, seed))
        with_batch_norm = new_network(seed, batch_norm=True)
        title = "training, BatchNorm"
        train(with_batch_norm, digits.train, epochs=epochs, seed=seed, penalty=gamma_penalty, title=title)
    for recipe in progress(RECIPES, "pruning and fine-tuning"):
        if recipe.needs_batch_norm and with_batch_norm is not None:
            rows.append(comparison.row("none, LeNet with BatchNorm", "-", 0.0, copy.deepcopy(with_batch_norm)))
            rows.append(comparison.pruned_row(recipe, with_batch_norm, gradients))
        elif not recipe.needs_batch_norm and (gradients or not recipe.needs_gradients):
            rows.append(comparison.pruned_row(recipe, dense, gradients))
    return rows


def prune_like_the_chapter(dense: LeNet) -> dict[str, LeNet]:
    """Return two copies of ``dense``, pruned to the chapter's sparsities: by PyTorch's method and by a threshold."""
    native, ours = copy.deepcopy(dense), copy.deepcopy(dense)
    for path, amount in CHAPTER_AMOUNTS.items():
        prune.l1_unstructured(native.get_submodule(path), "weight", amount)
        threshold = smallest_left(effective_weight(ours, path), amount)
        tpe.threshold(ours.get_submodule(path), "weight", threshold=threshold)
    return {"prune.l1_unstructured": native, "tpe.threshold": ours}


# --- pictures -------------------------------------------------------------------------------------

GRANULARITIES: dict[str, Callable[[nn.Module], object]] = {
    "entry\nprune.l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", AMOUNT),
    "2 of 4 input channels\ntpe.nm_structured": lambda conv: tpe.nm_structured(conv, "weight", n=2, m=4),
    "vector\ntpe.vector_ln": lambda conv: tpe.vector_ln(conv, "weight", AMOUNT),
    "kernel\ntpe.kernel_ln": lambda conv: tpe.kernel_ln(conv, "weight", AMOUNT),
    "filter\nprune.ln_structured, dim=0": lambda conv: prune.ln_structured(conv, "weight", AMOUNT, n=2, dim=0),
    "channel\nprune.ln_structured, dim=1": lambda conv: prune.ln_structured(conv, "weight", AMOUNT, n=2, dim=1),
}


def granularity_masks(seed: int) -> dict[str, Tensor]:
    """Return the masks that the granularities make of the same small convolution, half of it pruned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(4, 4, kernel_size=3)
    masks = {}
    for title, prune_one in GRANULARITIES.items():
        copied = copy.deepcopy(conv)
        prune_one(copied)
        masks[title] = copied.get_buffer("weight_mask")
    return masks


def draw_masks(masks: dict[str, Tensor]) -> Figure:
    """Draw the masks as matrices: a row of tiles per filter, a column per channel, a tile per kernel."""
    figure = pyplot.figure(figsize=(12, 8.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle("One convolution, half of its weights pruned: grey is pruned, blue is left")
    for position, (title, mask) in enumerate(masks.items(), start=1):
        filters, channels, height, width = mask.shape
        ax = figure.add_subplot(2, 3, position, title=title)
        mask_image(mask.transpose(1, 2).reshape(filters * height, channels * width), ax=ax)
        ax.set_xticks([width * (i + 0.5) - 0.5 for i in range(channels)], [f"channel {i}" for i in range(channels)])
        ax.set_yticks([height * (o + 0.5) - 0.5 for o in range(filters)], [f"filter {o}" for o in range(filters)])
        for channel in range(1, channels):
            ax.axvline(channel * width - 0.5, color="white", linewidth=5)
        for filter_ in range(1, filters):
            ax.axhline(filter_ * height - 0.5, color="white", linewidth=5)
    return figure


def draw_cubes(masks: dict[str, Tensor]) -> Figure:
    """Draw the same masks as cubes."""
    figure = pyplot.figure(figsize=(15, 6.4))
    figure.suptitle("One convolution, half of its weights pruned: transparent is pruned, blue is left")
    figure.subplots_adjust(left=0.03, right=0.99, bottom=0.0, top=0.94, wspace=0, hspace=0)
    for position, (title, mask) in enumerate(masks.items(), start=1):
        ax = mask_cubes(mask, ax=figure.add_subplot(2, 3, position, projection="3d"))
        ax.set_title(title, y=0.86)
    return figure


def figure_of(ax: Axes) -> Figure:
    """Return the figure that ``ax`` is in."""
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def save_pictures(dense: LeNet, pruned: LeNet, folder: Path, seed: int) -> list[Path]:
    """Save the four pictures in ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = granularity_masks(seed)
    figures = {
        "granularities_2d.png": draw_masks(masks),
        "granularities_3d.png": draw_cubes(masks),
        "histograms.png": figure_of(weight_histograms(pruned)[0]),
        "density.png": figure_of(density_bars(dense, pruned)),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        pyplot.close(figure)
    return [folder / name for name in figures]


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
