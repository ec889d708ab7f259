"""Scores: how much each entry of a weight is worth.

Each criterion is a pure, elementwise function of tensors of one shape. It returns scores of that shape, >= 0, where
larger means keep. Because they are elementwise, the selection can apply them to one chunk of a large tensor at a time
and never hold the scores of a whole model.
"""

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    r"""Score each weight by its size, :math:`|w|`.

    Args:
        weight: weights of any shape.

    Returns:
        Scores of the same shape, in the units of the weight.

    Source: Han, Pool, Tran & Dally 2015, *Learning both Weights and Connections for Efficient Neural Networks*,
    arXiv:1506.02626, section 3.

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    return weight.abs()


def gradient_magnitude(grad: Tensor) -> Tensor:
    r"""Score each weight by the size of the loss gradient, :math:`|\partial L / \partial w|`.

    Args:
        grad: gradient of the loss with respect to the weight; the sign does not matter.

    Returns:
        Scores of the same shape, in units of the loss per unit of weight.

    Source: the simplest first-order criterion; Molchanov et al. 2017, *Pruning Convolutional Neural Networks for
    Resource Efficient Inference*, arXiv:1611.06440, section 2.2, multiply it by the activation.

    Example:
        >>> import torch
        >>> gradient_magnitude(torch.tensor([-0.1, 0.0]))
        tensor([0.1000, 0.0000])
    """
    return grad.abs()


def obd_saliency(weight: Tensor, hessian_diag: Tensor) -> Tensor:
    r"""Score each weight by the rise in loss predicted for deleting it, :math:`s_k = h_{kk} w_k^2 / 2`.

    Args:
        weight: weights of any shape.
        hessian_diag: second derivative of the loss with respect to each weight, of the same shape. Negative
            curvature contradicts the assumption of a minimum and scores 0; its absolute value would rank a descent
            direction as important.

    Returns:
        Scores of the same shape, in units of the loss, under the reduction that ``hessian_diag`` was taken with.

    Source: LeCun, Denker & Solla 1989, *Optimal Brain Damage*, step 4 of the recipe in section 2.2.

    Example:
        >>> import torch
        >>> obd_saliency(torch.tensor([2.0, 2.0, 1.0]), torch.tensor([1.0, -1.0, 4.0]))
        tensor([2., 0., 2.])
    """
    return 0.5 * hessian_diag.clamp_min(0) * weight * weight  # in this order, so that small squares do not vanish


def bn_scale(gamma: Tensor) -> Tensor:
    r"""Score each channel by the size of its BatchNorm scale, :math:`|\gamma|`.

    Args:
        gamma: the BatchNorm's weight, shape ``(channels,)``.

    Returns:
        Scores of shape ``(channels,)``, without unit.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, arXiv:1708.06519,
    section 3.

    Example:
        >>> import torch
        >>> bn_scale(torch.tensor([-1.0, 0.25]))
        tensor([1.0000, 0.2500])
    """
    return gamma.abs()
