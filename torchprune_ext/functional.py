"""One function per method, in the signature style of ``torch.nn.utils.prune``: prune in place, return the module.

For a whole model, call them in a loop over what :func:`.prunable_parameters` lists, or use their global forms, which
spend one budget on the list.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

from torch import Tensor, nn

from torchprune_ext.methods import (
    BlockLn,
    BNScaling,
    EveryOther,
    GradientMagnitude,
    KernelLn,
    NMStructured,
    OBDSaliency,
    Threshold,
    VectorLn,
)

_Arguments = ParamSpec("_Arguments")


def _one_tensor(function: Callable[_Arguments, nn.Module]) -> Callable[_Arguments, nn.Module]:
    """Let ``function`` show the loop to who passes a model's list of tensors as its module.

    Before Python counts the arguments: with a list, nobody passes a name.
    """

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> nn.Module:
        module = args[0] if args else kwargs.get("module")
        if isinstance(module, Iterable) and not isinstance(module, (nn.Module, Tensor, str)):
            raise TypeError(
                f"module is a {type(module).__name__}, but {function.__name__} prunes one tensor. Call it for each:\n"
                f"    for module, name in params:\n        tpe.{function.__name__}(module, name, ...)"
            )
        return function(*args, **kwargs)

    return call


@_one_tensor
def nm_structured(
    module: nn.Module,
    name: str,
    n: int,
    m: int,
    dim: int | None = None,
    *,
    pad: bool = False,
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Keep the ``n`` largest of every ``m`` consecutive entries along ``dim``; see :class:`.NMStructured`.

    By default groups run along the axis that the layer's product sums over.

    Example:
        >>> import torch
        >>> layer = nm_structured(torch.nn.Linear(8, 2), "weight", n=2, m=4)
        >>> layer.weight_mask.sum(1)
        tensor([4., 4.])
    """
    NMStructured.apply(module, name, n, m, dim, pad=pad, importance_scores=importance_scores)
    return module


@_one_tensor
def kernel_ln(
    module: nn.Module, name: str, amount: float, n: float = 2, *, importance_scores: Tensor | None = None
) -> nn.Module:
    """Drop the convolution kernels of smallest Ln norm; see :class:`.KernelLn`.

    Example:
        >>> import torch
        >>> conv = kernel_ln(torch.nn.Conv2d(3, 4, 5), "weight", amount=0.25)
        >>> int(conv.weight_mask.sum())  # of 3 * 4 kernels with 25 entries, 3 went
        225
    """
    KernelLn.apply(module, name, amount, n, importance_scores=importance_scores)
    return module


@_one_tensor
def vector_ln(
    module: nn.Module,
    name: str,
    amount: float,
    n: float = 2,
    dim: int = -1,
    *,
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Drop the 1-D vectors along ``dim`` of smallest Ln norm; see :class:`.VectorLn`.

    Example:
        >>> import torch
        >>> layer = vector_ln(torch.nn.Linear(3, 4), "weight", amount=1, dim=1)
        >>> int(layer.weight_mask.sum())  # one row of three entries went
        9
    """
    VectorLn.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


@_one_tensor
def block_ln(
    module: nn.Module,
    name: str,
    amount: float,
    n: float = 2,
    *,
    block: int | tuple[int, int],
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Drop the blocks of a matrix of smallest Ln norm; see :class:`.BlockLn`.

    Example:
        >>> import torch
        >>> layer = block_ln(torch.nn.Linear(8, 8), "weight", amount=0.5, block=4)
        >>> int(layer.weight_mask.sum())  # of 4 blocks of 16 entries, 2 went
        32
    """
    BlockLn.apply(module, name, amount, n, block=block, importance_scores=importance_scores)
    return module


@_one_tensor
def gradient_magnitude(module: nn.Module, name: str, amount: float, *, grad: Tensor | None = None) -> nn.Module:
    """Drop the entries whose loss gradient is smallest; see :class:`.GradientMagnitude`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> layer = gradient_magnitude(layer, "bias", 2, grad=torch.tensor([0.1, -0.3, 0.2, 0.0]))
        >>> layer.bias_mask
        tensor([0., 1., 1., 0.])
    """
    GradientMagnitude.apply(module, name, amount, grad=grad)
    return module


@_one_tensor
def obd_saliency(module: nn.Module, name: str, amount: float, *, hessian_diag: Tensor) -> nn.Module:
    """Drop the entries whose deletion is predicted to raise the loss least; see :class:`.OBDSaliency`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> layer = obd_saliency(layer, "weight", 0.5, hessian_diag=torch.ones(4, 3))
        >>> int(layer.weight_mask.sum())
        6
    """
    OBDSaliency.apply(module, name, amount, hessian_diag=hessian_diag)
    return module


@_one_tensor
def bn_scaling(module: nn.Module, name: str, amount: float, bn: nn.Module, *, paired: bool = True) -> nn.Module:
    """Drop the output channels whose BatchNorm scale is smallest; see :class:`.BNScaling`.

    Example:
        >>> import torch
        >>> conv, bn = torch.nn.Conv2d(3, 4, 5), torch.nn.BatchNorm2d(4)
        >>> conv = bn_scaling(conv, "weight", amount=0.5, bn=bn)
        >>> int((bn(conv(torch.ones(2, 3, 8, 8))) == 0).all((0, 2, 3)).sum())
        2
    """
    BNScaling.apply(module, name, amount, bn, paired=paired)
    return module


@_one_tensor
def threshold(module: nn.Module, name: str, threshold: float, *, importance_scores: Tensor | None = None) -> nn.Module:
    """Drop every entry whose score lies strictly below ``threshold``; see :class:`.Threshold`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> layer = threshold(layer, "weight", 0.3)
        >>> bool((layer.weight_orig[layer.weight_mask == 0].abs() < 0.3).all())
        True
    """
    Threshold.apply(module, name, threshold, importance_scores=importance_scores)
    return module


@_one_tensor
def every_other(module: nn.Module, name: str, step: int = 2, offset: int = 0) -> nn.Module:
    """Drop every ``step``-th of the entries not yet pruned; see :class:`.EveryOther`.

    Example:
        >>> import torch
        >>> every_other(torch.nn.Linear(3, 4), "bias", step=2, offset=1).bias_mask
        tensor([1., 0., 1., 0.])
    """
    EveryOther.apply(module, name, step, offset)
    return module
