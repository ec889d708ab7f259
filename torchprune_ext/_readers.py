"""Pruned tensors that a parent reads without calling the module that owns them, so that no hook of it runs.

``MultiheadAttention`` does so with its ``out_proj``, everybody with a ``ParameterList`` or ``ParameterDict``. The
host's product of weights and mask then stays that of the last call: a second training step fails, and loaded weights
are not used. While such a module is pruned, its class is one that computes the product whenever it is read, as the
parametrizations of PyTorch do. Nothing else about it changes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod


def _renewed(module: nn.Module, name: str) -> Tensor | None:
    """Return the product of the pruned tensor ``name``, or None if there is none."""
    orig, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if orig is None or mask is None:
        return None
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            product: Tensor = hook.apply_mask(module)
            return product
    return mask.to(orig.dtype) * orig


def _product_of(name: str) -> Any:
    """Return a property that computes the pruned tensor ``name``, or hands out the parameter while it is not pruned."""

    def read(module: nn.Module) -> Any:
        parameters = module._parameters
        if name in parameters:
            return parameters[name]
        product = _renewed(module, name)
        if product is None:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        return product

    def write(module: nn.Module, value: Tensor) -> None:
        """Take the product that the host sets, and keep nothing: it would be out of date."""

    def delete(module: nn.Module) -> None:
        """Take the host's deletion of its product."""

    return property(read, write, delete)


class PrunedOutProj(NonDynamicallyQuantizableLinear):
    """The ``out_proj`` of ``MultiheadAttention`` while it is pruned."""

    weight = _product_of("weight")
    bias = _product_of("bias")


class PrunedParameterList(nn.ParameterList):
    """A ``ParameterList`` while an entry of it is pruned."""

    def __getitem__(self, idx: Any) -> Any:
        """Return an entry, or a list of them for a slice, as they are now."""
        product = None if isinstance(idx, slice) else _renewed(self, self._get_abs_string_index(idx))
        return super().__getitem__(idx) if product is None else product


class PrunedParameterDict(nn.ParameterDict):
    """A ``ParameterDict`` while an entry of it is pruned."""

    def __getitem__(self, key: str) -> Any:
        """Return an entry as it is now."""
        product = _renewed(self, key)
        return super().__getitem__(key) if product is None else product


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    NonDynamicallyQuantizableLinear: PrunedOutProj,
    nn.ParameterList: PrunedParameterList,
    nn.ParameterDict: PrunedParameterDict,
}


def compute_when_read(module: nn.Module) -> None:
    """Let a pruned module whose parent reads its tensors compute them then. Of no effect on other modules."""
    if type(module) in CLASSES:
        module.__class__ = CLASSES[type(module)]
    if isinstance(module, PrunedOutProj):  # what the host has stored would be found by nobody, and be copied
        for name in ("weight", "bias"):
            vars(module).pop(name, None)


def store_again(module: nn.Module) -> None:
    """Take :func:`compute_when_read` back once nothing of ``module`` is pruned."""
    for plain, computing in CLASSES.items():
        if type(module) is computing and not any(name.endswith("_mask") for name in module._buffers):
            module.__class__ = plain


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has while nothing of it is pruned."""
    return next((plain for plain, computing in CLASSES.items() if type(module) is computing), type(module))


def refuse_unseen(module: nn.Module) -> None:
    """Raise ``ValueError`` if nothing can tell when a parent reads the tensors of ``module``."""
    known = {*CLASSES, *CLASSES.values()}
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and type(module) not in known:
        raise ValueError(
            f"{type(module).__name__} is never called itself, so the host's hook would not run when its tensors are "
            "read. Use a plain nn.ParameterList or nn.ParameterDict, or hold the tensor in the module that uses it."
        )
