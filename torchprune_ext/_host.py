"""How ``torch.nn.utils.prune`` stores pruning in a module: the only file that reads and writes that.

A pruned tensor ``weight`` is a parameter ``weight_orig``, a buffer ``weight_mask``, an attribute ``weight`` that holds
their product, and a forward-pre-hook that renews the product. Parameter and mask are the truth here; the hook and the
attribute are made from them, so that a module whose hook was lost can still be pruned, restored and made permanent.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod, PruningContainer
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchprune_ext._checks import check_tensor, errors_about
from torchprune_ext._fingerprints import Fingerprint
from torchprune_ext._readers import compute_when_read, refuse_unseen, store_again

Table = dict[Any, Any] | list[Any] | set[Any]
Contents = tuple[type[nn.Module], dict[str, Any], list[tuple[Table, Table]], list[tuple[nn.Parameter, Tensor]]]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One prunable tensor of a module.

    Use :meth:`of` to make one.

    Args:
        module: the module that owns the tensor.
        name: the tensor's name without suffix, e.g. ``"weight"``.
        parameter: the dense values: ``module.weight``, or ``module.weight_orig`` once pruned.
        mask: ``module.weight_mask``, or None if not pruned; what counts as pruned already.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter
    mask: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "Target":
        """Find tensor ``name`` of ``module``.

        Raises:
            TypeError: ``module`` is no module, ``name`` no string, or the tensor is not real floating point.
            ValueError: ``name`` is no parameter of the module, or is on the meta device.
        """
        target = cls.found(module, name)
        dense = name.removesuffix("_orig")
        if dense != name and f"{dense}_mask" in module._buffers:
            raise ValueError(
                f"{type(module).__name__}.{name} holds the dense values of {dense!r}, which is pruned. "
                f"Pass name={dense!r} to prune it further."
            )
        if target is None:
            raise ValueError(f"{type(module).__name__}.{name}: {_why_not(module, name)}")
        legacy = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
        if any(name.startswith(f"{hook.name}_") for hook in legacy):
            raise ValueError(
                f"{type(module).__name__}.{name} is read by the hook of an old-style weight_norm or spectral_norm "
                "before a mask is applied, so the mask would lag a step behind. "
                "Use torch.nn.utils.parametrizations instead."
            )
        if target.mask is None and {f"{name}_orig", f"{name}_mask"} & {
            *module._parameters,
            *module._buffers,
            *vars(module),
        }:
            raise ValueError(
                f"{type(module).__name__} has a {name}_orig or {name}_mask of its own, where pruning stores its state. "
                "Rename it."
            )
        if isinstance(target.parameter, UninitializedParameter):
            raise ValueError(f"{type(module).__name__}.{name} has no shape yet. Run one forward first, then prune.")
        if hasattr(target.parameter, "device_mesh"):
            raise ValueError(
                f"{target.where} is a DTensor, already sharded over a device mesh, and the host's mask would not be. "
                "Prune first, then call fully_shard or parallelize_module."
            )
        with errors_about(target.where):
            check_tensor(name, target.parameter, target.parameter.shape)
        return target

    @classmethod
    def found(cls, module: nn.Module, name: str) -> "Target | None":
        """Find tensor ``name`` of ``module``; None if it is no parameter. Errors of type as in :meth:`of`."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r} is a {type(module).__name__}. Pass the torch.nn.Module to prune.")
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} is a {type(name).__name__}. Pass the parameter's name, e.g. 'weight'.")
        parameter = module._parameters.get(name)
        if parameter is not None:
            return cls(module, name, parameter, None)
        parameter, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
        return None if parameter is None or mask is None else cls(module, name, parameter, mask)

    @property
    def stored_name(self) -> str:
        """Name of the parameter that holds the dense values."""
        return self.name if self.module._parameters.get(self.name) is not None else f"{self.name}_orig"

    @property
    def where(self) -> str:
        """The tensor in words, for errors: type of the module, name and shape."""
        return f"{type(self.module).__name__}.{self.name} of shape {tuple(self.parameter.shape)}"

    def weight(self) -> Tensor:
        """Return the weights as the next forward will see them, detached: fresh, not the attribute of the last one."""
        dense = self.parameter.detach()
        return dense if self.mask is None else dense * self.mask.to(dense.dtype)

    def hook(self) -> tuple[int | None, BasePruningMethod | None]:
        """Return the pruning hook of the tensor and its key, or two None."""
        for key, hook in self.module._forward_pre_hooks.items():
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == self.name:
                return key, hook
        return None, None


