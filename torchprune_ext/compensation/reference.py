"""The reference model: whose outputs the layers are fitted to, and where its values come from.

After a first fit, or training under masks, a model no longer holds the values that it had before pruning. So they are
given, as a copy of the model, its state dict, or :class:`DenseValues`; or they are those under the masks, as long as
nothing has changed since the masks were made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_module
from torchprune_ext._fingerprints import Fingerprint
from torchprune_ext._host import Target, changed_since_pruned, plain_entries, pruned, targets_of
from torchprune_ext._runs import refuse_lazy
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.streams import Tables

REMEDY = (
    "Pass dense=: a copy of the model made before pruning, its state dict, or what dense_values(model, params) "
    "returned then; and keep passing it in all later rounds."
)
DISTINCT = 16  # values from which on their order tells more than chance: training can swap the signs of binary weights


@dataclass(frozen=True, slots=True, eq=False)
class DenseValues:
    """The values of some tensors of a model, and a fingerprint of all others.

    Args:
        values: a copy of each tensor, by its name in the model.
        others: fingerprints of the model's other parameters and buffers, which must not change.
    """

    values: dict[str, Tensor]
    others: dict[str, Fingerprint]


WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and its like; of torch.compile
Dense = nn.Module | Mapping[str, Tensor] | DenseValues


def dense_values(model: nn.Module, params: Iterable[Key]) -> DenseValues:
    """Remember the dense values of some weights and of their layers' biases, where a copy of the model is too much.

    Call it before pruning, and pass the result as ``dense=`` to :func:`.compensate` and its neighbours. They change
    nothing but the listed weights and biases. If anything else of the model changes, as in training, the reference
    model would be lost, so that is refused: then pass a copy of the whole model.

    Args:
        model: the model, before pruning.
        params: ``(module, name)`` pairs, all that will be pruned and re-fitted.

    Returns:
        Copies of these tensors, and a few numbers for each of the others.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a tensor is not in the model, or has changed since it was pruned.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> params, data = tpe.prunable_parameters(model), [(torch.randn(64, 8), None)]
        >>> dense = tpe.dense_values(model, params)
        >>> for sparsity in (0.3, 0.5, 0.7):
        ...     tpe.global_unstructured(params, target_sparsity=sparsity)
        ...     fits = tpe.compensate(model, data, params, dense=dense, progress=False)
    """
    check_module("model", model)
    refuse_lazy(model)
    targets = list(targets_of(params).values())
    refuse_changed(targets)
    listed = {(module, key): value for module, key, value in _under_masks(targets) if value is not None}
    names = plain_entries(model)
    places = {entry[:2] for entry in names.values()}
    for target in targets:
        if (target.module, target.name) not in places:
            raise ValueError(f"params holds {target.where}, which is not a part of the model. Pass the model it is in.")
    values, others = {}, {}
    for name, (module, key, tensor) in names.items():
        if (module, key) in listed:
            values[name] = listed[module, key].clone()
        else:
            others[name] = _fingerprint(tensor)
    return DenseValues(values, others)


def reference_tables(model: nn.Module, targets: Sequence[Target], dense: Dense | None) -> Tables:
    """Return what the modules of ``model`` hold while it runs as the reference model.

    Args:
        model: the model.
        targets: the listed tensors.
        dense: where the values come from; None for those under the masks of ``targets`` and of their layers' biases.

    Raises:
        TypeError: ``dense`` is of another type.
        ValueError: the values do not fit the model, or are its own in another order; or ``dense`` is None and a target
            has changed since it was pruned.
    """
    if dense is None:
        refuse_changed(targets)
        return _tables(_under_masks(targets))
    names = plain_entries(model)
    values = _values(model, names, dense)
    found = []
    for name, value in values.items():
        module, key, tensor = names[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"dense holds {name} of {what}, but the model's has shape {tuple(tensor.shape)}. Pass the same model "
                "as it was before pruning."
            )
        found.append((module, key, value.detach().to(tensor.device, tensor.dtype)))
        if (target := Target.found(module, key)) is not None and _in_another_order(found[-1][2], target.parameter):
            raise ValueError(
                f"dense holds {name} with the model's own values, the same values in another order, as if only one of "
                "them had gone through permute_for_nm: layers would be fitted to the outputs of other channels. Take "
                "dense after permute_for_nm and before pruning."
            )
    listed = {(target.module, target.name) for target in targets}
    for module, key, value in found:
        if (module, key) in listed and not value.isfinite().all():
            raise ValueError(f"dense holds NaN or infinity in {type(module).__name__}.{key}. Pass finite values.")
    return _tables(found)


def _in_another_order(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape hold the same values in another order, too many to be so by chance."""
    if not (one.is_floating_point() and one.layout == other.layout == torch.strided) or one.is_meta or not one.numel():
        return False
    if torch.equal(one, other) or any(a != b for a, b in zip(one.aminmax(), other.detach().aminmax(), strict=True)):
        return False
    values = one.flatten().sort().values
    if not torch.equal(values, other.detach().flatten().sort().values):
        return False
    return len(values.unique_consecutive()) >= min(DISTINCT, len(values))


