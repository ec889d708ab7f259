"""The tensors of a model that a file holds, under the names that they have in a dense model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext._checks import check_module
from torchprune_ext._host import Target, pruned
from torchprune_ext.deploy.container import short
from torchprune_ext.deploy.encodings import DTYPES, ENTRIES, nonzero, words


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A tensor of a model.

    Args:
        tensor: its values; the dense ones if it is pruned.
        target: what is known of it if it is pruned, else None.
    """

    tensor: Tensor
    target: Target | None

    @property
    def mask(self) -> Tensor | None:
        """Its mask, or None if it is not pruned."""
        return None if self.target is None else self.target.mask

    @property
    def place(self) -> tuple[Any, ...]:
        """Where its values are in memory: equal for tensors that are one (tied)."""
        tensor = self.tensor
        if not tensor.numel():
            return (id(tensor),)
        return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    def history(self) -> tuple[str, ...] | None:
        """What pruned it, in words, step by step; None if it is not pruned."""
        return None if self.target is None else tuple(_step(method) for method in self.target.history())

    def blocks(self, *, as_pruned: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the words of the entries in row-major order, and which of them survive, block by block, on the CPU.

        Args:
            as_pruned: let the mask say what survives; else, or without a mask, all that is not zero does.
        """
        flat, mask = row(self.tensor), row(self.mask) if as_pruned and self.mask is not None else None
        for start in range(0, len(flat), ENTRIES):
            entries = words(flat[start : start + ENTRIES].cpu())
            if mask is None:
                yield entries, nonzero(entries, self.tensor.dtype)
            else:
                yield entries, mask[start : start + ENTRIES].cpu() != 0


def row(tensor: Tensor) -> Tensor:
    """Return the entries in row-major order, ``[n]``: a view if the tensor is laid out so, else a copy."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def slots_of(model: nn.Module, *, non_persistent: bool = False) -> dict[str, Slot]:
    """Return the tensors of a model's state dict by their names in the dense model, checked.

    Args:
        model: any module, pruned or not.
        non_persistent: return the buffers that the state dict leaves out, too.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds something that a file without pickle cannot hold, or that is not there.
    """
    check_module("model", model)
    slots: dict[str, Slot] = {}
    raw: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        targets = {target.stored_name: target for target in pruned(module, recurse=False)}
        masks = {f"{target.name}_mask" for target in targets.values()}
        left_out = module._non_persistent_buffers_set
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or (name in left_out and not non_persistent):
                continue
            if name not in left_out:
                raw.add(f"{path}.{name}" if path else name)
            if name not in masks:
                target = targets.get(name)
                dense = name if target is None else target.name
                key = f"{path}.{dense}" if path else dense
                slots[key] = Slot(tensor, target)
                _check(key, slots[key])
    odd = sorted(raw.symmetric_difference(model.state_dict()))
    if odd:
        raise ValueError(
            f"model of type {type(model).__name__}: the state dict holds other keys than its parameters and buffers "
            f"have: {listed(odd)}. Code of the model's own writes them (extra state, a state dict hook), which a "
            "file without pickle cannot call. Save the state dict with torch.save."
        )
    return slots


def _check(key: str, slot: Slot) -> None:
    """Raise ``ValueError`` unless the tensor is one that a file can hold."""
    tensor, mask = slot.tensor, slot.mask
    reason = ""
    if is_lazy(tensor):
        reason = "has no shape yet. Run one forward pass first"
    elif hasattr(tensor, "device_mesh"):
        reason = "is a DTensor, sharded over a device mesh. Gather the full tensors into a model first"
    elif type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        reason = (
            f"is a {type(tensor.data).__name__} of layout {tensor.layout}. Convert it to a plain dense tensor first"
        )
    elif tensor.dtype not in DTYPES.values():
        reason = f"has dtype {tensor.dtype}. Convert it to one of {', '.join(DTYPES)} first"
    elif tensor.is_meta or (mask is not None and mask.is_meta):
        reason = (
            "is on the meta device and holds no data. Materialize the model first, e.g. model.to_empty(device='cpu')"
        )
    elif mask is not None and mask.shape != tensor.shape:
        reason = f"has a mask of shape {tuple(mask.shape)}. Remove the pruning and prune again"
    elif mask is not None and (bad := sum(int(((m != 0) & (m != 1)).sum()) for m in row(mask).split(ENTRIES))):
        reason = f"has a mask with {bad} entries other than 0 and 1. Remove the pruning and prune again"
    if reason:
        raise ValueError(f"{short(key)} of shape {'?' if is_lazy(tensor) else tuple(tensor.shape)} {reason}.")


def same_mask(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two masks, None for none, keep the same."""
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and all(
        torch.equal(a.cpu() != 0, b.cpu() != 0)
        for a, b in zip(row(one).split(ENTRIES), row(other).split(ENTRIES), strict=True)
    )


def listed(names: list[str]) -> str:
    """Return names for a message: the first ten, and how many more."""
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(short(name) for name in names[:10]) + rest


def check_names(what: str, there: Iterable[str], here: Iterable[str], remedy: str) -> None:
    """Raise ``ValueError`` unless file and model have the same ``what``, by name."""
    surplus, missing = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    if surplus or missing:
        near = [(n, close[0]) for n in surplus[:10] if (close := get_close_matches(n[:200], missing[:2000], 1))]
        raise ValueError(
            f"{len(surplus)} {what} of the file are not in the model: {listed(surplus) or 'none'}; "
            f"{len(missing)} of the model are not in the file: {listed(missing) or 'none'}."
            + "".join(f" {short(a)} is close to {short(b)}." for a, b in near)
            + f" {remedy}"
        )


def _step(method: BasePruningMethod) -> str:
    """Return the call that made a method, e.g. ``L1Unstructured(amount=0.3)``."""
    if type(method).__repr__ is not object.__repr__:
        return repr(method)[:1000]
    arguments = [
        f"{name}={value!r}" if isinstance(value, (bool, int, float, str, tuple, type(None))) else f"{name}=..."
        for name, value in vars(method).items()
        if name != "_tensor_name"
    ]
    return f"{type(method).__name__}({', '.join(arguments)})"[:1000]
