"""Which axis of a weight the layer's product sums over."""

import warnings
from collections import OrderedDict
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext._checks import warn
from torchprune_ext._host import Target


def reduction_axis(target: Target) -> tuple[int, int]:
    """Return the axis of a weight that its layer's product sums over, and into how many groups that axis falls.

    It is 1 where the weight is kept as (outputs, inputs, ...), as torch does in ``Linear``, convolutions, recurrent
    layers and attention; 0 in transposed convolutions, (inputs, outputs / groups, ...), whose outputs each sum over
    one of ``groups`` parts of it. A layer whose forward is not torch's own is tried out if its weight is a matrix:
    Hugging Face's ``Conv1D`` keeps (inputs, outputs). Where that does not tell, it is 1, with a warning.

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
    if isinstance(module, _ConvNd) or is_of_torch(module):
        return 1, 1
    if len(shape) > 2:
        raise ValueError(
            f"dim=None stands for the axis that the layer's product sums over, and a {type(module).__name__} does not "
            f"tell which of {len(shape)} that is. Pass dim=1 if the shape is (outputs, inputs, ...), dim=0 if it is "
            "(inputs, outputs, ...), or dim=2 for a stack of (outputs, inputs)."
        )
    axis = _tried_out(target)
    if axis is None:
        warn(
            f"{target.where}: dim=None stands for the axis that the layer's product sums over, which trying the layer "
            "out did not tell; taken for 1, as in Linear. Pass dim=1 if the shape is (outputs, inputs), else dim=0."
        )
    return 1 if axis is None else axis, 1


def is_of_torch(module: nn.Module) -> bool:
    """Return whether ``module`` computes as a layer of torch does, whoever has subclassed it or wrapped its forward."""
    forward = getattr(type(module), "forward", None)
    return forward is not nn.Module.forward and str(getattr(forward, "__module__", "")).startswith("torch.nn.modules.")


def _tried_out(target: Target) -> int | None:
    """Return the axis of a weight that its layer sums over; None if trying it out does not tell.

    Either shows it: what the last input feature multiplies, or what the last output feature reads, is where the
    gradient is not 0, and that is one column or one row of the weight. The values of the weight do not matter. The
    layer is a stand-in without hooks that shares nothing that its forward could write, in evaluation mode.
    """
    module, shape = target.module, target.parameter.shape
    if 0 in shape:
        return 1  # nothing to sum, on either axis
    if any(True for child in module.children() for _ in child.parameters()):
        return None  # a block of layers, not a layer
    devices = [target.parameter.device] if target.parameter.is_cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = target.parameter.detach().clone().requires_grad_()
        for (axis, samples), by_input in product(product((1, 0), ((2,), (1, 2))), (True, False)):
            x = torch.linspace(1, 2, shape[axis], device=weight.device).to(weight.dtype).repeat(*samples, 1)
            if by_input:
                x[..., :-1] = 0
            try:
                y = type(module).forward(_stand_in(module, {target.name: weight}), x)
                outputs = [each for each in (y if isinstance(y, tuple) else (y,)) if isinstance(each, Tensor)]
                output = next(each for each in outputs if each.requires_grad and each.shape[-1] == shape[1 - axis])
                # not the plain sum, which is constant behind a softmax
                seen = output * torch.arange(1, output.shape[-1] + 1, device=x.device) if by_input else output[..., -1]
                [read] = torch.autograd.grad(seen.sum(), weight)
            except Exception:  # whatever a forward raises that is called with what it does not expect
                continue
            lines = (read != 0).any(1 - axis if by_input else axis)  # the rows or columns that have been used
            if lines[-1] and not lines[:-1].any():
                return axis
    return None


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
