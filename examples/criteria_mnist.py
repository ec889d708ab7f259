"""Which weights to drop: every criterion on the pruning chapter's LeNet, at equal sparsity and without training.

Computes the scores of each criterion from 5,000 training digits, prunes all five weights by them, once with the
chapter's sparsity for each layer and then with one threshold for the whole network, and prints one table:

    python examples/criteria_mnist.py --mnist DIR --checkpoint model.pt
    python examples/criteria_mnist.py --mnist DIR --checkpoint model.pt --slimming

With ``--slimming`` also the chapter's other example of scores from data: Network Slimming, with and without the
penalty that makes BatchNorm scales tell channels apart, and a picture of these scales. Without ``--mnist`` and
``--checkpoint`` it trains a LeNet on scikit-learn's digits first.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import Digits, LabelledImages, load_mnist, load_sklearn_digits
from lenet import BATCH_SIZE, CHAPTER_AMOUNTS, LeNet, accuracy, dense_network, new_network, progress, train
from pictures import pyplot
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext import calibration
from torchprune_ext.plots import DENSE, KEPT

STATISTICS_IMAGES = 5_000
SPARSITIES = (0.7387, 0.90, 0.95)  # the first is what the chapter's amounts leave of all parameters
SLIMMING_AMOUNT = 0.5
# The paper has 1e-4 for 160 epochs at ten times the learning rate; this run is short. Of 0.005, 0.01, 0.02, 0.05 and
# 0.1 this one kept the most accuracy after pruning (97.1 %) on 2,000 digits held out of MNIST's 10,000 for training.
SLIMMING_STRENGTH = 0.05
SLIMMING_EPOCHS = 4

Params = list[tuple[nn.Module, str]]
Statistics = dict[tuple[nn.Module, str], Tensor]


# --- the criteria ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What the criteria may look at, besides the weights."""

    model: LeNet
    params: Params
    images: LabelledImages
    seed: int

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """The images in batches of the size that training uses."""
        return list(zip(self.images.images.split(BATCH_SIZE), self.images.labels.split(BATCH_SIZE), strict=True))

    def scores(self, function: Callable[..., Statistics], **options: object) -> Statistics:
        """Return what a ``function`` of ``torchprune_ext.calibration`` finds by the cross-entropy."""
        return function(self.model, F.cross_entropy, self.loader, self.params, progress=False, **options)

    def generator(self) -> torch.Generator:
        """Return the source of what is random."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Criterion:
    """A way to score weights: its name, its statistic, and whether that is a curvature, to be taken times w^2."""

    name: str
    statistic: Callable[[Data, float], Statistics]  # the number is the sparsity that is aimed at
    curvature: bool = False

    def prune(self, params: Params, found: Statistics, target_sparsity: float) -> None:
        """Prune ``params`` by what ``statistic`` has found."""
        if self.curvature:
            tpe.global_obd_saliency(params, target_sparsity=target_sparsity, hessian_diag=found)
        else:
            tpe.global_unstructured(params, target_sparsity=target_sparsity, importance_scores=found)


def magnitudes(data: Data, _: float) -> Statistics:
    """Return the size of each weight."""
    return {(module, name): tpe.criteria.magnitude(module.get_parameter(name)) for module, name in data.params}


def hessian(**options: object) -> Callable[[Data, float], Statistics]:
    """Return a statistic: the diagonal of the Hessian."""
    return lambda data, _: data.scores(calibration.hessian_diagonal, generator=data.generator(), **options)


def synaptic_flow(data: Data, target_sparsity: float) -> Statistics:
    """Return SynFlow's scores, which need no data but the sparsity that they are for."""
    return calibration.synflow(data.model, data.images.images[:1], data.params, target_sparsity=target_sparsity)


