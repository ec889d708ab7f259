"""Prune convolutions without training them, half of every row or 2 of 4, and see how often the answer stays the same.

Two networks, both without labels: EfficientNet-Lite0 with its published weights, and a small residual network that is
trained on digits here, which takes some seconds. Each is pruned by magnitude, and by ADMM with a re-fit of what
survives; for 2:4 also with its channels in an order in which more is kept. The table tells how often the class is the
one that the dense network names first, and how far the logits are off, relative to their variation.

EfficientNet-Lite0 is calibrated on crops of the left two thirds of the two photographs of scikit-learn, and compared on
crops of the rest: so few pictures do not say how good it is on ImageNet, only what pruning changes. Depthwise kernels
stay dense, as each of their outputs has one input channel, and so do the first convolution, which has three, and the
classifier, which has more inputs than there are crops to fit it to.

    pip install "torchprune-ext[efficientnet]"
    python examples/sparse_convolutions.py [--only residual] [--mnist DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import load_mnist, load_sklearn_digits
from efficientnet_lite import efficientnet_lite0, photograph_crops
from lenet import train
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

BATCH = 32
Params = list[tuple[nn.Module, str]]


# --- the networks ---------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (batch, outputs, height / stride, width / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_network() -> nn.Sequential:
    """Return a residual network for images of one channel and ten classes: ResNet-18, narrow and of three stages."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Case:
    """A network, what it is calibrated on, what is compared, and the classes where they are known."""

    model: nn.Module
    calibration: list[Tensor]
    reported: Tensor
    labels: Tensor | None = None


def efficientnet(_: argparse.Namespace) -> Case:
    """Return EfficientNet-Lite0 and crops of two photographs, of different parts of them."""
    learnt, reported = photograph_crops(96, seed=0), photograph_crops(512, seed=1, right=True)
    return Case(efficientnet_lite0(), list(learnt.split(BATCH)), reported)


def residual(options: argparse.Namespace) -> Case:
    """Return a residual network that has learnt to read digits; it is calibrated on images that it was trained on."""
    torch.manual_seed(0)
    digits = load_sklearn_digits() if options.mnist is None else load_mnist(options.mnist)
    if digits.train is None:
        raise FileNotFoundError(f"no training images in {options.mnist}")
    learnt = digits.train.subset(10_000, seed=0)
    model = residual_network()
    train(model, learnt, epochs=10 if len(learnt) < 5_000 else 2, seed=0, lr=0.05)
    return Case(model.eval(), list(learnt.images[:1024].split(128)), digits.test.images, digits.test.labels)


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {"efficientnet-lite0": efficientnet, "residual": residual}


# --- the ways to prune ----------------------------------------------------------------------------


def listed(model: nn.Module) -> Params:
    """Return the weights of the convolutions that have four input channels or more."""
    layers = (each for each in model.modules() if isinstance(each, nn.Conv2d))
    return [(layer, "weight") for layer in layers if layer.weight.shape[1] >= 4]


def by_magnitude(_: Case, params: Params, pattern: tpe.NM | None) -> None:
    """Keep the largest half of each tensor, or the largest of each group of ``pattern``."""
    for module, name in params:
        if pattern is None:
            prune.l1_unstructured(module, name, amount=0.5)
        else:
            tpe.nm_structured(module, name, pattern.n, pattern.m)


def by_splitting(case: Case, params: Params, pattern: tpe.NM | None) -> None:
    """Choose the masks and re-fit what survives, layer by layer, to what the dense network has there."""
    half = 0.5 if pattern is None else None
    tpe.mask_zeros(params)  # a few weights of the published network are 0
    tpe.prune_and_compensate(
        case.model, case.calibration, params, target_sparsity=half, pattern=pattern, progress=sys.stderr.isatty()
    )


WAYS = {"magnitude": by_magnitude, "admm, re-fitted": by_splitting}


def pruned(case: Case) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield copies of a network that are pruned, with names and seconds; those in another order last."""
    for order in ("", ", in another order"):
        if order:
            start = time.perf_counter()
            report = tpe.permute_for_nm(case.model, case.calibration[0][:4], listed(case.model))
            rows = [row for row in report.rows if row.moved]
            before, after = (sum(getattr(row, key) for row in rows) / len(rows) for key in ("before", "after"))
            print(
                f"{len(rows)} of {len(report.rows)} tensors in another order, {time.perf_counter() - start:.0f} s: ",
                end="",
            )
            print(f"2:4 keeps {after:.1%} of their weights on average, not {before:.1%}")
        for label, pattern in (("50 %", None), ("2:4", tpe.NM(2, 4)))[bool(order) :]:
            for name, way in WAYS.items():
                model, start = copy.deepcopy(case.model), time.perf_counter()
                way(replace(case, model=model), listed(model), pattern)
                yield f"{name}, {label}{order}", model, time.perf_counter() - start


# --- the table ------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a network makes of images."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def row(found: Tensor, dense: Tensor, labels: Tensor | None) -> str:
    """Return how often the first class is that of the dense network, the error of the logits, and the accuracy."""
    same = float((found.argmax(1) == dense.argmax(1)).float().mean())
    error = float((found - dense).square().mean() / dense.var(0, correction=0).mean())
    right = "" if labels is None else f"{float((found.argmax(1) == labels).float().mean()):>12.1%}"
    return f"{same:>12.1%}{error:>12.3f}{right}"


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), help="only this network")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST, instead of scikit-learn's digits")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in [options.only] if options.only else CASES:
        case = CASES[name](options)
        dense = logits(case.model, case.reported)
        own = listed(case.model)
        weights = sum(module.get_parameter(key).numel() for module, key in own)
        share, classes = weights / sum(each.numel() for each in case.model.parameters()), len(dense.argmax(1).unique())
        print(f"\n{name}: {len(own)} tensors, {share:.0%} of the parameters, are pruned.")
        print(f"Compared on {len(case.reported)} images, of {classes} classes for the dense network.")
        accuracy = "" if case.labels is None else f"{'accuracy':>12}"
        print(f"{'':<44}{'same class':>12}{'error':>12}{accuracy}{'pruning':>12}")
        print(f"{'dense':<44}{row(dense, dense, case.labels)}")
        for told, model, taken in pruned(case):
            found = row(logits(model, case.reported), dense, case.labels)
            print(f"{told:<44}{found}{taken:>10.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
