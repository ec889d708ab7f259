"""How ``torch.nn.utils.prune`` stores pruning in a module: the only file that reads and writes that.

A pruned tensor ``weight`` is a parameter ``weight_orig``, a buffer ``weight_mask``, an attribute ``weight`` that holds
their product, and a forward-pre-hook that renews the product. Parameter and mask are the truth here; the hook and the
attribute are made from them, so that a module whose hook was lost can still be pruned, restored and made permanent.

Parameter and mask alone do not make a tensor pruned, as a layer that masks its own weights may call them the same. The
host's hook decides. Where it was lost (a native call that failed has deleted it), the product must be there, and
neither the module's class nor a hook of the user's may name the mask: they would apply it themselves.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod, PruningContainer
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchprune_ext._checks import check_tensor, errors_about, warn
from torchprune_ext._fingerprints import LOST, Fingerprint
from torchprune_ext._obstacles import masks_by_itself, obstacle, why_not
from torchprune_ext._readers import compute_when_read, refuse_unseen, store_again
from torchprune_ext._restoring import all_or_nothing, contents_of, restore

FEW_REFERENCES = 4  # to a parameter: those of its module, of a target, of a call and of the question
PLENTY = 0.05  # share of exact zeros that training does not leave


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
            TypeError: ``module`` is not a module, ``name`` not a string, or the tensor is not real floating point.
            ValueError: ``name`` is not a parameter of the module, or one that a mask does not fit: on the meta device,
                not yet initialized, sharded, sparse, quantized, made in inference mode, or of a scripted module.
        """
        target, dense = cls.found(module, name), name.removesuffix("_orig")
        if dense != name and getattr(cls.found(module, dense), "mask", None) is not None:
            raise ValueError(
                f"{type(module).__name__}.{name} holds the dense values of {dense!r}, which is pruned. "
                f"Pass name={dense!r} to prune it further."
            )
        if target is None:
            raise ValueError(f"{type(module).__name__}.{name}: {why_not(module, name)}")
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
        if is_lazy(target.parameter):
            raise ValueError(f"{type(module).__name__}.{name} has no shape yet. Run one forward first, then prune.")
        if (reason := obstacle(name, target.parameter)) is not None:
            raise ValueError(f"{target.where} {reason}")
        with errors_about(target.where):
            check_tensor(name, target.parameter, target.parameter.shape)
        return target

    @classmethod
    def found(cls, module: nn.Module, name: str) -> "Target | None":
        """Find tensor ``name`` of ``module``; None if it is not a parameter, nor pruned by the host.

        Errors of type as in :meth:`of`.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r} is a {type(module).__name__}. Pass the torch.nn.Module to prune.")
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} is a {type(name).__name__}. Pass the parameter's name, e.g. 'weight'.")
        if isinstance(module, torch.jit.ScriptModule):
            return None
        parameter = module._parameters.get(name)
        if parameter is not None:
            return cls(module, name, parameter, None)
        parameter, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
        if parameter is None or mask is None:
            return None
        target = cls(module, name, parameter, mask)
        lost_its_hook = isinstance(vars(module).get(name), Tensor) and not masks_by_itself(module, name)
        return target if lost_its_hook or target.hook()[1] is not None else None

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

    def history(self) -> list[BasePruningMethod]:
        """Return the methods that were applied to the tensor, oldest first; none where the hook was lost."""
        _, hook = self.hook()
        if hook is None:
            return []
        return [*hook] if isinstance(hook, PruningContainer) else [hook]

    def told(self) -> list[str]:
        """Return the history as the calls that made it; native methods have no words of their own for that."""
        return [
            repr(entry)
            if type(entry).__repr__ is not object.__repr__
            else told(type(entry).__name__, {key: value for key, value in vars(entry).items() if key[0] != "_"})
            for entry in self.history()
        ]


def told(call: str, arguments: Mapping[str, Any]) -> str:
    """Return a call in words, with ``...`` in the place of tensors."""
    hidden = (Tensor, type(...))
    return f"{call}({', '.join(f'{k}=...' if isinstance(v, hidden) else f'{k}={v!r}' for k, v in arguments.items())})"


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
        TypeError: ``params``, the caller's ``param``, is not an iterable of pairs, or as :meth:`Target.of`.
        ValueError: as :meth:`Target.of`.
    """
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"{param} is a {type(params).__name__}. Pass (module, name) pairs, e.g. [(model.fc1, 'weight')], "
            "prunable_parameters(model), or [(module, name) for _, module, name in pruned_parameters(model)]."
        )
    found: dict[tuple[nn.Module, str], tuple[int, Target]] = {}
    for place, pair in enumerate(params):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            triple = isinstance(pair, (tuple, list)) and len(pair) == 3
            raise TypeError(
                f"{param}[{place}]={pair!r} is not a (module, name) pair, e.g. (model.fc1, 'weight')."
                + " Pass [(module, name) for _, module, name in pruned_parameters(model)]." * triple
            )
        with errors_about(f"{param}[{place}]"):
            target = Target.of(*pair)
        found.setdefault((target.module, target.name), (place, target))
    return dict(found.values())