CRITERIA = (
    Criterion("magnitude", magnitudes),
    Criterion("mean gradient", lambda data, _: data.scores(calibration.gradients)),
    Criterion("Taylor, per batch", lambda data, _: data.scores(calibration.taylor, per="batch")),
    Criterion("Taylor, per sample", lambda data, _: data.scores(calibration.taylor)),
    Criterion("Fisher x w^2", lambda data, _: data.scores(calibration.fisher), curvature=True),
    Criterion("GGN x w^2, exact", hessian(method="ggn"), curvature=True),
    Criterion("GGN x w^2, 1 probe", hessian(method="ggn", samples=1), curvature=True),
    Criterion("Hutchinson x w^2, 4 probes", hessian(method="hutchinson", samples=4), curvature=True),
    Criterion(
        "activations (Wanda)",
        lambda data, _: calibration.activations(data.model, data.loader, data.params, progress=False),
    ),
    Criterion("SNIP", lambda data, _: data.scores(calibration.snip)),
    Criterion("GraSP", lambda data, _: data.scores(calibration.grasp)),
    Criterion("SynFlow", synaptic_flow),
    Criterion("random", lambda data, _: calibration.random(data.params, generator=data.generator())),
)


# --- the table ------------------------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    """Return the processor time of ``call``, which on one thread is what it takes where nothing else runs."""
    start = time.process_time()
    call()
    return time.process_time() - start


def training_pass(data: Data) -> float:
    """Return the seconds of one pass of training over the images, median of three."""
    return sorted(
        seconds(lambda: train(copy.deepcopy(data.model), data.images, epochs=1, seed=data.seed)) for _ in range(3)
    )[1]


@torch.no_grad()
def pruned_accuracy(data: Data, test: LabelledImages, prune: Callable[[], None]) -> float:
    """Return the accuracy after ``prune``, which is taken back."""
    prune()
    found = accuracy(data.model, test)
    tpe.undo_all(data.model)
    return found


def row(criterion: Criterion, data: Data, test: LabelledImages, one_pass: float) -> str:
    """Return the table's line of ``criterion``."""
    found: dict[float, Statistics] = {}

    def statistic(target_sparsity: float) -> Statistics:
        """Return the statistic; only SynFlow's depends on the sparsity."""
        place = target_sparsity if criterion.statistic is synaptic_flow else 0.0
        if place not in found:
            found[place] = criterion.statistic(data, target_sparsity)
        return found[place]

    def like_the_chapter() -> None:
        for path, amount in CHAPTER_AMOUNTS.items():
            criterion.prune([(data.model.get_submodule(path), "weight")], statistic(SPARSITIES[0]), amount)

    def globally(sparsity: float) -> None:
        criterion.prune(data.params, statistic(sparsity), sparsity)

    cost = seconds(lambda: statistic(SPARSITIES[0])) / one_pass
    accuracies = [pruned_accuracy(data, test, like_the_chapter)]
    accuracies += [pruned_accuracy(data, test, lambda s=sparsity: globally(s)) for sparsity in SPARSITIES]
    return f"{criterion.name:<28}" + "".join(f"{value:>11.2f}" for value in accuracies) + f"{cost:>14.2f}"


def compare(model: LeNet, digits: Digits, seed: int) -> None:
    """Print the table of criteria."""
    assert digits.train is not None
    params = [(model.get_submodule(path), "weight") for path in CHAPTER_AMOUNTS]
    data = Data(model, params, digits.train.subset(STATISTICS_IMAGES, seed), seed)
    one_pass = training_pass(data)
    rows = [row(criterion, data, digits.test, one_pass) for criterion in progress(CRITERIA, "criteria")]
    amounts = ", ".join(f"{path} {amount:.0%}" for path, amount in CHAPTER_AMOUNTS.items())
    print(
        f"\nAccuracy without training, in percent of {len(digits.test):,} test images, statistics from "
        f"{len(data.images):,} training images.\nPer layer: {amounts}. Global: that fraction of all entries of the "
        f"five weights, one threshold.\nCost: in passes of training over the same images, batches of {BATCH_SIZE}, "
        f"one thread ({one_pass:.2f} s).\n"
    )
    columns = "".join(f"{f'{sparsity:.2%}':>11}" for sparsity in SPARSITIES)
    print(f"{'criterion':<28}{'per layer':>11}{columns}{'cost':>14}", *rows, sep="\n")


