"""Which entries of which tensors of a model are one channel: the groups of channels that can only go together.

A channel is given by rows of one or several tensors (a filter, its bias, its BatchNorm entries; in a residual stream,
a filter of each block) and read by columns of others. :func:`graph_of` finds out by watching one forward pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchprune_ext._batches import call
from torchprune_ext._checks import check_module
from torchprune_ext._runs import left_as_it_was, refuse_lazy
from torchprune_ext._tracing import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """What a group of channels is in one axis of one parameter or buffer.

    Args:
        module: the module that holds the tensor, and under which name.
        param: name of the tensor in the module.
        name: name of the tensor in the model; of a tied one, the first.
        axis: the axis that counts channels.
        reads: whether the tensor reads the channels (columns of a consumer); else it gives them (rows, bias,
            BatchNorm).
        indices: int64 of shape ``(size, each)``, which places of the axis are channel i: several where the map of a
            channel was flattened, or where a channel is a head.
    """

    module: nn.Module
    param: str
    name: str
    axis: int
    reads: bool
    indices: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A product that sums over the channels of a group.

    Args:
        reader: name of the weight that the channels are multiplied with; None if it is not one.
        whole: whether it is all of that weight.
        bias: name of the bias that the same operation adds, or None.
        columns: int64 of shape ``(size, each)``, the reader's columns.
        silent: bool of the same shape, whether the place adds nothing, whatever the input.
        still: bool of the same shape, whether what is read there is the same whatever the input.
        value: float64 of the same shape, if so, its one value at all places, or NaN.
        padded: whether the reader also sums over zeros around its input.
    """

    reader: str | None
    whole: bool
    bias: str | None
    columns: Tensor
    silent: Tensor
    still: Tensor
    value: Tensor
    padded: bool


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Channels of the same kind: the same axes of the same tensors, each channel with its own entries of them.

    Args:
        size: number of channels.
        members: what they are in each tensor.
        readings: the products that sum over them.
        fixed: why they must stay, or None.
        heads: whether a channel is a head of attention; with grouped queries, a key with all its queries.
    """

    size: int
    members: tuple[Member, ...]
    readings: tuple[Reading, ...]
    fixed: str | None
    heads: bool

    @property
    def names(self) -> list[str]:
        """The tensors with a matrix or kernel that give the channels; of others, where there is none."""
        given = [each for each in self.members if not each.reads]
        large = [each.name for each in given if getattr(each.module, each.param).dim() > 1]
        return large or [each.name for each in given or self.members]


def outputs_in(tree: Any, where: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output and how to get at them: from tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from outputs_in(value, f"{where}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for place, value in enumerate(tree):
            yield from outputs_in(value, f"{where}[{place}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for each in fields(tree):
            yield from outputs_in(getattr(tree, each.name), f"{where}.{each.name}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let the model run in eval mode, without gradients and fused attention, and leave all as it was."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of a whole layer at once
        stack.enter_context(left_as_it_was(model))
        model.eval()
        yield


def graph_of(model: nn.Module, example_inputs: Any, *, in_order: bool = False) -> tuple[Group, ...]:
    """Find the channels of ``model`` by one forward pass in eval mode, and leave it as it was.

    Args:
        model: any module. Pruned tensors count with their effective weights.
        example_inputs: one batch: a tensor, a tuple of positional or a mapping of keyword arguments.
        in_order: find channels that can change places, instead of channels that can go. Each group is of channels that
            can do so with each other: LayerNorm needs all of them, in whatever order; of a head, all can change places
            within it; and what slices tell apart is in groups of its own.

    Returns:
        The groups, in the order of the model's parameters.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer has no shape yet, a module is scripted or quantized, or the output holds no tensor.
    """
    check_module("model", model)
    refuse_lazy(model)
    _refuse_unseen(model)
    with evaluating(model):
        named: dict[str, Tensor] = dict(model.named_parameters())
        named |= {name: buffer for name, buffer in model.named_buffers() if buffer.dim()}
        trace = Trace(named)
        _fix_modules(model, trace)
        with sdpa_kernel(SDPBackend.MATH), trace:
            out = call(model, example_inputs)
        found = list(outputs_in(out))
        if not found:
            raise ValueError(
                f"model of type {type(model).__name__} returned a {type(out).__name__}, which holds no tensor. Let it "
                "return tensors, in tuples, dictionaries or dataclasses."
            )
        for where, tensor in found:
            for labels in trace.known(tensor).fields:
                trace.book.fix(labels, f"the model returns it, in {where}")
        owners = {
            f"{path}.{key}" if path else key: (module, key)
            for path, module in model.named_modules()
            for key in (*module._parameters, *module._buffers)
        }
        return tuple(_groups(trace, owners, in_order))


def _refuse_unseen(model: nn.Module) -> None:
    """Raise ``ValueError`` if a module computes with what is not a plain tensor of its own."""
    for path, module in model.named_modules():
        what = None
        if isinstance(module, torch.jit.ScriptModule):
            what = "scripted"
        elif ".quantized" in type(module).__module__ or hasattr(module, "_packed_params"):
            what = "quantized"
        for tensor in () if what else (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_meta:
                what = "on the meta device"
            elif tensor is not None and (
                tensor.is_quantized or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor)
            ):
                what = f"made of tensors of type {type(tensor).__name__}, layout {tensor.layout}"
        if what is not None:
            raise ValueError(
                f"{path or 'model'} of type {type(module).__name__} is {what}, so its channels cannot be seen. Pass "
                "the model of plain modules and tensors that it was made from, and convert the result."
            )


def _fix_modules(model: nn.Module, trace: Trace) -> None:
    """Fix the channels of modules whose code depends on widths in its own way."""
    reasons: dict[str, str] = {}
    widths: set[str] = set()  # reasons that are about the number of channels only
    for path, module in model.named_modules():
        why = None
        if isinstance(module, nn.MultiheadAttention):
            why = "nn.MultiheadAttention computes the width of its heads from embed_dim, so none can go"
            widths.add(why)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            why = f"{type(module).__name__} is recurrent"
        elif is_parametrized(module):
            why = "its module is parametrized"
        if why is not None:
            below = (name for name, _ in [*module.named_parameters(), *module.named_buffers()])
            reasons |= {f"{path}.{name}" if path else name: why for name in below}
    for name, _, start, size in trace.axes:
        if name in reasons:
            labels = torch.arange(start, start + size, device="cpu")
            trace.book.fix(labels, reasons[name], symmetric=reasons[name] in widths)


def _components(count: int, pairs: Tensor) -> Tensor:
    """Return, for each label, the smallest label of its channel."""
    root = torch.arange(count, device="cpu")
    while bool((root[pairs[0]] != root[pairs[1]]).any()):
        ends = root[pairs]
        low = ends.amin(0)
        root = root.scatter_reduce(0, ends[0], low, "amin").scatter_reduce(0, ends[1], low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]
    return root


def _settled(trace: Trace, in_order: bool) -> Tensor:
    """Return, for each label, the smallest label of its channel, such that all grids can be cut in rows or columns."""
    book = trace.book
    binding = [each.cpu() for place, each in enumerate(book.pairs) if not (in_order and place in book.counted)]
    pairs = torch.cat([torch.zeros((2, 0), dtype=torch.int64, device="cpu"), *binding], 1)
    while True:
        root = _components(trace.count, pairs)
        more = []
        for grid in book.blocks if in_order else [*book.grids, *book.blocks]:
            labels = root[grid.cpu().squeeze()]
            axes = [axis for axis in range(labels.dim()) if bool((labels != labels.narrow(axis, 0, 1)).any())]
            if len(axes) == 2:  # neither rows nor columns are whole: channel j of each part goes together
                first = axes[0] if labels.dim() == 2 else min(axes)
                more.append(torch.stack([labels.reshape(-1), labels.narrow(first, 0, 1).expand_as(labels).reshape(-1)]))
            elif len(axes) > 2:
                book.fix(labels, "its places are mixed with those of other channels")
        if not more:
            return root
        pairs = torch.cat([pairs, *more], 1)


def _groups(trace: Trace, owners: Mapping[str, tuple[nn.Module, str]], in_order: bool) -> Iterator[Group]:
    """Yield the groups that a trace has found."""
    root, reads, fixed = _settled(trace, in_order), trace.book.reads, trace.book.fixed
    if in_order:
        fixed = [each for place, each in enumerate(fixed) if place not in trace.book.symmetric]
        fixed += [(pairs[1].unique(), "several channels belong to each") for pairs in trace.book.within]
    why = torch.zeros_like(root)  # by the smallest label: 0, or 1 + place among the reasons
    for place, (labels, _) in reversed(list(enumerate(fixed))):
        why[root[labels.cpu()]] = place + 1
    heads = torch.zeros_like(root, dtype=torch.bool)
    for labels in trace.book.heads:
        heads[root[labels.cpu()]] = True
    axis_of = torch.zeros_like(root)
    for place, (_, _, start, size) in enumerate(trace.axes):
        axis_of[start : start + size] = place
    # what tells the kinds of channels apart: how many entries they have in which axes and in which products
    made = torch.Generator("cpu").manual_seed(0)
    keys = torch.randint(1 << 62, (len(trace.axes) + len(reads) + 1,), generator=made, device="cpu")
    kind = torch.zeros_like(root).index_add(0, root[1:], keys[axis_of[1:]])
    read_labels = [each.labels.cpu() for each in reads]
    for place, labels in enumerate(read_labels):
        kind.index_add_(0, root[labels], keys[len(trace.axes) + place].expand(len(labels)))
    reasons = {text: place + 1 for place, text in enumerate(dict.fromkeys(text for _, text in fixed))}
    told = torch.tensor([0, *(reasons[text] for _, text in fixed)], device="cpu")
    kind = (kind * 1_000_003 + told[why]) * 2 + heads
    if in_order:
        kind = kind * 1_000_003 + _apart(trace, root)
    by_weights = [labels for labels, read in zip(read_labels, reads, strict=True) if read.reader is not None]
    reading_labels = set(torch.cat([root[:0], *by_weights]).tolist())
    kinds, kind_of = kind[root].unique(return_inverse=True)
    order = torch.argsort(kind_of * trace.count + root, stable=True)
    order = order[order > 0]
    bounds = torch.bincount(kind_of[1:], minlength=len(kinds)).tolist()
    by_kind = sorted((part for part in order.split(bounds) if len(part)), key=lambda part: int(part.min()))
    readings = _readings(trace, root, kind_of, read_labels)
    for part in by_kind:
        size = len(root[part].unique())
        members = []
        for place in axis_of[part].unique().tolist():
            name, axis, start, _ = trace.axes[place]
            labels = part[axis_of[part] == place].view(size, -1)
            module, key = owners[name]
            members.append(Member(module, key, name, axis, int(labels[0, 0]) in reading_labels, labels - start))
        text = fixed[int(why[root[part[0]]]) - 1][1] if int(why[root[part[0]]]) else None
        own = tuple(readings.get(int(kind_of[part[0]]), ()))
        text = "nothing reads it" if text is None and not own else text
        yield Group(size, tuple(members), own, text, bool(heads[root[part[0]]]))


def _apart(trace: Trace, root: Tensor) -> Tensor:
    """Return a number for each label: only channels of the same number can change places with each other."""
    made = torch.Generator("cpu").manual_seed(1)
    number = torch.zeros_like(root)
    for labels in trace.book.parts:
        number[root[labels.cpu()].unique()] += torch.randint(1 << 62, (1,), generator=made, device="cpu")
    for pairs in trace.book.within:
        own, owner = root[pairs.cpu()].unique(dim=1)
        number.index_add_(0, own, torch.randint(1 << 62, (trace.count,), generator=made, device="cpu")[owner])
    return number


def _readings(trace: Trace, root: Tensor, kind_of: Tensor, read_labels: list[Tensor]) -> dict[int, list[Reading]]:
    """Return the readings of each kind of channels."""
    found: dict[int, list[Reading]] = {}
    starts = torch.zeros_like(root)
    for _, _, start, size in trace.axes:
        starts[start : start + size] = start
    for read, labels in zip(trace.book.reads, read_labels, strict=True):
        for kind in kind_of[labels].unique().tolist():
            chosen = (kind_of[labels] == kind).nonzero().flatten()
            chosen = chosen[torch.argsort(root[labels[chosen]], stable=True)]
            own = labels[chosen]
            shape = (len(root[own].unique()), -1)
            found.setdefault(kind, []).append(
                Reading(
                    read.reader,
                    read.whole,
                    read.bias,
                    (own - starts[own]).view(shape),
                    read.silent.cpu()[chosen].view(shape),
                    read.still.cpu()[chosen].view(shape),
                    read.value.cpu().double()[chosen].view(shape),
                    read.padded,
                )
            )
    return found