def stored_keys(key: str) -> tuple[str, str]:
    """Return the keys under which a state dict has the dense values and the mask of the pruned tensor ``key``."""
    return f"{key}_orig", f"{key}_mask"


def pruned(model: nn.Module, *, recurse: bool = True) -> Iterator[Target]:
    """Yield the pruned tensors of ``model`` and, with ``recurse``, of all modules below it."""
    for module in model.modules() if recurse else [model]:
        yield from (target for target in targets_in(module) if target.mask is not None)


def targets_in(module: nn.Module) -> Iterator[Target]:
    """Yield all parameters that ``module`` itself owns, pruned or not, under their names without suffix."""
    for stored, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        target = Target.found(module, stored.removesuffix("_orig"))
        is_it = target is not None and target.stored_name == stored
        yield target if is_it and target is not None else Target(module, stored, parameter, None)


def warn_of_zeros(targets: Mapping[str, Target]) -> None:
    """Warn of tensors with so many zeros outside of their masks that they look pruned, by the words they stand under.

    A tensor of zeros only was initialized so. What ranks weights takes zeros without a mask for the smallest living
    ones, and what writes weights fills them in.
    """
    shares = []
    for where, target in targets.items():
        left = target.parameter.numel() if target.mask is None else int(target.mask.count_nonzero())
        zeros = left - int(target.weight().count_nonzero())
        if PLENTY * left < zeros < left:
            shares.append(f"{where} ({zeros / left:.0%})")
    if shares:
        warn(
            f"Zeros without a mask count as weights that are not pruned: {'; '.join(shares)}. If they were pruned, "
            "call mask_zeros(params) first, or they are the first to be pruned again, or are filled in."
        )


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


def modules_holding(parameter: nn.Parameter) -> list[nn.Module]:
    """Return all modules of the process that hold ``parameter``, for calls that do not see the model.

    Asks the garbage collector, which takes some 0.1 s in a large process, unless next to nothing holds the parameter.
    """
    if sys.getrefcount(parameter) <= FEW_REFERENCES:
        return []
    tables = [
        table
        for table in gc.get_referrers(parameter)
        if isinstance(table, dict) and any(value is parameter for value in table.values())
    ]
    found = []
    for table in tables:
        for owner in gc.get_referrers(table):
            # what refers to a module's table is the module, or first the dictionary of its attributes
            attributes = isinstance(owner, dict) and owner.get("_parameters") is table
            for module in gc.get_referrers(owner) if attributes else [owner]:
                if isinstance(module, nn.Module) and module._parameters is table:
                    found.append(module)
    return found


def refuse_half_tied(modules: Iterable[tuple[str, nn.Module]], targets: Iterable[Target], instead: str) -> None:
    """Raise ``ValueError`` if making ``targets`` permanent would zero what another holder keeps.

    Args:
        modules: where to look for other holders of the same parameters, as ``named_modules()`` gives them.
        targets: pruned targets.
        instead: what the caller offers instead, a sentence.
    """
    wanted: dict[int, list[Target]] = {}
    for target in targets:
        wanted.setdefault(id(target.parameter), []).append(target)
    for path, module in modules:
        for holder in targets_in(module):
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


