"""The ways to prune that ``prune_digits.py`` compares, each as a user would call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

AMOUNT = 0.5  # what 2:4 prunes, so that it can be compared


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
