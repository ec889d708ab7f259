"""State dicts of pruned models: into a model that is pruned, dense or pruned otherwise, and out of it as dense."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext._checks import check_module, errors_about
from torchprune_ext._host import Target, as_plain, install, pruned, refuse_half_tied, stored_keys, targets_in
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext.deploy.copying import refresh

M = TypeVar("M", bound=nn.Module)
SUGGESTED = 20  # near misses are looked up for so many keys of each kind


class Loaded(BasePruningMethod):
    """History entry of a mask that came out of a file. Driven by the host, it keeps the mask that is there.

    Args:
        call: name of the function that read it.
    """

    PRUNING_TYPE = "global"

    def __init__(self, call: str) -> None:
        self.call = call

    def __repr__(self) -> str:
        """Return the call."""
        return f"{self.call}()"

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return ``default_mask``."""
        return torch.ones_like(t) if default_mask is None else default_mask.clone()


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict that ``model`` would have after ``remove_all``, and leave the model as it is.

    This is what to hand to code that knows nothing of pruning, such as ``model.save_pretrained(path,
    state_dict=dense_state_dict(model))``: saved as it is, a pruned model has keys that ``from_pretrained`` drops, and
    the weights start at random.

    Args:
        model: any module, pruned by whatever method, or not at all.

    Returns:
        Tensors by name. Pruned ones are new tensors of ``weight_orig * weight_mask``; the others share memory with the
        model, as in ``model.state_dict()``. Tied tensors are tied.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: two modules share a parameter that only one of them prunes, or each by another mask.

    Example:
        >>> from torchprune_ext import every_other
        >>> model = nn.Sequential(every_other(nn.Linear(2, 2), "weight"))
        >>> list(model.state_dict()), list(dense_state_dict(model))
        (['0.weight_orig', '0.bias', '0.weight_mask'], ['0.weight', '0.bias'])
    """
    check_module("model", model)
    targets = list(pruned(model))
    refuse_half_tied(
        model.named_modules(),
        targets,
        "Prune both by one global call that lists both, or untie them: give one of the modules a clone, as a new "
        "nn.Parameter.",
    )
    weights: dict[int, nn.Parameter | None] = {}
    with torch.inference_mode(False), as_plain(model):
        for target in targets:  # tied tensors have equal masks, though perhaps not the same
            own = target.module._parameters
            own[target.name] = weights.setdefault(id(target.parameter), own[target.name])
        return model.state_dict()


def load_pruned_state_dict(model: M, state_dict: Mapping[str, Any]) -> M:
    """Load a state dict into ``model``, whichever of the two is pruned, or change nothing.

    - A tensor that is pruned in the state dict (``weight_orig`` and ``weight_mask``) gets that mask in the model. Where
      the model had another one, or none, its history gets the entry ``load_pruned_state_dict()``.
    - A tensor that is dense in the state dict (``weight``) and pruned in the model gives the dense values; the model's
      mask stays.
    - All others load as in :meth:`torch.nn.Module.load_state_dict`.

    Parameters stay the same objects in the same order, so optimizers stay valid. Every ``weight`` is fresh at once.

    Args:
        model: any module, pruned or not.
        state_dict: what ``state_dict()`` of such a model returned, or a file of it loaded with
            ``torch.load(..., weights_only=True)`` or ``safetensors``. Any device, any floating point dtype.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module, or ``state_dict`` not a mapping from names to tensors.
        ValueError: a key fits nothing or is missing (all are listed, with those that are spelt alike), a mask without
            its ``_orig`` or the reverse, a shape that does not fit, a mask of values other than 0 and 1, tied tensors
            under two masks, or a model with lazy layers or on the meta device. The model is as it was; to make sure of
            that, its values are kept in main memory meanwhile.

    Example:
        >>> from torch.nn.utils import prune
        >>> old, new = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = prune.l1_unstructured(old, "weight", 0.5)
        >>> bool((load_pruned_state_dict(new, old.state_dict()).weight == old.weight).all()), prune.is_pruned(new)
        (True, True)
    """
    check_module("model", model)
    values = _checked(state_dict)
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError(
            f"model of type {type(model).__name__} has lazy layers, whose tensors have no shape yet. "
            "Run one forward first."
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"model of type {type(model).__name__} has tensors on the meta device, which can hold no values. "
            "Call model.to_empty(device='cpu') first."
        )
    slots = _slots(model)
    masks = _masks(model, slots, values)
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    try:
        with torch.inference_mode(False), all_or_nothing(model.modules()):
            install(list({(t.module, t.name): (t, m, mask) for t, m, mask in masks}.values()))
            _load(model, values)
            refresh(model)
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
    return model


def accept_pruned(model: nn.Module, before: Callable[[], object] | None = None) -> ExitStack:
    """Let ``model.load_state_dict(...)`` take state dicts of pruned models as :func:`load_pruned_state_dict` does.

    For trainers, which load by themselves. Torch decides about missing keys and the like, and what it has loaded before
    it raises stays.

    Args:
        model: any module, pruned or not.
        before: called each time before masks are installed.

    Returns:
        Ends it by ``close()``. A copy of the model, or a pickle, goes on to take masks.
    """
    check_module("model", model)
    ended = ExitStack()
    ended.callback(model._register_load_state_dict_pre_hook(_Adopt(before), with_module=True).remove)
    ended.callback(model.register_load_state_dict_post_hook(_refresh_loaded).remove)
    return ended


class _Adopt:
    """Hook before ``load_state_dict``: the masks of the state dict become the model's."""

    def __init__(self, before: Callable[[], object] | None = None) -> None:
        self._before = before

    def __reduce__(self) -> tuple[type["_Adopt"], tuple[()]]:
        """Be copied and pickled without what is called before, which is about the one model."""
        return _Adopt, ()

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        """Install masks, and bring the keys below ``prefix`` into the form that ``module`` has then."""
        if self._before is not None:
            self._before()
        keys = [key for key in state_dict if key.startswith(prefix)]
        values = OrderedDict((key.removeprefix(prefix), state_dict[key]) for key in keys)
        slots = _slots(module)
        _fill_tied(slots, values)
        masks = _masks(module, slots, values)
        with torch.inference_mode(False), all_or_nothing(module.modules()):
            install(list({(t.module, t.name): (t, m, mask) for t, m, mask in masks}.values()))
        for key in keys:
            del state_dict[key]
        state_dict.update((prefix + key, value) for key, value in values.items())


