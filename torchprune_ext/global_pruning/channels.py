"""One budget over the output channels of many layers, by the BatchNorms behind them."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from torchprune_ext._checks import check_module, errors_about
from torchprune_ext._host import Target
from torchprune_ext._scoring import bn_masks, bn_scores
from torchprune_ext.global_pruning.budget import (
    Budget,
    prune,
)
from torchprune_ext.selection import Cut, Scores, kept

__all__ = ["global_bn_scaling"]


def global_bn_scaling(
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    amount: float | None = None,
    *,
    paired: bool = True,
    target_sparsity: float | None = None,
    min_keep: float = 1,
    process_group: Any = None,
) -> None:
    r"""Drop the output channels whose BatchNorm scale :math:`|\gamma|` is smallest in the whole list.

    Args:
        pairs: ``(layer, bn)`` pairs, any iterable; see :func:`.bn_pairs`.
        amount: fraction (float) or number (int) of the channels of the list not yet pruned.
        paired: also mask the layers' biases and the weights and biases of the BatchNorms, see :class:`.BNScaling`.
        target_sparsity: instead of ``amount``, the fraction of all channels that shall be pruned in the end.
        min_keep: least number (int) or fraction (float) of the channels of each layer that stay.
        process_group: ranks that call this together, each with its own layers, for one budget over all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`global_unstructured` and :class:`.BNScaling`, or a layer or BatchNorm is in two pairs.
            Nothing is pruned then.
        RuntimeError: as :func:`global_unstructured`.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, arXiv:1708.06519:
    one global threshold on all scales.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3))
        >>> _ = model[1].weight.data.copy_(torch.tensor([0.9, 0.1, 0.8, 0.2]))  # as training would
        >>> global_bn_scaling(tpe.bn_pairs(model, torch.ones(1, 1, 8, 8)), amount=0.5)
        >>> int(model[0].weight_mask.amax((1, 2, 3)).sum())
        2
    """
    partner: dict[nn.Module, nn.Module] = {}

    def spread(target: Target, part: Scores, cut: Cut) -> Iterator[tuple[Target, Tensor]]:
        for each, _, mask in bn_masks(target, partner[target.module], kept(part, cut), paired=paired):
            yield each, mask

    prune(
        "global_bn_scaling",
        layers_of(pairs, partner),
        Budget(amount, target_sparsity, min_keep),
        "channels",
        lambda target: bn_scores(target, partner[target.module]),
        spread,
        process_group,
        param="pairs",
        paired=paired,
    )


def layers_of(
    pairs: Iterable[tuple[nn.Module, nn.Module]], partner: dict[nn.Module, nn.Module]
) -> Iterator[tuple[nn.Module, str]]:
    """Yield the layers of ``pairs`` as a list of tensors, and fill ``partner`` with the BatchNorm of each."""
    if isinstance(pairs, nn.Module) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is a {type(pairs).__name__}. Pass (layer, bn) pairs, e.g. of bn_pairs(model, inputs).")
    feeds: dict[int, nn.Module] = {}  # the layer before each BatchNorm, and the one that a weight was first seen in
    for place, pair in enumerate(pairs):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"pairs[{place}]={pair!r} is not a (layer, bn) pair, e.g. (model.conv1, model.bn1).")
        layer, bn = pair
        with errors_about(f"pairs[{place}]"):
            check_module("layer", layer)
            weight = Target.of(layer, "weight").parameter
        if partner.setdefault(layer, bn) is not bn or feeds.setdefault(id(bn), layer) is not layer:
            raise ValueError(
                f"pairs[{place}]: {type(layer).__name__} or {type(bn).__name__} stands in another pair too, so its "
                "channels belong to no pair alone. Prune it with bn_scaling(..., paired=False) or leave it out."
            )
        if feeds.setdefault(id(weight), layer) is not layer:
            raise ValueError(
                f"pairs[{place}]: the weight of {type(layer).__name__} of shape {tuple(weight.shape)} is tied to "
                "that of an earlier layer, so its channels belong to no pair alone. Untie them, or leave it out."
            )
        yield layer, "weight"
