"""Which axis of a weight the layer's product sums over."""

import math
import warnings
from collections import OrderedDict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext._host import Target


def reduction_axis(target: Target) -> tuple[int, int]:
    """Return the axis of a weight that its layer's product sums over, and into how many groups that axis falls.

    It is 1 where the weight is kept as (outputs, inputs, ...), as torch does in ``Linear``, convolutions, recurrent
    layers and attention; 0 in transposed convolutions, (inputs, outputs / groups, ...), whose outputs each sum over
    one of ``groups`` parts of it. A layer whose forward is not torch's own is tried out if its weight is a matrix:
    Hugging Face's ``Conv1D`` keeps (inputs, outputs). What cannot be tried out is taken for torch's.

    Raises:
        ValueError: the tensor has one axis, or three or more in a layer that is not a convolution of torch.
    """
    module, shape = target.module, target.parameter.shape
    if len(shape) < 2:
        raise ValueError(
            f"dim=None stands for the axis that the layer's product sums over, and {target.name!r} has no such axis. "
            "Pass dim=0, or leave the tensor out."
        )
    if isinstance(module, _ConvTransposeNd):
        return 0, module.groups
    forward = _forward_of(module)
    own = forward.__module__.startswith("torch.nn.modules.") and forward is not nn.Module.forward
    if own or isinstance(module, _ConvNd):
        return 1, 1
    if len(shape) > 2:
        raise ValueError(
            f"dim=None stands for the axis that the layer's product sums over, and a {type(module).__name__} does not "
            f"tell which of {len(shape)} that is. Pass dim=1 if the shape is (outputs, inputs, ...), dim=0 if it is "
            "(inputs, outputs, ...), or dim=2 for a stack of (outputs, inputs)."
        )
    return 0 if _keeps_inputs_first(target) else 1, 1


def _forward_of(module: nn.Module) -> Any:
    """Return the function that computes ``module``, without what others have put in its place in this instance."""
    return type(module).forward


def _keeps_inputs_first(target: Target) -> bool:
    """Try out whether each output of a layer reads one column of its weight, and not, as in ``Linear``, one row.

    The layer is a stand-in without hooks that shares nothing that its forward could write, in evaluation mode. What
    an output reads is where the gradient of that output is not 0; the values of the weight do not matter.
    """
    module, shape = target.module, target.parameter.shape
    if 0 in shape or any(True for child in module.children() for _ in child.parameters()):
        return False  # a block of layers, not a layer
    devices = [target.parameter.device] if target.parameter.is_cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = target.parameter.detach().clone().requires_grad_()
        for size, samples in product(dict.fromkeys((shape[1], shape[0])), ((2,), (1, 2))):
            x = torch.linspace(1, 2, math.prod(samples) * size, device=weight.device).to(weight.dtype)
            try:
                y = _forward_of(module)(_stand_in(module, {target.name: weight}), x.view(*samples, size))
                outputs = [each for each in (y if isinstance(y, tuple) else (y,)) if isinstance(each, Tensor)]
                output = next(each for each in outputs if each.dim() and each.requires_grad)
                [grad] = torch.autograd.grad(output[..., -1].sum(), weight)
            except Exception:  # whatever a forward raises that is called with what it does not expect
                continue
            read = grad != 0
            sizes = size, output.shape[-1]
            if sizes == (shape[1], shape[0]) and read[-1].any() and not read[:-1].any():
                return False
            if sizes == (shape[0], shape[1]) and read[:, -1].any() and not read[:, :-1].any():
                return True
    return False


def _stand_in(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a copy of ``module`` in evaluation mode, with its own tables and buffers and with ``tensors`` in it."""
    twin: nn.Module = object.__new__(type(module))
    own = {k: v for k, v in vars(module).items() if k not in tensors}
    own = {k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in own.items()}
    own = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in own.items()}
    vars(twin).update(own, training=False, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    twin._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    twin._modules = {k: None if child is None else _stand_in(child, {}) for k, child in module._modules.items()}
    for name in tensors:
        twin._parameters.pop(name, None)
    vars(twin).update(tensors)
    return twin