def install(
    masks: Sequence[tuple[Target, BasePruningMethod, Tensor]], *, values_change: bool = False
) -> list[BasePruningMethod]:
    """Prune the targets with finished masks and put each method into the history, or change nothing.

    Where all masks are there already, nothing is added to the history, unless the call changes values too.

    Args:
        masks: target, method and mask, which has the target's shape and dtype and drops what is dropped already.
        values_change: whether the same call gives the targets other values.

    Returns:
        The hook of each target: the method, or the container that ends with it.
    """
    hooks = []
    _refuse_two_masks((target.parameter, mask, target.where) for target, _, mask in masks)
    news = values_change or not all(_stands(target, mask) for target, _, mask in masks)
    with outside_of_inference(), all_or_nothing(target.module for target, _, _ in masks):
        for target, method, mask in masks:
            module, name = target.module, target.name
            method._tensor_name = name
            refuse_unseen(module)
            if target.stored_name == name:
                _rename(module, name, f"{name}_orig")
            key, earlier = target.hook()
            if _dense_fingerprint(target) is None:  # native methods leave none, and a new mask hides traces of training
                lost = changed_since_pruned(target)
                vars(method)["_dense"] = astuple(LOST if lost else Fingerprint.of(target.parameter))
            if earlier is not None and not news:
                hook = earlier
            else:
                hook = method if earlier is None else _stack(earlier, method)
            module.register_buffer(f"{name}_mask", _trainable(mask))
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
        vars(list(hook)[-1] if isinstance(hook, PruningContainer) else hook)["_dense"] = astuple(Fingerprint.of(dense))


def _dense_fingerprint(target: Target) -> Fingerprint | None:
    """Return the first fingerprint that pruning has left of the target's dense values."""
    _, hook = target.hook()
    for method in hook if isinstance(hook, PruningContainer) else [hook]:
        numbers = getattr(method, "_dense", None)  # plain ones, as hooks are pickled with the modules of users
        if numbers is not None:
            return Fingerprint(*numbers)
    return None