def product(target: Target) -> Tensor:
    """Return dense values times mask, as the hook computes it, with its gradient's way back whatever mode is on."""
    dense, mask = target.parameter, target.mask
    with torch.inference_mode(False), torch.enable_grad():
        return dense if mask is None else mask.to(dense.dtype) * dense


def renew(target: Target) -> None:
    """Bring ``module.weight`` up to date; if a parent reads it, for good."""
    setattr(target.module, target.name, product(target))
    compute_when_read(target.module)


def targets_of(params: Iterable[tuple[nn.Module, str]], param: str = "params") -> dict[int, Target]:
    """Find the tensors that ``params`` list, each once, keyed by their places in the list.

    Raises:
        TypeError: ``params``, the caller's ``param``, is no iterable of pairs, or as :meth:`Target.of`.
        ValueError: as :meth:`Target.of`.
    """
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"{param} is a {type(params).__name__}. Pass (module, name) pairs, e.g. [(model.fc1, 'weight')], or all "
            "that prunable_parameters(model) or pruned_parameters(model) find."
        )
    found: dict[tuple[nn.Module, str], tuple[int, Target]] = {}
    for place, pair in enumerate(params):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"{param}[{place}]={pair!r} is no (module, name) pair, e.g. (model.fc1, 'weight').")
        with errors_about(f"{param}[{place}]"):
            target = Target.of(*pair)
        found.setdefault((target.module, target.name), (place, target))
    return dict(found.values())


def stored_keys(key: str) -> tuple[str, str]:
    """Return the keys under which a state dict has the dense values and the mask of the pruned tensor ``key``."""
    return f"{key}_orig", f"{key}_mask"


def own_targets(module: nn.Module) -> Iterator[Target]:
    """Yield every tensor of ``module`` itself that is pruned or could be."""
    for stored, parameter in list(module._parameters.items()):
        target = Target.found(module, stored.removesuffix("_orig"))
        if target is None or target.stored_name != stored:
            target = Target.found(module, stored)
        if parameter is not None and target is not None:
            yield target


def pruned(model: nn.Module, *, recurse: bool = True) -> Iterator[Target]:
    """Yield the pruned tensors of ``model`` and, with ``recurse``, of all modules below it."""
    for module in model.modules() if recurse else [model]:
        for stored in list(module._parameters):
            target = Target.found(module, stored.removesuffix("_orig"))
            if target is not None and target.stored_name == stored and target.mask is not None:
                yield target


def _refuse_two_masks(parts: Iterable[tuple[nn.Parameter, Tensor | None, str]]) -> None:
    """Raise ``ValueError`` if one parameter, shared by several modules, stands under different masks."""
    seen: dict[int, tuple[Tensor | None, str]] = {}
    for parameter, mask, where in parts:
        other, first = seen.setdefault(id(parameter), (mask, where))
        if mask is not other and mask is not None and other is not None and not torch.equal(mask != 0, other != 0):
            raise ValueError(
                f"{where} and {first} are the same parameter (tied) under different masks, so one would zero what the "
                "other keeps. Untie them first, or prune them by one global call that lists both."
            )


