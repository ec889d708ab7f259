"""Takes channels out of the tensors of a model, and puts right the numbers in its modules that repeat their widths."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from torchprune_ext._graph import Group, Member, Reading

HEAD_WIDTHS = ("dim", "size", "width", "feature", "channel", "group")  # in names of numbers that do not count heads
WIDTHS = ("all_head_size", "split_size", "inner_dim", "attn_dim", "attention_dim", "inner_size")


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Channels of a group that go.

    Args:
        group: the group.
        gone: bool of shape ``(group.size,)``.
        constant: bool of the same shape: which of them are read as constants, to be added to the biases of the readers.
        widest: put right every number near the group that is one of its old widths, not only those known by name.
    """

    group: Group
    gone: Tensor
    constant: Tensor
    widest: bool = False


def cut(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Take channels out of ``model``, of whose tensors the groups tell by name."""
    holders = _holders(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for each in cuts:
        for member in each.group.members:
            gone.setdefault((member.name, member.axis), set()).update(member.indices[each.gone].flatten().tolist())
    for each in cuts:
        for reading in {reading.reader: reading for reading in each.group.readings}.values():  # once, however often
            if _fold(holders, reading, each) and (reading.reader, 0) in gone:  # a new bias has the rows of its weight
                gone[f"{str(reading.reader).removesuffix('weight')}bias", 0] = gone[str(reading.reader), 0]
    holders = _holders(model)
    sizes = {name: _get(*held[0]).shape for name, held in holders.items()}
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, axis), places in gone.items():
        if places:
            alive = torch.ones(sizes[name][axis], dtype=torch.bool, device="cpu")
            alive[list(places)] = False
            kept.setdefault(name, {})[axis] = alive.nonzero().flatten()
    for name, axes in kept.items():
        _shrink(holders[name], axes)
    for module in {module: None for name in kept for module, _ in holders[name]}:
        fit(module)
    for each in cuts:
        for module, key, value in numbers(model, each, sizes):
            setattr(module, key, value)


def _get(module: nn.Module, key: str) -> Tensor:
    tensor = module._parameters.get(key)
    return module._buffers[key] if tensor is None else tensor  # type: ignore[return-value]


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, by the first name of each tensor, the modules that hold it, with the keys under which they do."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    held = found.setdefault(id(tensor), [])
                    held.append((module, key))
                    names[f"{path}.{key}" if path else key] = held
    return names


def _shrink(held: list[tuple[nn.Module, str]], axes: Mapping[int, Tensor]) -> None:
    """Keep only some places along axes of a tensor, in all modules that hold it."""
    module, key = held[0]
    old = _get(module, key)
    new = old.detach()
    for axis, kept in axes.items():
        new = new.index_select(axis, kept.to(new.device))
    last = torch.channels_last if old.dim() == 4 else torch.channels_last_3d
    if old.dim() in (4, 5) and not old.is_contiguous() and old.is_contiguous(memory_format=last):
        new = new.contiguous(memory_format=last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for owner, name in held:
        zeros = owner._buffers.get(f"{name}_zeros")  # of keep_zeros
        if zeros is not None and zeros.shape == old.shape:
            for axis, kept in axes.items():
                zeros = zeros.index_select(axis, kept.to(zeros.device))
            owner._buffers[f"{name}_zeros"] = zeros
        setattr(owner, name, new)


def can_fold(model_holders: Mapping[str, list[tuple[nn.Module, str]]], group: Group, reading: Reading) -> str | None:
    """Return why a constant that a product reads cannot go into a bias, or None if it can."""
    if reading.reader is None:
        return "what reads it is not a layer"
    held = model_holders[reading.reader]
    module, key = held[0]
    if len(held) > 1 or not reading.whole or key != "weight" or not isinstance(module, nn.Linear | _ConvNd):
        return f"{reading.reader} has no bias that could take it in"
    bias = module.bias
    own = reading.reader.removesuffix("weight") + "bias"
    if (bias is None) != (reading.bias is None) or (bias is not None and reading.bias != own):
        return f"{reading.reader} is used without its own bias"
    if bias is not None and len(model_holders[own]) > 1:
        return f"{own} is shared with another module"
    if reading.padded:
        return f"{reading.reader} pads with zeros"
    if any(member.name == reading.reader and member.reads and member.axis != 1 for member in group.members):
        return f"{reading.reader} is used transposed"
    return None


def holders_of(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, by each name of each tensor, the modules that hold it, with the keys under which they do."""
    return _holders(model)


def _fold(holders: Mapping[str, list[tuple[nn.Module, str]]], reading: Reading, each: Cut) -> bool:
    """Add to the bias of a reader what the constant channels that go add to its outputs; return whether it is new."""
    chosen = each.gone & each.constant
    value = reading.value.nan_to_num(0.0) * ~reading.silent
    if reading.reader is None or not bool((value[chosen] != 0).any()):
        return False
    module, _ = holders[reading.reader][0]
    weight = _get(module, "weight")
    matrix = weight.detach().double().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().double()
    columns, amounts = reading.columns[chosen].flatten(), value[chosen].flatten()
    more = matrix[:, columns.to(matrix.device)] @ amounts.to(matrix.device)
    old = module._parameters.get("bias")
    if old is None:
        module.bias = nn.Parameter(more.to(weight.dtype), requires_grad=weight.requires_grad)
        return True
    with torch.no_grad():
        old.copy_((old.double() + more).to(old.dtype))
    return False


def fit(module: nn.Module) -> None:
    """Set the numbers of a layer that repeat the shapes of its tensors."""
    shape: Any = getattr(getattr(module, "weight", None), "shape", ())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, _ConvNd):
        each = module.out_channels // module.groups  # outputs for each group
        if module.groups == module.in_channels > 1 and not module.transposed:  # depthwise, by the numbers of before
            module.groups = shape[0] // each
        ways = (shape[0], shape[1] * module.groups)
        module.in_channels, module.out_channels = ways if module.transposed else (ways[1], ways[0])
    elif isinstance(module, _NormBase):
        tensor = next((t for t in (module.weight, module.running_mean) if isinstance(t, Tensor)), None)
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif hasattr(module, "nf") and len(shape) == 2:  # Conv1D of transformers
        module.nf = shape[1]
        if hasattr(module, "nx"):
            module.nx = shape[0]