def plain_entries(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return all parameters and buffers of ``model`` as they are called without pruning, with module, key and tensor.

    A pruned tensor is listed with its effective weights, its mask is not, nor what :func:`kept_zeros` remembers, and
    what is tied is listed under every name.
    """
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        targets = list(targets_in(module))
        own = {target.name: target.weight() for target in targets}
        masks = {f"{target.name}_mask" for target in targets if target.mask is not None}
        masks |= {f"{target.name}_zeros" for target in targets if _zeros(target) is not None}
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own |= {key: buffer for key, buffer in buffers if key not in masks}
        found |= {f"{path}.{key}" if path else key: (module, key, tensor) for key, tensor in own.items()}
    return found


def _stands(target: Target, mask: Tensor) -> bool:
    """Return whether ``target`` is pruned by ``mask`` already."""
    earlier = target.module._buffers.get(f"{target.name}_mask")
    return target.hook()[1] is not None and earlier is not None and torch.equal(mask != 0, earlier != 0)


def as_one(masks: Sequence[tuple[Target, BasePruningMethod, Tensor]]) -> None:
    """Let the history know that these tensors are pruned as one, so that :func:`rest_of` can tell what belongs to one.

    All entries share one table of the tensors in words, as a hook should hold neither modules nor tensors.
    """
    if len(masks) > 1:
        rest = {place: target.where for place, (target, _, _) in enumerate(masks)}
        for place, (_, method, _) in enumerate(masks):
            vars(method)["_as_one"] = (place, rest)


def rest_of(targets: Iterable[Target]) -> list[str]:
    """Return, in words, what was pruned as one with ``targets``, is not among them, and was not forgotten."""
    parts = [part for target in targets for entry in target.history() if (part := getattr(entry, "_as_one", None))]
    own = {(id(rest), place) for place, rest in parts}
    tables = {id(rest): rest for _, rest in parts}.values()
    return list(dict.fromkeys(where for t in tables for place, where in t.items() if (id(t), place) not in own))


def forget(method: BasePruningMethod) -> None:
    """Take the tensor of ``method`` out of those that are pruned as one."""
    if (part := getattr(method, "_as_one", None)) is not None:
        place, rest = part
        rest.pop(place, None)


def rewrite(values: Sequence[tuple[Target, Tensor, Tensor | None]]) -> None:
    """Give targets new dense values and, where not None, their modules a bias, or change nothing."""
    with outside_of_inference(), all_or_nothing(target.module for target, _, _ in values):
        for target, dense, bias in values:
            module, name = target.module, target.name
            target.parameter.data = _trainable(dense)
            old = module._parameters.get("bias")
            if bias is not None and old is not None:
                old.data = _trainable(bias)
            elif bias is not None:
                module.bias = nn.Parameter(_trainable(bias), requires_grad=target.parameter.requires_grad)
            if f"{name}_mask" in module._buffers:  # its hook may be lost
                setattr(module, name, module.get_buffer(f"{name}_mask").to(dense.dtype) * target.parameter)
            for method in target.history()[-1:]:
                vars(method)["_refitted"] = True


def was_refitted(target: Target) -> bool:
    """Return whether survivors of a pruned target have new values that do not go with those under its mask."""
    return any(getattr(method, "_refitted", False) for method in target.history())


def uninstall(targets: Sequence[Target], *, keep_masked: bool, keep_zeros: bool = False) -> None:
    """Turn pruned targets into plain parameters again, or change nothing.

    Args:
        targets: pruned targets.
        keep_masked: multiply the parameter by its mask, else leave the dense values.
        keep_zeros: remember where the mask was 0, see :func:`kept_zeros`.
    """
    if keep_masked:
        _refuse_two_masks((target.parameter, target.mask, target.where) for target in targets)
    histories = [target.history() for target in targets]
    with outside_of_inference(), all_or_nothing(target.module for target in targets):
        for target in targets:
            module, name = target.module, target.name
            if keep_masked and target.mask is not None:
                target.parameter.data = target.weight().masked_fill_(target.mask == 0, 0)  # 0, and not -0
            _unhook(target)
            if keep_zeros and target.mask is not None:
                _remember_zeros(target, target.mask == 0)
            setattr(module, name, target.parameter)  # lets modules that cache their weights, as LSTM does, know
            store_again(module)
    for entry in (entry for history in histories for entry in history):
        if not keep_masked:
            forget(entry)


def kept_zeros(model: nn.Module) -> Iterator[tuple[Target, Tensor]]:
    """Yield all tensors of ``model`` whose zeros :func:`uninstall` remembered, and where they are.

    That stands in a boolean buffer ``weight_zeros`` beside ``weight``, which is not part of the state dict.
    """
    for module in model.modules():
        for target in targets_in(module):
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
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, contents_of(module)) for module in modules]
    weights: dict[tuple[int, int], nn.Parameter] = {}  # tied tensors stay tied
    try:
        for target in list(pruned(model)):
            weight = weights.setdefault((id(target.parameter), id(target.mask)), nn.Parameter(target.weight()))
            _unhook(target)
            setattr(target.module, target.name, weight)
        yield
    finally:
        for module, contents in before:
            restore(module, contents)


def outside_of_inference() -> AbstractContextManager[Any]:
    """Leave inference mode, if it is on, as what is made in it can never be trained."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _unhook(target: Target) -> None:
    """Take hook, mask and product away, so that the parameter stands under the tensor's own name."""
    module, name = target.module, target.name
    key, _ = target.hook()
    if key is not None:
        del module._forward_pre_hooks[key]
    del module._buffers[f"{name}_mask"]
    vars(module).pop(name, None)
    _rename(module, f"{name}_orig", name)


def _trainable(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a copy if it was made in inference mode; to be called outside of that."""
    return tensor.clone() if tensor.is_inference() else tensor


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