def refuse_half_tied(model: nn.Module, targets: Iterable[Target], instead: str) -> None:
    """Raise ``ValueError`` if making ``targets`` permanent would zero what another holder in ``model`` keeps.

    Args:
        model: where to look for other holders of the same parameters.
        targets: pruned targets.
        instead: what the caller offers instead, a sentence.
    """
    wanted: dict[int, list[Target]] = {}
    for target in targets:
        wanted.setdefault(id(target.parameter), []).append(target)
    for path, module in model.named_modules():
        for holder in own_targets(module):
            kept = holder.mask
            for target in wanted.get(id(holder.parameter), []):
                if target.mask is None or target.mask is kept:
                    continue
                lost = (target.mask == 0) & (target.parameter.detach() != 0)
                if bool((lost if kept is None else lost & (kept != 0)).any()):
                    raise ValueError(
                        f"{target.where} and {f'{path}.{holder.name}'.lstrip('.')} are the same parameter (tied), but "
                        f"the second is {'not pruned' if kept is None else 'pruned otherwise'}, and would be zeroed "
                        f"too. {instead}"
                    )


def install(masks: Sequence[tuple[Target, BasePruningMethod, Tensor]]) -> list[BasePruningMethod]:
    """Prune the targets with finished masks and put each method into the history, or change nothing.

    Args:
        masks: target, method and mask, which has the target's shape and dtype and drops what is dropped already.

    Returns:
        The hook of each target: the method, or the container that ends with it.
    """
    hooks = []
    _refuse_two_masks((target.parameter, mask, target.where) for target, _, mask in masks)
    with all_or_nothing(target.module for target, _, _ in masks):
        for target, method, mask in masks:
            module, name = target.module, target.name
            method._tensor_name = name
            refuse_unseen(module)
            if target.stored_name == name:
                _rename(module, name, f"{name}_orig")
            key, earlier = target.hook()
            if _dense_fingerprint(target) is None and not changed_since_pruned(target):
                vars(method)["_dense"] = Fingerprint.of(target.parameter)
            hook = method if earlier is None else _stack(earlier, method)
            module.register_buffer(f"{name}_mask", mask)
            setattr(module, name, hook.apply_mask(module))
            if key is None:
                module.register_forward_pre_hook(hook)
            else:
                module._forward_pre_hooks[key] = hook
            compute_when_read(module)
            hooks.append(hook)
    return hooks


def changed_since_pruned(target: Target) -> bool:
    """Return whether the dense values of a pruned target are seen to have changed since it was first pruned.

    Our methods leave a fingerprint of them. Where only native ones were applied, a change shows by a product that is
    no longer that of values and mask, or by a gradient that is 0 wherever the mask is: a backward pass under the mask.
    """
    fingerprint, mask = _dense_fingerprint(target), target.mask
    if fingerprint is not None:
        return not fingerprint.matches(target.parameter)
    product, gradient = vars(target.module).get(target.name), target.parameter.grad
    if mask is None or not isinstance(product, Tensor) or product.shape != target.parameter.shape:
        return False
    weight = target.weight()
    product = product.detach().to(weight)
    if not bool(((product == weight) | (product.isnan() & weight.isnan())).all()):
        return True
    if gradient is None or gradient.is_sparse:
        return False
    return bool((mask == 0).any() and gradient.any() and not gradient[mask == 0].any())


def remember_dense(target: Target, dense: Tensor) -> None:
    """Note what a pruned target's dense values are, before others take their place, unless that is known."""
    _, hook = target.hook()
    if hook is not None and _dense_fingerprint(target) is None:
        vars(list(hook)[-1] if isinstance(hook, PruningContainer) else hook)["_dense"] = Fingerprint.of(dense)


def _dense_fingerprint(target: Target) -> Fingerprint | None:
    """Return the first fingerprint that pruning has left of the target's dense values."""
    _, hook = target.hook()
    for method in hook if isinstance(hook, PruningContainer) else [hook]:
        fingerprint = getattr(method, "_dense", None)
        if fingerprint is not None:
            return fingerprint  # type: ignore[no-any-return]
    return None