@contextmanager
def fitting_inputs(model: nn.Module) -> Iterator[None]:
    """Let layers that have no tensors but warn of widths, as InstanceNorm does, take over those of their inputs."""
    widths: dict[Any, int] = {}

    def take(module: Any, inputs: tuple[Any, ...]) -> None:
        widths[module] = module.num_features = inputs[0].shape[inputs[0].dim() - module._get_no_batch_dim()]

    norms = [each for each in model.modules() if isinstance(each, _InstanceNorm) and not each.affine]
    hooks = [each.register_forward_pre_hook(take) for each in norms if not each.track_running_stats]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, width in widths.items():
            module.num_features = width


def numbers(model: nn.Module, each: Cut, sizes: Mapping[str, torch.Size]) -> Iterable[tuple[nn.Module, str, int]]:
    """Yield modules around a group with the numbers, by name, that count its channels or heads, and their new values.

    Args:
        model: the model.
        each: the group, and what goes.
        sizes: shapes of the tensors before.
    """
    group, left = each.group, int((~each.gone).sum())
    widths = {}
    for member in group.members:
        size = sizes[member.name][member.axis]
        widths[size] = size - int(each.gone.sum()) * member.indices.shape[1]
    for path in _around(group.members):
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear | _ConvNd | _NormBase | nn.Embedding):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                continue
            counts = "head" in key.lower() and not any(word in key.lower() for word in HEAD_WIDTHS)
            if group.heads and ((counts and value % group.size == 0) or (each.widest and value == group.size)):
                yield module, key, value // group.size * left
            elif value in widths and (each.widest or (group.heads and key in WIDTHS)):
                yield module, key, widths[value]


def _around(members: Iterable[Member]) -> list[str]:
    """Return the paths of the modules that hold the members and lie on the way to what they have in common."""
    parents = [member.name.split(".")[:-1] for member in members]
    common = 0
    while all(len(p) > common for p in parents) and len({tuple(p[: common + 1]) for p in parents}) == 1:
        common += 1
    paths = {".".join(p[:length]): None for p in parents for length in range(common, len(p) + 1)}
    return list(paths)
