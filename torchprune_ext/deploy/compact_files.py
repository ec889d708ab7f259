"""Files of compacted models: what is left of each tensor, and the numbers that the modules need to hold it.

A compacted model has the modules of the dense one, with smaller tensors and smaller numbers, e.g. ``out_channels``. So
it is the dense model, cut to the shapes and numbers of the file: a sparse file that has them in its metadata as well.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchprune_ext._checks import check_module
from torchprune_ext._host import kept_zeros, outside_of_inference, pruned
from torchprune_ext._readers import plain_class
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext.deploy.container import DAMAGED, opened, short, strict_json
from torchprune_ext.deploy.encodings import words
from torchprune_ext.deploy.reading import SparseFile
from torchprune_ext.deploy.slots import check_names, slots_of
from torchprune_ext.deploy.sparse_files import as_json, write_file

KEY = "torchprune_ext_modules"  # of the metadata
LARGEST = 2**53  # of the whole numbers that are written; sizes are smaller
REMEDY = "Pass the function that built the model before it was compacted, with the same arguments."

# --- save -----------------------------------------------------------------------------------------


def save_compact(model: nn.Module, path: "str | os.PathLike[str]") -> None:
    """Write a model whose channels, units or heads were cut, so that it can be built again without what cut it.

    The file is one of :func:`~torchprune_ext.deploy.sparse_files.save_sparse`, thus a valid safetensors file, in which
    tensors with many zeros take little space. Besides, it holds the buffers that a state dict leaves out, since a cut
    may have changed them, and for each module its class and those of its attributes that are whole numbers, or tuples
    or lists of them, e.g. ``in_features`` or ``num_heads``.

    Args:
        model: any module, compacted by whatever means, or not at all. It is not changed. If it is pruned by masks, what
            they prune is written as 0, as after :func:`~torchprune_ext.lifecycle.remove_all`.
        path: where to write. A file that is there is replaced when the new one is complete, not before.

    Raises:
        TypeError: ``model`` is not a module, ``path`` not a path.
        ValueError: the model holds what a file without pickle cannot hold, see
            :func:`~torchprune_ext.deploy.sparse_files.save_sparse`.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> def network():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = network()
        >>> small[0].weight, small[0].bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
        >>> small[2].weight = nn.Parameter(torch.ones(2, 3))
        >>> small[0].out_features = small[2].in_features = 3  # 3 of the 8 hidden units are left
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compact(small, f"{folder}/small.safetensors")
        ...     loaded = load_compact(network, f"{folder}/small.safetensors")
        >>> loaded[0]
        Linear(in_features=4, out_features=3, bias=True)
        >>> bool((loaded(torch.eye(4)) == small(torch.eye(4))).all())
        True
    """
    slots = slots_of(model, non_persistent=True)
    kept = {id(zeros) for _, zeros in kept_zeros(model)}  # they belong to a training that keeps zeros, not to the model
    slots = {name: slot for name, slot in slots.items() if id(slot.tensor) not in kept}
    first: dict[int, str] = {}
    modules: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), name)
        modules[name] = _described(module) if known == name else known
    write_file(slots, path, {KEY: as_json({"version": 1, "modules": modules})})


def _described(module: nn.Module) -> dict[str, Any]:
    """Return what the file says of a module: class, whole numbers, order of the parameters, tensors that are None."""
    dense = {target.stored_name: target.name for target in pruned(module, recurse=False)}
    return {
        "class": plain_class(module).__name__,
        "numbers": {name: n for name, value in vars(module).items() if (n := _as_numbers(value)) is not None},
        "parameters": [dense.get(name, name) for name in module._parameters],
        "none": [name for name, tensor in _registered(module).items() if tensor is None],
    }


def _as_numbers(value: Any) -> int | list[int] | None:
    """Return a whole number, also one of NumPy, or a row of them that is not empty, as JSON; None for all else."""
    row = value if type(value) in (tuple, list, torch.Size) else [value]
    if not row or not all(isinstance(n, Integral) and not isinstance(n, bool) and abs(int(n)) < LARGEST for n in row):
        return None
    return int(value) if row is not value else [int(n) for n in row]


def _registered(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


# --- load -----------------------------------------------------------------------------------------


def load_compact(constructor: Callable[[], nn.Module], path: "str | os.PathLike[str]") -> nn.Module:
    """Build a dense model, cut it to what a file of :func:`save_compact` holds, and fill it.

    From the file come shapes, dtypes, bits and ties of all tensors, the order of the parameters, and the whole numbers
    of the modules. All else is as the constructor makes it: devices, memory formats, ``requires_grad``, train or eval
    mode, hooks, attributes of other types. A tensor that the constructor makes on the meta device comes to the CPU, so
    that ``with torch.device("meta")`` in the constructor spares the memory of the dense model.

    The file is not trusted: loading runs no code from it, and all of it is checked before the model is touched. Nothing
    becomes larger than the constructor made it, and no module gets an attribute that it does not have.

    Args:
        constructor: a function without arguments that returns the model as it was before it was compacted, e.g.
            ``lambda: resnet18(num_classes=10)``; its weights do not matter.
        path: a file that :func:`save_compact` wrote.

    Returns:
        The model that ``constructor`` made, cut and filled. It can be trained further.

    Raises:
        TypeError: ``constructor`` is not such a function, ``path`` is not a path.
        ValueError: the file is damaged or of another kind, or modules, classes, tensors or numbers do not fit what
            ``constructor`` made, which is then as it was made.
        OSError: the file cannot be read.

    Example:
        See :func:`save_compact`.
    """
    model = _built(constructor)
    modules = dict(model.named_modules(remove_duplicate=False))
    with opened(path) as file, outside_of_inference(), torch.no_grad():
        found = SparseFile(file)
        described = _modules_of(found.metadata)
        _check_modules(modules, described)
        numbers = [new for name, module in modules.items() for new in _numbers(name, module, described)]
        places, none = _places(modules, described, found)
        tensors = {key: _read(found, *key) for key in dict.fromkeys(place.key for place in places)}
    with all_or_nothing(modules.values()):
        for module, name, value in numbers:
            setattr(module, name, value)
        for module, name in none:
            setattr(module, name, None)
        _fill(places, tensors)
        for name, module in modules.items():
            _order(module._parameters, described[name])
    return model


_Key: TypeAlias = tuple[str, torch.device, torch.memory_format]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a tensor of the file goes.

    Args:
        module: the module that holds it.
        name: under which name it does.
        old: the tensor that is there; None if there is none yet.
        key: the name of its values in the file, and the device and memory format that they get.
    """

    module: nn.Module
    name: str
    old: Tensor | None
    key: _Key

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters


