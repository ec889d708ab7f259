"""Zeros that stay zero while training goes on without masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._checks import check_module
from torchprune_ext._host import kept_zeros


class KeptZeros:
    """What :func:`keep_zeros` returns: its end, as for any handle of a hook in torch.

    Args:
        handles: handles of the hooks.
    """

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Let the zeros train again. Momentum of the optimizer is 0 there if it was when they were kept first."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "KeptZeros":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def keep_zeros(model: nn.Module, optimizer: Optimizer) -> KeptZeros:
    """Keep the zeros that ``remove(..., keep_zeros=True)`` made at exactly 0 in all training by ``optimizer``.

    Their gradients are set to 0 after each backward pass, so that the norm of the gradients, and with it
    ``clip_grad_norm_``, is that of the survivors, and they are set to 0 after each step, whatever momentum or weight
    decay makes of them. Training goes on as it did with the mask, without the mask's cost.

    The zeros are remembered in the module, as ``weight_zeros``: a boolean buffer, one byte per entry, which moves and
    is copied with the model and is not in its state dict. What lasts:

    - ``model.load_state_dict`` and ``optimizer.load_state_dict`` change nothing: the zeros are still kept. Other values
      that are loaded there are 0 after the next step.
    - A model that is built anew, or an optimizer, starts without: make masks of its zeros, ``remove`` them with
      ``keep_zeros=True``, and call this again.

    Args:
        model: a module with such zeros.
        optimizer: any ``torch.optim.Optimizer`` over its parameters: ``foreach``, ``fused``, with momentum, weight
            decay or a gradient scaler. For several, call once for each. Parameters that it does not hold are not
            touched.

    Returns:
        A handle. ``handle.remove()`` lets the zeros train again; in a ``with`` statement, the end of it does.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` not an optimizer.
        ValueError: nothing in ``model`` was removed with ``keep_zeros=True``, or the optimizer holds none of it.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(tpe.every_other(nn.Linear(4, 2), "weight"))
        >>> optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        >>> _ = tpe.remove(model[0], "weight", keep_zeros=True)
        >>> handle = tpe.keep_zeros(model, optimizer)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> int((model[0].weight == 0).sum())
        4
    """
    check_module("model", model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}. Pass the torch.optim.Optimizer that trains the model; of a "
            "wrapper, the one inside."
        )
    found = list(kept_zeros(model))
    if not found:
        raise ValueError(
            f"model of type {type(model).__name__} has no zeros to keep. Make pruning permanent by "
            "remove(module, name, keep_zeros=True) or remove_all(model, keep_zeros=True) first."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {id(target.parameter): target.parameter for target, _ in found if id(target.parameter) in held}
    if not parameters:
        raise ValueError(
            f"optimizer holds none of the {len(found)} tensors with zeros of {type(model).__name__}. "
            "Pass the optimizer that was made with model.parameters()."
        )
    modules = nn.ModuleList(dict.fromkeys(target.module for target, _ in found))

    @torch.no_grad()
    def after_step(*_: Any) -> None:
        for target, zeros in kept_zeros(modules):  # found anew: they may have moved to another device
            if id(target.parameter) in parameters:
                target.parameter.masked_fill_(zeros, 0)

    handles: list[Any] = [optimizer.register_step_post_hook(after_step)]
    for target, _ in found:
        if id(target.parameter) in parameters and target.parameter.requires_grad:
            hook = _after_backward(target.module, f"{target.name}_zeros")
            handles.append(target.parameter.register_post_accumulate_grad_hook(hook))
    after_step()
    return KeptZeros(handles)


def _after_backward(module: nn.Module, name: str) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def fill(parameter: Tensor) -> None:
        zeros = module._buffers.get(name)
        if parameter.grad is not None and zeros is not None:
            parameter.grad.masked_fill_(zeros, 0)

    return fill