def plain_entries(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return all parameters and buffers of ``model`` as they are called without pruning, with module, key and tensor.

    A pruned tensor is listed with its effective weights, its mask is not, and what is tied is listed under every name.
    """
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        masked = {target.stored_name: target for target in pruned(module, recurse=False)}
        masks = {f"{target.name}_mask" for target in masked.values()}
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or key in masks:
                continue
            target = masked.get(key)
            plain = key if target is None else target.name
            value = tensor if target is None else target.weight()
            found[f"{path}.{plain}" if path else plain] = (module, plain, value)
    return found


def rewrite(values: Sequence[tuple[Target, Tensor, Tensor | None]]) -> None:
    """Give targets new dense values and, where not None, their modules a bias, or change nothing."""
    with all_or_nothing(target.module for target, _, _ in values):
        for target, dense, bias in values:
            module, name = target.module, target.name
            target.parameter.data = dense
            old = module._parameters.get("bias")
            if bias is not None and old is not None:
                old.data = bias
            elif bias is not None:
                module.bias = nn.Parameter(bias, requires_grad=target.parameter.requires_grad)
            if f"{name}_mask" in module._buffers:  # its hook may be lost
                setattr(module, name, module.get_buffer(f"{name}_mask").to(dense.dtype) * target.parameter)


def uninstall(targets: Sequence[Target], *, keep_masked: bool, keep_zeros: bool = False) -> None:
    """Turn pruned targets into plain parameters again, or change nothing.

    Args:
        targets: pruned targets.
        keep_masked: multiply the parameter by its mask, else leave the dense values.
        keep_zeros: remember where the mask was 0, see :func:`kept_zeros`.
    """
    if keep_masked:
        _refuse_two_masks((target.parameter, target.mask, target.where) for target in targets)
    with all_or_nothing(target.module for target in targets):
        for target in targets:
            module, name = target.module, target.name
            if keep_masked:
                target.parameter.data = target.weight()
            _unhook(target)
            if keep_zeros and target.mask is not None:
                _remember_zeros(target, target.mask == 0)
            setattr(module, name, target.parameter)  # lets modules that cache their weights, as LSTM does, know
            store_again(module)


def kept_zeros(model: nn.Module) -> Iterator[tuple[Target, Tensor]]:
    """Yield all tensors of ``model`` whose zeros :func:`uninstall` remembered, and where they are.

    That stands in a boolean buffer ``weight_zeros`` beside ``weight``, which is not part of the state dict.
    """
    for module in model.modules():
        for target in own_targets(module):
            zeros = _zeros(target)
            if zeros is not None:
                yield target, zeros


def _zeros(target: Target) -> Tensor | None:
    """Return where zeros are kept, or None."""
    module, name = target.module, f"{target.name}_zeros"
    zeros = module._buffers.get(name)
    ours = zeros is not None and zeros.dtype == torch.bool and name in module._non_persistent_buffers_set
    return zeros if ours else None


def _remember_zeros(target: Target, zeros: Tensor) -> None:
    """Add ``zeros`` to those that are kept."""
    module, name, earlier = target.module, f"{target.name}_zeros", _zeros(target)
    if earlier is None and hasattr(module, name):
        raise ValueError(
            f"{target.where}: the module has a {name} of its own, where the zeros to keep are stored. Rename it."
        )
    with torch.inference_mode(False):
        module.register_buffer(name, zeros.clone() if earlier is None else zeros | earlier, persistent=False)


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Let every pruned tensor of ``model`` be a plain parameter with its effective weights; put all back at the end.

    Puts back what each module holds, its mode and pruning included, but no value that is written into a tensor.
    """
    before = [(module, _contents(module)) for module in model.modules()]
    weights: dict[tuple[int, int], nn.Parameter] = {}  # tied tensors stay tied
    try:
        for target in list(pruned(model)):
            weight = weights.setdefault((id(target.parameter), id(target.mask)), nn.Parameter(target.weight()))
            _unhook(target)
            setattr(target.module, target.name, weight)
        yield
    finally:
        for module, contents in before:
            _restore(module, contents)


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any exception, Ctrl-C too, put ``modules`` back to what they were: tensors, their order, buffers, hooks.

    Does not restore what is written into a tensor, only which tensors there are and what ``data`` they point to.
    """
    before = [(module, _contents(module)) for module in dict.fromkeys(modules)]
    try:
        yield
    except BaseException:
        for module, contents in before:
            _restore(module, contents)
        raise


def _restore(module: nn.Module, contents: Contents) -> None:
    """Make ``module`` what it was when ``contents`` were taken from it."""
    kind, attributes, tables, data = contents
    if type(module) is not kind:
        module.__class__ = kind
    _refill(vars(module), attributes)
    for table, entries in tables:
        _refill(table, entries)
    for parameter, values in data:
        parameter.data = values


def _contents(module: nn.Module) -> Contents:
    """Return class and attributes of ``module``, copies of those that are tables, and the data of its parameters."""
    tables = [value for value in vars(module).values() if isinstance(value, (dict, list, set))]
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    return (
        type(module),
        dict(vars(module)),
        [(table, table.copy()) for table in tables],
        [(p, p.data) for p in parameters],
    )


def _refill(table: Table, contents: Table) -> None:
    """Give ``table`` back its ``contents`` and their order."""
    table.clear()
    if isinstance(table, list):
        table.extend(contents)
    else:
        table.update(contents)


def _unhook(target: Target) -> None:
    """Take hook, mask and product away, so that the parameter stands under the tensor's own name."""
    module, name = target.module, target.name
    key, _ = target.hook()
    if key is not None:
        del module._forward_pre_hooks[key]
    del module._buffers[f"{name}_mask"]
    vars(module).pop(name, None)
    _rename(module, f"{name}_orig", name)


def _rename(module: nn.Module, old: str, new: str) -> None:
    """Rename a parameter and keep its place among the others."""
    items = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(items)


def _stack(earlier: BasePruningMethod, method: BasePruningMethod) -> PruningContainer:
    """Return a new container with the methods of ``earlier`` and ``method``, and leave ``earlier`` as it is."""
    history = [*earlier] if isinstance(earlier, PruningContainer) else [earlier]
    container = PruningContainer(history[0])
    for each in [*history[1:], method]:
        container.add_pruning_method(each)
    return container


def _why_not(module: nn.Module, name: str) -> str:
    """Return why tensor ``name`` of ``module`` cannot be pruned, and what can."""
    kind = type(module).__name__
    if is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        parts = [n for n, _ in parametrizations[name].named_parameters(recurse=False)]
        # of weight_norm's two, the second holds the directions; a single one is simply called "original"
        return (
            f"name={name!r} is computed by a parametrization. "
            f"Prune what it is computed from: module.parametrizations.{name}, {parts[-1]!r}."
        )
    sources = [n for n in (f"{name}_v", f"{name}_orig") if n in module._parameters]
    if sources:
        return (
            f"name={name!r} is no parameter but computed from {sources[0]!r} at every forward, by an old-style "
            "weight_norm or spectral_norm. Use torch.nn.utils.parametrizations instead and prune what that computes "
            f"from: 'original1' (weight_norm) or 'original' (spectral_norm) of module.parametrizations.{name}."
        )
    known = [n.removesuffix("_orig") for n, p in module.named_parameters(recurse=False)]
    if name in module._parameters:
        return f"name={name!r} is None in this {kind}. Choose one of {known}."
    hint = f"Choose one of {known}." if known else "It has none of its own; pass the submodule that owns it."
    return f"name={name!r} is no parameter of this {kind}. {hint}"