# --- Network Slimming -----------------------------------------------------------------------------


def scales(model: LeNet) -> Tensor:
    """Return the sizes of all BatchNorm scales."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return torch.cat([norm.get_parameter("weight").detach().abs() for norm in norms])


def slim(digits: Digits, seed: int, folder: Path) -> None:
    """Train with and without the penalty, prune channels by their scales, print the accuracies and draw the scales."""
    assert digits.train is not None
    start, found = time.perf_counter(), {}
    print(
        f"\nNetwork Slimming: LeNet with BatchNorm, {SLIMMING_EPOCHS} epochs on {len(digits.train):,} digits, "
        f"{SLIMMING_AMOUNT:.0%} of the channels pruned, one more epoch.\n"
    )
    print(f"{'penalty':<10}{'scales < 0.01':>15}{'dense':>9}{'pruned':>9}{'fine-tuned':>12}  channels left")
    for strength in (0.0, SLIMMING_STRENGTH):
        model = new_network(seed, batch_norm=True)
        train(
            model,
            digits.train,
            epochs=SLIMMING_EPOCHS,
            seed=seed,
            penalty=lambda model, strength=strength: tpe.bn_l1_penalty(model, strength),
            title=f"training, penalty {strength:g}",
        )
        found[strength] = scales(model)
        accuracies = [accuracy(model, digits.test)]
        pairs = tpe.bn_pairs(model, digits.test.images[:1])
        tpe.global_bn_scaling(pairs, amount=SLIMMING_AMOUNT)
        left = ", ".join(f"{int(bn.get_buffer('weight_mask').sum())} of {bn.weight.numel()}" for _, bn in pairs)
        accuracies.append(accuracy(model, digits.test))
        train(model, digits.train, epochs=1, seed=seed)
        accuracies.append(accuracy(model, digits.test))
        dense, pruned, tuned = accuracies
        small = int((found[strength] < 0.01).sum())
        cells = f"{strength:<10g}{f'{small} of {len(found[strength])}':>15}"
        print(f"{cells}{dense:>9.2f}{pruned:>9.2f}{tuned:>12.2f}  {left}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    draw_scales(found, folder / "bn_scales.png")
    print(f"\nPicture: {folder / 'bn_scales.png'}. Took {time.perf_counter() - start:.0f} s.")


def draw_scales(found: dict[float, Tensor], file: Path) -> None:
    """Draw a histogram of the scales for each strength of the penalty, and the value that splits them as asked."""
    figure, axes = pyplot.subplots(len(found), sharex=True, sharey=True, figsize=(7, 5), layout="constrained")
    largest = max(float(values.max()) for values in found.values())
    for ax, (strength, values), colour in zip(axes, found.items(), (DENSE, KEPT), strict=True):
        ax.hist(values.numpy(), bins=50, range=(0, largest), color=colour)
        ax.axvline(
            float(values.quantile(SLIMMING_AMOUNT)),
            color="black",
            linestyle="--",
            label=f"{SLIMMING_AMOUNT:.0%} are smaller",
        )
        ax.set(title=f"penalty {strength:g}" if strength else "no penalty", ylabel="channels")
        ax.legend()
    axes[-1].set_xlabel("size of the BatchNorm scale")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# --- the program ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--slimming", action="store_true", help="also train, slim and draw the LeNet with BatchNorm")
    parser.add_argument("--out", type=Path, default=Path("build/criteria"), metavar="DIR", help="picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Load or train, and print the tables."""
    torch.set_num_threads(1)  # the network is tiny, and the results do not depend on the number of cores
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    if digits.train is None:
        raise FileNotFoundError(f"no training images in {arguments.mnist}: most criteria need them")
    model = dense_network(arguments.checkpoint, digits, epochs=20, seed=arguments.seed)
    print(f"dense LeNet: {accuracy(model, digits.test):.2f} % of the {digits.name} test images right")
    compare(model, digits, arguments.seed)
    if arguments.slimming:
        slim(digits, arguments.seed, arguments.out)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
