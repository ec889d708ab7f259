"""Terms to add to a training loss so that pruning costs less afterwards."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_ext._checks import check_module, check_weight
from torchprune_ext._host import Target


def bn_l1_penalty(model: nn.Module, strength: float = 1e-4) -> Tensor:
    r"""Return :math:`\lambda \sum |\gamma|` over the scales of all BatchNorms, to add to the loss.

    Pushes the scales of dispensable channels towards zero, so that ``bn_scaling`` finds them.

    Args:
        model: any module with BatchNorms; pruned scales count as 0.
        strength: the factor :math:`\lambda`, >= 0.

    Returns:
        A differentiable number in the units of ``strength``.

    Raises:
        TypeError: ``model`` is not a module, or ``strength`` is not a number.
        ValueError: the model has no BatchNorm with scales, or ``strength`` is negative or not finite.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, arXiv:1708.06519,
    equation 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> bn_l1_penalty(model, strength=0.5)
        tensor(2., grad_fn=<MulBackward0>)
    """
    check_module("model", model)
    check_weight("strength", strength)
    found = [Target.found(module, "weight") for module in model.modules() if isinstance(module, _BatchNorm)]
    scales = [t.parameter if t.mask is None else t.parameter * t.mask for t in found if t is not None]
    if not scales:
        raise ValueError(f"model of type {type(model).__name__} has no BatchNorm with scales. Leave the penalty out.")
    return strength * torch.stack([scale.abs().sum() for scale in scales]).sum()