def _fill_tied(slots: dict[str, Target], values: "OrderedDict[str, Any]") -> None:
    """Give all places of a pruned tied tensor its keys, where the file of a trainer has them under one name only."""
    pruned_as: dict[int, tuple[str, str]] = {}
    for stem, target in slots.items():
        if values.keys() >= set(stored_keys(stem)):
            pruned_as.setdefault(id(target.parameter), stored_keys(stem))
    for stem, target in slots.items():
        if id(target.parameter) in pruned_as and values.keys().isdisjoint({stem, *stored_keys(stem)}):
            for own, other in zip(stored_keys(stem), pruned_as[id(target.parameter)], strict=True):
                values[own] = values[other]


def _refresh_loaded(module: nn.Module, incompatible: object) -> None:
    """Hook after ``load_state_dict``: what is read without a forward is what was loaded."""
    refresh(module)


def _checked(state_dict: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """Return a copy of ``state_dict`` with its metadata, or say what it is instead."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}. Pass what model.state_dict() returns.")
    values = OrderedDict(state_dict)
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict has the key {key!r}. Pass what model.state_dict() returns.")
        if isinstance(value, Mapping) and not key.endswith("_extra_state"):
            raise TypeError(
                f"state_dict[{key!r}] is a {type(value).__name__}, not a tensor. If it is the state dict, pass "
                f"state_dict[{key!r}]."
            )
    values._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    return values


def _slots(model: nn.Module) -> dict[str, Target]:
    """Return every tensor of ``model`` that is or could be pruned, by the key that it has when dense."""
    slots = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for target in targets_in(module):
            slots[f"{path}.{target.name}" if path else target.name] = target
    return slots


def _masks(
    model: nn.Module, slots: dict[str, Target], values: "OrderedDict[str, Any]"
) -> list[tuple[Target, BasePruningMethod, Tensor]]:
    """Return what to install, and bring the keys of ``values`` into the form that the model will have then."""
    own = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for stem, target in slots.items():
        tied.setdefault(id(target.parameter), []).append(stem)
    given = set(values)
    for key in own.keys() & given:
        if isinstance(own[key], Tensor) and isinstance(values[key], Tensor):
            _check_shape(key, values[key], own[key])
    masks: list[tuple[Target, BasePruningMethod, Tensor]] = []
    for stem, target in slots.items():
        orig, mask = stored_keys(stem)
        if target.mask is None and (orig in own or mask in own):
            continue  # the model's own tensors are called so
        for key in {stem, orig} & given:
            if isinstance(values[key], Tensor):
                _check_shape(key, values[key], target.parameter)
        # files that write shared memory once have the values of tied tensors under one of the names
        others = tied[id(target.parameter)]
        if mask in given:
            holders = [stored_keys(other)[0] for other in [stem, *others] if stored_keys(other)[0] in given]
            if not holders:
                raise ValueError(
                    f"state_dict has the mask {mask!r} without its {orig!r}, so there are no values to mask. "
                    f"Save the whole state dict of the pruned model, or leave {mask!r} out."
                )
            if stem in given:
                raise ValueError(f"state_dict has both {stem!r} and {orig!r}, of which one is wrong. Leave one out.")
            values.setdefault(orig, values[holders[0]])
            with errors_about(f"state_dict[{mask!r}]"):
                values[mask] = new = _mask(values[mask], target)
            if target.mask is None or not torch.equal(target.mask != 0, new != 0):
                with errors_about(stem):
                    masks.append((Target.of(target.module, target.name), Loaded("load_pruned_state_dict"), new))
        elif orig in given:
            raise ValueError(
                f"state_dict has {orig!r} without its {mask!r}, so what is pruned is unknown. Save the whole state "
                f"dict of the pruned model, or rename {orig!r} to {stem!r} if it is dense."
            )
        elif stem not in given and any(given.issuperset(stored_keys(other)) for other in others):
            raise ValueError(
                f"state_dict has nothing for {stem!r}, which is tied to {others!r} in the model, and prunes that. Say "
                f"whether {stem!r} is pruned too: state_dict[{mask!r}] = the other mask, or state_dict[{stem!r}] = "
                "the other _orig."
            )
        elif target.mask is not None:
            if stem in given:
                values[orig] = values.pop(stem)
            if not given.isdisjoint(others):
                values[mask] = target.mask
    return masks


def _check_shape(key: str, value: Tensor, own: Tensor) -> None:
    if value.shape != own.shape:
        raise ValueError(
            f"state_dict[{key!r}] has the shape {tuple(value.shape)}, but the model's is {tuple(own.shape)}. "
            "Build the model with the sizes of the one that was saved."
        )


def _mask(mask: Any, target: Target) -> Tensor:
    """Return ``mask`` as the host keeps it: shape, dtype, device and memory format of the parameter."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"is a {type(mask).__name__}. A mask is a tensor of zeros and ones.")
    if mask.shape != target.parameter.shape:
        raise ValueError(
            f"has the shape {tuple(mask.shape)}, but the tensor's is {tuple(target.parameter.shape)}. "
            "Build the model with the sizes of the one that was saved."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("has values other than 0 and 1. Save weight_mask as pruning made it.")
    return torch.empty_like(target.parameter, requires_grad=False).copy_(mask)


def _load(model: nn.Module, values: "OrderedDict[str, Any]") -> None:
    """Let torch load ``values``, whose keys have the model's form, and raise unless all fit."""
    try:
        missing, unexpected = model.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise ValueError(f"state_dict does not fit {type(model).__name__}: {error}") from error
    own = model.state_dict(keep_vars=True)
    filled = {id(value) for key, value in own.items() if key in values}
    missing = [key for key in missing if id(own.get(key)) not in filled]  # a tied tensor needs one of its names
    if not missing and not unexpected:
        return
    lines = [
        *(f"  fits nothing: {line}" for line in _near(unexpected, own)),
        *(f"  is missing: {line}" for line in _near(missing, unexpected)),
    ]
    raise ValueError(
        f"state_dict does not fit {type(model).__name__}, and nothing was loaded. Rename, remove or add these keys:\n"
        + "\n".join(lines)
    )


def _near(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return one line for each of ``keys``, with the ``known`` ones that are spelt alike."""
    choices, lines = list(known), []
    for place, key in enumerate(keys):
        near = []
        if place < SUGGESTED:  # with a prefix more or less, as that of a wrapper, or misspelt
            near = [known for known in choices if f".{known}".endswith(f".{key}") or f".{key}".endswith(f".{known}")]
            near = near[:2] or difflib.get_close_matches(key, choices, n=2)
        lines.append(f"{key!r}" + (f" (near: {', '.join(map(repr, near))})" if near else ""))
    return lines
