"""A scope in which pruned weights are multiplied with their masks once, not at every forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchprune_ext._checks import check_module
from torchprune_ext._host import Target, product, pruned, renew

M = TypeVar("M", bound=nn.Module)
DATA: Any = Tensor.data  # the descriptor
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class _Watched(nn.Parameter):
    """A tensor that remembers whether its ``data`` was handed out, through which it can be written unseen.

    A mask is one too for the time of a scope, since compiled code takes no other subclass of a tensor than this.
    """

    @property
    def data(self) -> Tensor:
        """Hand out the values, and remember that."""
        vars(self)["_handed_out"] = True
        values: Tensor = DATA.__get__(self)
        return values

    @data.setter
    def data(self, values: Tensor) -> None:
        DATA.__set__(self, values)


class _Once:
    """Stands in for the ``apply_mask`` of one hook: multiplies only when something may have changed.

    Args:
        hook: the hook of the host.
        target: the tensor it prunes.
    """

    def __init__(self, hook: BasePruningMethod, target: Target) -> None:
        self.hook, self.module, self.name = hook, target.module, target.name
        self.state: tuple[Any, ...] | None = None
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module) -> Tensor:
        """Return the product, with a gradient wherever one is wanted."""
        target = Target.found(module, self.name)
        state = None if target is None or module is not self.module else _state(target)
        if state is None or (torch.is_grad_enabled() and target is not None and target.parameter.requires_grad):
            return type(self.hook).apply_mask(self.hook, module)  # type: ignore[no-any-return]
        if self.value is None or state != self.state:
            with torch.inference_mode(False), torch.no_grad():
                self.value, self.state = type(self.hook).apply_mask(self.hook, module), state
        return self.value

    def forget(self) -> None:
        """Compute the product anew at the next forward pass."""
        self.value = None

    def changed(self) -> bool:
        """Return whether the weights are others than those in use, though nothing has told."""
        target = Target.found(self.module, self.name)
        if target is None or self.value is None or _state(target) != self.state:
            return False  # what is used next is computed first
        now, kind = product(target).detach(), BITS[self.value.dtype]
        return not torch.equal(now.view(kind), self.value.view(kind))

    def __reduce_ex__(self, _: Any) -> Any:
        raise RuntimeError(
            f"{type(self.module).__name__}.{self.name} is frozen, and a copy of it would share its weights. "
            "Copy or save the model outside of the frozen scope."
        )


def _state(target: Target) -> tuple[Any, ...] | None:
    """Return what is different whenever the product may be; None if it must be computed anyhow."""
    if torch.compiler.is_compiling():
        return None
    state: list[Any] = []
    for tensor in (target.parameter, target.mask):
        if tensor is None or type(tensor) is not _Watched or vars(tensor).get("_handed_out"):
            return None
        state += [id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride()]
    return tuple(state)


@contextmanager
def frozen(model: M) -> Iterator[M]:
    """Let pruned weights be multiplied with their masks once, not at every forward pass, while the scope is open.

    For evaluation and serving. PyTorch multiplies the whole weight with the whole mask in every forward pass, which
    costs a linear layer several times its own work when the batch is small. In the scope, the product is kept and used
    as long as gradients are off (:func:`torch.no_grad`, :func:`torch.inference_mode`, or parameters that need none).

    Every change is seen, and the product made anew: an optimizer step, ``load_state_dict``, ``copy_``, another device
    or dtype, a new mask, more pruning. A tensor whose ``.data`` is handed out in the scope is multiplied at every pass
    from then on, since nothing tells when it is written through that. What cannot be seen is a write through memory
    that was handed out before (``p.data``, a NumPy array, a flat buffer), or by a kernel that tells nobody, as
    collectives of ``torch.distributed`` do: that raises an error when the scope ends.

    Args:
        model: any module, pruned by whatever method. It keeps its parameters, masks, hooks and state dict. It takes the
            memory of its effective weights in addition. Copying or pickling it in the scope is refused.

    Yields:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: at the end, if weights were written unseen: what was computed since then was out of date.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
        >>> with frozen(model), torch.no_grad():
        ...     _ = model(torch.ones(4))
        ...     kept = model[0].weight
        ...     _ = model(torch.ones(4))
        ...     model[0].weight is kept
        True
    """
    check_module("model", model)
    hooks: list[_Once] = []
    tensors: list[tuple[Tensor, type[Tensor]]] = []

    def after_step(*_: Any) -> None:  # the fused kernels write without telling the version counter
        for once in hooks:
            once.forget()

    handle = register_optimizer_step_post_hook(after_step)
    try:
        for target in list(pruned(model)):
            _, hook = target.hook()
            if hook is None or "apply_mask" in vars(hook):
                continue  # nothing runs before a forward pass, or an outer scope is open
            for tensor in (target.parameter, target.mask):
                if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
                    tensors.append((tensor, type(tensor)))
                    tensor.__class__ = _Watched
            once = _Once(hook, target)
            hooks.append(once)
            vars(hook)["apply_mask"] = once
        yield model
        written = [once for once in hooks if once.changed()]
        if written:
            names = [f"{type(once.module).__name__}.{once.name}" for once in written]
            raise RuntimeError(
                f"{names} were written in the frozen scope through memory that was handed out before it, so outputs "
                "since then may have been computed with the weights of before. Write within torch.no_grad() to the "
                "parameters themselves, or outside of the scope."
            )
    finally:
        handle.remove()
        for once in hooks:
            vars(once.hook).pop("apply_mask", None)
        for tensor, kind in tensors:
            vars(tensor).pop("_handed_out", None)
            tensor.__class__ = kind
        with torch.inference_mode(False):
            for target in pruned(model):
                if any(target.module is once.module and target.name == once.name for once in hooks):
                    renew(target)
