"""Prune convolutions without training them, half of every row or 2 of 4, and see how often the answer stays the same.

Two networks, both without labels: EfficientNet-Lite0 with its published weights, and a small residual network that is
trained on digits here, which takes some seconds. Each is pruned by magnitude, and by splitting with a re-fit of what
survives; for 2:4 also with its channels in an order in which more is kept. The table tells how often the class is the
one that the dense network names first, and how far the logits are off, relative to their variation.

EfficientNet-Lite0 is calibrated on crops of one photograph of scikit-learn, a flower, and compared on crops of the
other, a temple: so few pictures do not say how good it is on ImageNet, only what pruning changes. Depthwise kernels
stay dense, as each of their outputs has one input channel, and so does the first convolution, which has three.

    pip install "torchprune-ext[efficientnet]"
    python examples/sparse_convolutions.py [--only residual] [--mnist DIR]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """Return EfficientNet-Lite0 and crops of two photographs; every second crop is of the same one."""
    crops = [torch.cat([photograph_crops(128, seed, right=right) for right in (False, True)]) for seed in (0, 1)]
    return Case(efficientnet_lite0(), list(crops[0][1::2].split(BATCH)), crops[1][0::2])


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
    """Return the weights that have four input channels or more."""
    layers = (each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear))
    return [(layer, "weight") for layer in layers if layer.weight.shape[1] >= 4]


def by_magnitude(case: Case, model: nn.Module, pattern: tpe.NM | None) -> None:
    """Keep the largest of each tensor, or of each group of ``pattern``."""
    for module, name in listed(model):
        if pattern is None:
            prune.l1_unstructured(module, name, amount=0.5)
        else:
            tpe.nm_structured(module, name, pattern.n, pattern.m)


def by_splitting(case: Case, model: nn.Module, pattern: tpe.NM | None) -> None:
    """Choose the masks and re-fit what survives, layer by layer, to what the dense network has there."""
    half = 0.5 if pattern is None else None
    tpe.prune_and_compensate(
        model, case.calibration, listed(model), target_sparsity=half, pattern=pattern, progress=sys.stderr.isatty()
    )


def permuted(way: Callable[[Case, nn.Module, tpe.NM | None], None]) -> Callable[..., None]:
    """Return a way of pruning that reorders the channels first."""

    def run(case: Case, model: nn.Module, pattern: tpe.NM | None) -> None:
        report = tpe.permute_for_nm(model, case.calibration[0][:4], listed(model))
        rows = [row for row in report.rows if row.moved]
        before, after = (sum(getattr(row, key) for row in rows) / len(rows) for key in ("before", "after"))
        print(f"  in another order: {len(rows)} of {len(report.rows)} tensors, kept {before:.1%} -> {after:.1%}")
        way(case, model, pattern)

    return run


def ways() -> Iterator[tuple[str, Callable[[Case, nn.Module, tpe.NM | None], None], tpe.NM | None]]:
    """Yield the name, the call and the pattern of each way to prune."""
    for label, pattern in (("50 %", None), ("2:4", tpe.NM(2, 4))):
        for name, way in (("magnitude", by_magnitude), ("splitting, re-fitted", by_splitting)):
            yield f"{name}, {label}", way, pattern
            if pattern is not None:
                yield f"{name}, {label}, permuted", permuted(way), pattern


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
        share = weights / sum(each.numel() for each in case.model.parameters())
        print(f"\n{name}: {len(own)} tensors, {share:.0%} of the parameters, can be pruned; ", end="")
        print(
            f"{len(case.reported)} images to compare, of {len(dense.argmax(1).unique())} classes for the dense network"
        )
        heads = (
            f"{'same class':>12}{'error':>12}{'accuracy':>12}"
            if case.labels is not None
            else f"{'same class':>12}{'error':>12}"
        )
        print(f"{'':<36}{heads}{'pruning':>12}")
        print(f"{'dense':<36}{row(dense, dense, case.labels)}")
        for told, way, pattern in ways():
            model, start = copy.deepcopy(case.model), time.perf_counter()
            way(case, model, pattern)
            taken = time.perf_counter() - start
            print(f"{told:<36}{row(logits(model, case.reported), dense, case.labels)}{taken:>10.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
