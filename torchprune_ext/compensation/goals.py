"""What a call asks of each tensor: how much of it goes, and in what units; the same words for all calls."""

from collections.abc import Mapping, Sequence

from torchprune_ext._checks import check_fraction, errors_about
from torchprune_ext._host import Target
from torchprune_ext._layers import Layer
from torchprune_ext._statistics import Key
from torchprune_ext.patterns import NM, Channel

Sparsity = float | Mapping[Key, float]
Units = Channel | Mapping[Key, Channel]


def check_goal(target_sparsity: Sparsity | None, pattern: NM | None, unit: Units | None = None) -> None:
    """Raise unless exactly one of the first two is given, ``unit`` with the first only, and of the right type."""
    check_units(unit)
    if unit is not None and (pattern is not None or target_sparsity is None):
        raise TypeError(
            f"unit={unit!r}, target_sparsity={target_sparsity!r}, pattern={pattern!r}: units are pruned to a "
            "target_sparsity=, e.g. 0.5, and not by a pattern. For both, call twice, the second time with dense=."
        )
    if (target_sparsity is None) == (pattern is None):
        raise TypeError(
            f"target_sparsity={target_sparsity!r}, pattern={pattern!r}: pass exactly one of them, e.g. "
            "target_sparsity=0.5 or pattern=NM(2, 4)."
        )
    if pattern is not None and not isinstance(pattern, NM):
        raise TypeError(f"pattern={pattern!r} is a {type(pattern).__name__}. Pass e.g. NM(2, 4).")


def check_allocation(
    allocation: object, target_sparsity: Sparsity | None, pattern: NM | None, unit: Units | None
) -> float | None:
    """Return the sparsity to share if ``allocation`` is "auto", None if it is None; raise for anything else."""
    if allocation is None:
        return None
    if allocation != "auto":
        error = ValueError if isinstance(allocation, str) else TypeError
        raise error(
            f"allocation={allocation!r} is not 'auto'. Pass that, or shares of your own, such as allocation.owl(...) "
            "returns, as target_sparsity={(module, name): fraction}."
        )
    if pattern is not None:
        raise TypeError(
            f"allocation='auto', pattern={pattern!r}: a pattern leaves every layer the same share. Leave allocation "
            "out, or pass target_sparsity= instead of the pattern."
        )
    if unit is not None:
        raise TypeError(
            f"allocation='auto', unit={unit!r}: shares are of entries. Leave allocation out; for units, target_macs= "
            "or target_parameters= share a budget."
        )
    if isinstance(target_sparsity, Mapping):
        raise TypeError(
            "allocation='auto', target_sparsity={...}: each tensor has its share already. Pass one number for all, or "
            "leave allocation out."
        )
    return target_sparsity


def check_units(unit: object) -> None:
    """Raise ``TypeError`` unless ``unit`` is one, or one for each of some tensors, or None."""
    if not (unit is None or isinstance(unit, (Channel, Mapping))):
        raise TypeError(
            f"unit={unit!r} is a {type(unit).__name__}. Pass Channel(dim=1), whole input columns or channels, or one "
            "for each tensor that shall lose some, as {(module, name): Channel(dim=1)}."
        )


def goals_of(
    targets: Sequence[Target], target_sparsity: Sparsity, units: Mapping[Key, Channel] | None = None
) -> dict[Key, float]:
    """Return the sparsity that each target shall have, or all together; 0 for one that has none of ``units``."""
    keys = [(target.module, target.name) for target in targets]
    rest = {} if units is None else {key: 0.0 for key in keys if key not in units}
    if not isinstance(target_sparsity, Mapping):
        check_fraction("target_sparsity", target_sparsity)
        return {**dict.fromkeys(keys, target_sparsity), **rest}
    goals = {**rest, **target_sparsity}
    for target, key in zip(targets, keys, strict=True):
        if key not in goals:
            raise ValueError(
                f"target_sparsity has no entry for {target.where}. Give one for each tensor of params, as "
                "{(module, name): fraction}."
            )
        check_fraction(f"target_sparsity[{_named(key)}]", goals[key])
        if key in rest and goals[key]:
            raise ValueError(
                f"target_sparsity[{_named(key)}]={goals[key]!r}, but unit has no entry for it. Add one, e.g. "
                "Channel(dim=1), or take it out of target_sparsity: then it is only re-fitted."
            )
    _refuse_others("target_sparsity", goals, keys)
    return {key: goals[key] for key in keys}


def along_inputs(pattern: NM, layer: Layer) -> NM:
    """Return ``pattern`` along the axis that ``layer`` sums over, unless it names an axis itself."""
    return pattern.along(0 if layer.swapped else 1)


def units_of(targets: Sequence[Target], unit: Units | None) -> dict[Key, Channel] | None:
    """Return the unit of each target that has one; None without ``unit``."""
    keys = [(target.module, target.name) for target in targets]
    if unit is None:
        return None
    if isinstance(unit, Channel):
        return dict.fromkeys(keys, unit)
    if not unit:
        raise ValueError("unit={} lists no tensor. To re-fit and prune nothing, call compensate.")
    _refuse_others("unit", unit, keys)
    for key, each in unit.items():
        if not isinstance(each, Channel):
            raise TypeError(f"unit[{_named(key)}]={each!r} is a {type(each).__name__}. Pass e.g. Channel(dim=1).")
    return dict(unit)


def width_of(unit: Channel, layer: Layer) -> int:
    """Return how many neighbouring columns of the matrix of ``layer`` are one ``unit`` of what it reads.

    Raises:
        ValueError: the unit is not one of inputs, does not fit the weight, or is all that the layer reads.
    """
    shape, own = layer.weight.shape, 0 if layer.swapped else 1
    with errors_about(f"unit={unit!r}, {layer.label} of shape {tuple(shape)}"):
        if unit.axis(shape) != own:
            raise ValueError(
                f"dim={unit.dim} counts the outputs, and what is left of a layer can only make up for inputs that go. "
                f"Pass Channel(dim={own}), with the weight of the layer that reads what shall go."
            )
        if unit.groups not in (1, layer.groups):
            raise ValueError(f"the layer has groups={layer.groups}, not {unit.groups}. Leave groups out of the unit.")
        if unit.size == shape[own]:
            raise ValueError(
                f"there is one unit{' in each group' if layer.groups > 1 else ''}, and at least one stays. "
                "Give the tensor 0.0 in target_sparsity, or pass unit as {(module, name): Channel(dim=...)} without it."
            )
    return unit.size * shape[2:].numel()


def _refuse_others(param: str, given: Mapping[Key, object], keys: Sequence[Key]) -> None:
    """Raise ``ValueError`` if ``given``, the caller's ``param``, has other keys than those of the listed tensors."""
    others = [_named(key) for key in given if key not in keys]
    if others:
        raise ValueError(
            f"{param} has entries for what params does not list: {'; '.join(others)}. List each there as "
            "(module, name), or leave it out here."
        )


def _named(key: object) -> str:
    """Return a key in words, without the whole of its module."""
    if isinstance(key, tuple) and len(key) == 2:
        return f"{type(key[0]).__name__}, {key[1]!r}"
    return f"a {type(key).__name__}"
