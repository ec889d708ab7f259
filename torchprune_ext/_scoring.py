"""Scores of the tensors of a module: what the criteria need is found, checked, and bound to what is pruned already."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext import criteria
from torchprune_ext._checks import check_finite, check_tensor
from torchprune_ext._host import Target
from torchprune_ext.masks import unit_mask, units_alive
from torchprune_ext.patterns import Channel
from torchprune_ext.selection import Cut, Scores

SAMPLE, FEW = 4096, 0.05  # units that are looked at first, and the share of ties among them that is few


def gradient_scores(target: Target, grad: Tensor | None) -> Scores:
    """Return the scores of ``target`` by ``grad``, or by the gradient that its parameter holds.

    Raises:
        TypeError: ``grad`` is not a real floating point tensor.
        ValueError: there is no gradient, or it has another shape, or is not finite.
    """
    if grad is None:
        grad = target.parameter.grad
        if grad is None:
            raise ValueError(
                f"grad=None, and the parameter that owns the gradient ({target.stored_name}.grad) has none. "
                "Call loss.backward() first, or pass grad=."
            )
    grad = _on(target, "grad", grad)
    return Scores.of(criteria.gradient_magnitude, grad, alive=target.mask)


def obd_scores(target: Target, hessian_diag: Tensor) -> Scores:
    """Return the scores of ``target`` by its fresh weights and ``hessian_diag``.

    Raises:
        TypeError: ``hessian_diag`` is not a real floating point tensor.
        ValueError: it has another shape, or it, the weights or the saliencies are not finite.
    """
    hessian_diag = _on(target, "hessian_diag", hessian_diag)
    check_finite(target.name, target.parameter)
    scores = Scores.of(criteria.obd_saliency, target.parameter, hessian_diag, alive=target.mask)
    for index in scores.chunks():
        check_finite("hessian_diag * weight ** 2 / 2", scores.at(index))  # finite factors can overflow
    return scores


def bn_scores(target: Target, bn: nn.Module) -> Scores:
    """Return one score per output channel of ``target``, by the scales of the BatchNorm ``bn``.

    Raises:
        TypeError: ``bn`` is no BatchNorm.
        ValueError: ``bn`` has no scales, other channels than the layer, or scales that are not finite.
    """
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"bn={bn!r} is a {type(bn).__name__}. Pass the BatchNorm behind the layer.")
    if Target.found(bn, "weight") is None:
        raise ValueError(f"bn={bn!r} has no weight to rank channels by. Pass a BatchNorm made with affine=True.")
    gamma = Target.of(bn, "weight")
    if not target.parameter.numel():
        raise ValueError(f"{target.name} has no entries, so its channels cannot be pruned. Leave it out.")
    pattern = output_channels(target)
    blocks, axes = pattern.split(target.parameter)
    channels = math.prod(size for axis, size in enumerate(blocks.shape) if axis not in axes)
    if gamma.parameter.shape != (channels,):
        raise ValueError(
            f"bn={bn!r} has {gamma.parameter.numel()} channels, the layer has {channels} output channels. "
            "Pass the BatchNorm that the layer feeds."
        )
    check_finite("bn.weight", gamma.parameter)
    alive = None if target.mask is None else units_alive(pattern, target.mask)
    return Scores.of(criteria.bn_scale, gamma.weight(), alive=alive)


def bn_masks(target: Target, bn: nn.Module, keep: Tensor, *, paired: bool) -> Iterator[tuple[Target, Channel, Tensor]]:
    """Spread ``keep``, one flag per output channel, over ``target`` and, if ``paired``, all that acts on the channel.

    Yields:
        Each target, where it counts the channels, and its mask; first ``target`` itself.
    """
    patterns = {(target.module, target.name): (target, output_channels(target))}
    for module, name in [(target.module, "bias"), (bn, "weight"), (bn, "bias")] if paired else []:
        partner = Target.found(module, name)
        if partner is not None:
            patterns.setdefault((module, name), (partner, Channel()))
    for each, pattern in patterns.values():
        yield each, pattern, unit_mask(keep, pattern, each.parameter, each.mask)


def tied_at(part: Scores, cut: Cut) -> int:
    """Return how many living units of ``part`` score exactly what the cut lies at; 0 where a sample shows but few."""
    step = max(len(part) // SAMPLE, 1)
    some = part.at(torch.arange(0, len(part), step, device=part.inputs[0].device))
    if step > 1 and int((some == cut.value).count_nonzero()) < FEW * len(some):
        return 0  # reading all of a large tensor would cost as much as choosing from it
    return sum(int((part.at(index) == cut.value).count_nonzero()) for index in part.chunks())


def output_channels(target: Target) -> Channel:
    """Return where ``target`` counts the output channels of its layer: axis 1 of a transposed convolution, else 0.

    Raises:
        TypeError: the layer is of a type that does not tell its output channels.
    """
    if not isinstance(target.module, (nn.Linear, _ConvNd)):
        raise TypeError(
            f"module is a {type(target.module).__name__}, whose output channels are not known. "
            "Pass a Linear or a convolution; for other layers, prune with vector_ln and importance_scores."
        )
    if isinstance(target.module, _ConvTransposeNd) and target.parameter.dim() > 1:
        return Channel(1, target.module.groups)
    return Channel()


def _on(target: Target, param: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``, the caller's ``param``, checked to be finite and on the device of ``target``."""
    tensor = tensor.to_dense() if isinstance(tensor, Tensor) and tensor.is_sparse else tensor
    check_tensor(param, tensor, target.parameter.shape)
    check_finite(param, tensor)
    return tensor.detach().to(target.parameter.device)