def refuse_changed(targets: Iterable[Target]) -> None:
    """Raise ``ValueError`` if a target no longer holds the values under its mask that it had when it was pruned."""
    for target in targets:
        bias = Target.found(target.module, "bias")
        for each in (target, bias):
            if each is not None and each.mask is not None and changed_since_pruned(each):
                raise ValueError(
                    f"{each.where} has changed since it was pruned (re-fitted, trained or loaded), so the values of "
                    f"the dense model are no longer in it. {REMEDY}"
                )


def _under_masks(targets: Iterable[Target]) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Return the values under the masks of ``targets`` and their layers' biases; None where a layer has no bias."""
    found: dict[tuple[nn.Module, str], Tensor | None] = {}
    for target in targets:
        found[target.module, target.name] = target.parameter.detach()
        bias = Target.found(target.module, "bias")
        if bias is not None:
            found[target.module, "bias"] = bias.parameter.detach()
        elif "bias" in target.module._parameters:
            found[target.module, "bias"] = None
    return [(module, key, value) for (module, key), value in found.items()]


def _values(model: nn.Module, names: Mapping[str, Any], dense: Dense) -> Mapping[str, Tensor]:
    """Return the values of all tensors of the model that ``dense`` holds, by their names in it."""
    if isinstance(dense, DenseValues):
        if set(dense.values) | set(dense.others) != set(names):
            raise ValueError(
                f"dense holds the values of another model than this {type(model).__name__}. "
                "Pass what dense_values(model, params) returned for it."
            )
        for name, fingerprint in dense.others.items():
            if not _matches(fingerprint, names[name][2]):
                raise ValueError(
                    f"{name} has changed since dense_values(model, params) was called, and is not among its params, so "
                    "the dense model is lost. Pass dense=copy.deepcopy(model), made before pruning."
                )
        return dense.values
    if isinstance(dense, nn.Module):
        for target in pruned(dense):
            raise ValueError(
                f"dense is pruned itself ({target.where}), so it does not tell which values are meant. Pass a copy "
                "made before pruning, or call remove_all or undo_all on the copy first."
            )
        held = {name: tensor for name, (_, _, tensor) in plain_entries(dense).items()}
        _refuse_other_names(set(names), set(names), held)
        return held
    if isinstance(dense, Mapping):
        given = {name: value for name, value in dense.items() if not str(name).endswith("_extra_state")}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        kept = set(model.state_dict(keep_vars=True))
        needed = {name for name in names if name not in buffers or name in kept}
        _refuse_other_names(needed, set(names), given)
        return given
    raise TypeError(
        f"dense is a {type(dense).__name__}. Pass a copy of the model made before pruning, its state dict, or what "
        "dense_values(model, params) returned."
    )


def _refuse_other_names(needed: set[str], known: set[str], given: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``given`` are among ``known`` and all of ``needed``."""
    names = {str(name) for name in given}
    unknown, missing = sorted(names - known), sorted(needed - names)
    if not (unknown or missing):
        return
    masks = [name for name in unknown if name.endswith(("_orig", "_mask"))]
    for wrapper in WRAPPERS if missing else ():
        if needed <= {name.removeprefix(wrapper) for name in names}:
            raise ValueError(
                f"dense is of the wrapped model: its names begin with {wrapper!r}. Pass dense="
                f"{{name.removeprefix({wrapper!r}): value for name, value in dense.items()}} of a state dict, and of a "
                "module the one that is wrapped."
            )
        if {name.removeprefix(wrapper) for name in needed} <= names:
            raise ValueError(
                f"dense is of the model inside, but this one is wrapped: its names begin with {wrapper!r}. Pass the "
                "model inside as model, or wrap dense as well."
            )
    near = {name: match[0] for name in unknown[:5] if (match := get_close_matches(name, missing or known, 1))}
    raise ValueError(
        f"dense does not fit the model: it lacks {missing[:5]} ({len(missing)} names) and has {unknown[:5]} "
        f"({len(unknown)} names) that the model has not"
        + (f", near misses: {near}" if near else "")
        + (". It was taken while pruned; pass one from before pruning." if masks else ". Pass the same model's.")
    )


def _tables(values: Iterable[tuple[nn.Module, str, Tensor | None]]) -> Tables:
    """Return where to put ``values``, and the lists of weights that recurrent modules read instead of their tables."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    recurrent: dict[nn.RNNBase, dict[str, Tensor | None]] = {}
    for module, key, value in values:
        if key in module._buffers:
            found.append((module._buffers, key, value))
            continue
        parameter = None if value is None else nn.Parameter(value, requires_grad=False)
        found.append((module._parameters, key, parameter))
        if isinstance(module, nn.RNNBase):
            recurrent.setdefault(module, {})[key] = parameter
    for module, own in recurrent.items():
        weights = [own.get(name, getattr(module, name, None)) for name in module._flat_weights_names]
        found.append((vars(module), "_flat_weights", weights))
    return found


def _fingerprint(tensor: Tensor) -> Fingerprint:
    return Fingerprint.of(tensor if tensor.is_floating_point() else tensor.double())


def _matches(fingerprint: Fingerprint, tensor: Tensor) -> bool:
    return fingerprint.matches(tensor if tensor.is_floating_point() else tensor.double())