def _built(constructor: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that the constructor makes, checked."""
    if isinstance(constructor, nn.Module) or not callable(constructor):
        raise TypeError(
            f"constructor={short(constructor)} is a {type(constructor).__name__}. Pass a function without arguments "
            "that builds the dense model, e.g. lambda: Net(10)."
        )
    model = constructor()
    check_module("constructor()", model)
    if target := next(pruned(model), None):
        raise ValueError(
            f"constructor() returned a model whose {target.where} is pruned. Return a dense model, e.g. by "
            "remove_all(model) before it is returned."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"constructor() returned a model whose {short(name)} has no shape yet. Run one forward pass before it "
                "is returned."
            )
    return model


def _modules_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the file says of the modules; its form is checked, not yet whether it fits."""
    if KEY not in metadata:
        raise ValueError(
            "the file was not written by save_compact: it says nothing of modules. Load it by load_sparse into a model "
            "of the same shapes."
        )
    told = strict_json(metadata[KEY], f"the metadata {KEY}")
    version = told.get("version") if isinstance(told, dict) else None
    if type(version) is int and version > 1:
        raise ValueError(f"{KEY} has version {version}, this library reads 1. Update it.")
    if type(version) is not int or version != 1 or set(told) != {"version", "modules"}:
        raise ValueError(f"the metadata {KEY} do not hold just version and modules. {DAMAGED}")
    modules = told["modules"]
    if not isinstance(modules, dict):
        raise ValueError(f"modules in the metadata {KEY} are not a table. {DAMAGED}")
    for name, said in modules.items():
        if isinstance(said, str):
            fine = isinstance(modules.get(said), dict)
        else:
            fine = (
                isinstance(said, dict)
                and set(said) == {"class", "numbers", "parameters", "none"}
                and isinstance(said["class"], str)
                and isinstance(said["numbers"], dict)
                and all(_as_numbers(value) is not None for value in said["numbers"].values())
                and all(isinstance(said[key], list) for key in ("parameters", "none"))
                and all(isinstance(each, str) for each in (*said["parameters"], *said["none"]))
            )
        if not fine:
            raise ValueError(f"module {short(name)}: what the metadata {KEY} say of it is not valid. {DAMAGED}")
    return modules


def _check_modules(modules: Mapping[str, nn.Module], described: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the modules of file and model have the same names, classes and sharing."""
    check_names("modules", described, modules, REMEDY)
    first: dict[int, str] = {}
    for name, module in modules.items():
        said, known = described[name], first.setdefault(id(module), name)
        if known != (said if isinstance(said, str) else name):
            a, b = (f"the module {short(n)}" if n != name else "a module of its own" for n in (said, known))
            a = a if isinstance(said, str) else "a module of its own"
            raise ValueError(f"module {short(name)} is {a} in the file and {b} from the constructor. {REMEDY}")
        if known == name and said["class"] != type(module).__name__:
            raise ValueError(
                f"module {short(name)} is a {short(said['class'])} in the file and a {type(module).__name__} from the "
                f"constructor. {REMEDY}"
            )


def _numbers(path: str, module: nn.Module, described: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the attributes of a module that are to be set, and to what; a cut makes nothing larger."""
    if isinstance(described[path], str):
        return
    for name, new in described[path]["numbers"].items():
        if name not in vars(module):
            continue  # of another version of the class, or left by a forward pass; a cut makes no attributes
        old = vars(module)[name]
        both = f"{short(new)} in the file and {short(old)} from the constructor"
        where = f"module {short(path)} of type {type(module).__name__}: its attribute {short(name)} is {both}"
        here = _as_numbers(old)
        after, before = (each if isinstance(each, list) else [each] for each in (new, here))
        if here is None or isinstance(new, list) != isinstance(here, list) or len(after) != len(before):
            raise ValueError(f"{where}. {REMEDY}")
        if any(a != b and not 0 <= a < b for a, b in zip(after, before, strict=True)):
            raise ValueError(
                f"{where}, but a cut makes nothing larger. {REMEDY} If it is a counter, set it in the constructor."
            )
        if after != before:
            yield module, name, type(old)(new)


def _places(
    modules: Mapping[str, nn.Module], described: Mapping[str, Any], found: SparseFile
) -> tuple[list[_Place], list[tuple[nn.Module, str]]]:
    """Return where the tensors of the file go, and what becomes None; all checked."""
    places: dict[tuple[int, str], _Place] = {}
    keys: dict[str, _Key] = {}
    none, names = [], set(found.names())
    used: list[str] = []
    for path, module in modules.items():
        said = described[path]
        gone = described[said]["none"] if isinstance(said, str) else said["none"]
        for name, old in _registered(module).items():
            full = f"{path}.{name}" if path else name
            if name in gone and full in names:
                raise ValueError(f"tensor {short(full)} is in the file, which says that it is None. {DAMAGED}")
            if name in gone and old is not None:
                none.append((module, name))
            elif full in names or old is not None:
                used.append(full)
            if full not in names:
                continue
            there = found.of(full)
            key = keys.setdefault(there, (there, _device(module, old), _format(old)))  # one for tensors that are tied
            place = _Place(module, name, old, key)
            if places.setdefault((id(module), name), place).key != place.key:
                raise ValueError(
                    f"tensor {short(full)} is one with another in the model, but not in the file. {DAMAGED}"
                )
            _check_tensor(full, place, found)
    check_names("tensors", names, used, REMEDY)
    return list(places.values()), none


def _device(module: nn.Module, old: Tensor | None) -> torch.device:
    """Return where a tensor goes: where it was, else where the module's others are, else to the CPU."""
    for tensor in (old, *_registered(module).values()):
        if tensor is not None and not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def _format(old: Tensor | None) -> torch.memory_format:
    """Return the memory format of a tensor: the channels first or last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.ndim if old is not None else 0)
    if old is None or last is None or old.is_contiguous() or not old.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _check_tensor(full: str, place: _Place, found: SparseFile) -> None:
    """Raise ``ValueError`` unless a tensor of the file can take its place: of no other kind, and not larger."""
    layout, old = found.layouts[place.key[0]], place.old
    where = f"tensor {short(full)} has shape {short(layout.shape)} and dtype {layout.dtype} in the file, but"
    if old is None:
        others = [tensor for tensor in _registered(place.module).values() if tensor is not None]
        most = max((tensor.numel() for tensor in others), default=0)
        if layout.numel > most:
            raise ValueError(
                f"{where} the constructor makes None there, and no tensor of the module with more than {most} entries. "
                f"{REMEDY}"
            )
        if place.is_parameter and not layout.dtype.is_floating_point and not layout.dtype.is_complex:
            raise ValueError(f"{where} it is a parameter, which must be floating point. {DAMAGED}")
        return
    if type(old.data) is not Tensor or old.layout != torch.strided or old.is_quantized:
        raise ValueError(
            f"{where} is a {type(old.data).__name__} of layout {old.layout} from the constructor. {REMEDY}"
        )
    made = f"shape {tuple(old.shape)} and dtype {old.dtype} from the constructor"
    if len(layout.shape) != old.ndim or any(a > b for a, b in zip(layout.shape, old.shape, strict=True)):
        raise ValueError(f"{where} {made}; a cut makes nothing larger. {REMEDY}")
    if layout.dtype != old.dtype and not (layout.dtype.is_floating_point and old.dtype.is_floating_point):
        raise ValueError(f"{where} {made}. {REMEDY}")


def _read(found: SparseFile, name: str, device: torch.device, form: torch.memory_format) -> Tensor:
    """Return a tensor of the file."""
    shape, dtype = found.layouts[name].shape, found.layouts[name].dtype
    flat, start = torch.empty(math.prod(shape), dtype=dtype, device="cpu"), 0
    for entries, _ in found.blocks(name):
        words(flat)[start : start + len(entries)] = entries
        start += len(entries)
    return flat.view(shape).to(device, memory_format=form)


def _fill(places: list[_Place], tensors: Mapping[_Key, Tensor]) -> None:
    """Put the tensors in their places: those that are one in the file become one, parameters stay the same objects."""
    groups: dict[tuple[_Key, bool], list[_Place]] = {}
    for place in places:
        groups.setdefault((place.key, place.is_parameter), []).append(place)
    taken: set[int] = set()
    for (key, is_parameter), group in groups.items():
        value = tensors[key]
        if is_parameter:
            old = next((p.old for p in group if _can_be_kept(p.old) and id(p.old) not in taken), None)
            if old is None:
                value = nn.Parameter(value, requires_grad=_trains(group[0]))
            else:
                taken.add(id(old))
                old.data, value = value, old
        for place in group:
            setattr(place.module, place.name, value)


def _order(parameters: dict[str, nn.Parameter | None], said: Any) -> None:
    """Put the parameters of a module in the order of the file, which optimizers go by; native pruning changes it."""
    if isinstance(said, dict):
        order = [name for name in dict.fromkeys((*said["parameters"], *parameters)) if name in parameters]
        items = [(name, parameters[name]) for name in order]
        parameters.clear()
        parameters.update(items)


def _can_be_kept(old: Tensor | None) -> bool:
    """Return whether a parameter can be given other data; others in the model may refer to it."""
    return old is not None and not old.is_meta and not old.is_inference() and old.grad is None


def _trains(place: _Place) -> bool:
    """Return whether a parameter is to be trained: as the one before it, else as the others of its module."""
    if place.old is not None:
        return place.old.requires_grad
    others = [p.requires_grad for p in place.module._parameters.values() if p is not None]
    return any(others) or not others
