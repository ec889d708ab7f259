"""Watches one forward pass, operation by operation, and writes down which entries are one channel.

Every operation that PyTorch runs passes by here, with real tensors. It either computes entry by entry, or moves entries
about, or sums over an axis, and is treated as such; of what is not known, all channels that go in must stay. So what is
missing here costs a chance and never a wrong answer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from torchprune_ext import _products, _rules
from torchprune_ext._facts import Book, Facts, Operation, flag, tensors_in, varying

Rule = Callable[[Book, Operation], list[Facts]]
KINDS: dict[Rule, str] = {
    _rules.same: "clone _to_copy detach alias contiguous lift_fresh",
    _rules.move: "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand flip roll "
    "repeat pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal split "
    "split_with_sizes unbind unsafe_split unsafe_split_with_sizes unsafe_chunk slice select",
    _rules.batch_norm: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training",
    _rules.pointwise: "hardswish hardtanh hardsigmoid masked_fill _prelu_kernel prelu nan_to_num",
    _rules.reduce: "sum mean amax amin max min std var var_mean std_mean prod any all argmax argmin linalg_vector_norm "
    "norm logsumexp median",
    _rules.along_one: "_softmax _log_softmax _safe_softmax cumsum cumprod sort",
    _rules.layer_norm: "native_layer_norm _fused_rms_norm",
    _rules.pad: "constant_pad_nd",
    _rules.cat: "cat",
    _rules.stack: "stack",
    _rules.glu: "glu",
    _rules.embedding: "embedding",
    _rules.index: "index",
    _products.product: "mm bmm mv addmm baddbmm",
    _products.convolution: "convolution",
}
RULES = {name: rule for rule, names in KINDS.items() for name in names.split()}


def rule_of(func: Any, name: str) -> Rule:
    """Return what an operation is treated as."""
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in func.tags:
        return _rules.pointwise
    if "pool" in name or "upsample" in name or name.endswith(("pad1d", "pad2d", "pad3d")):
        return _rules.spatial
    return _rules.unknown


class Trace(TorchDispatchMode):
    """Follows channels while it is open.

    Args:
        named: all parameters and buffers of the model, by name.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.book, self.facts = Book(), WeakIdKeyDictionary()
        self.axes: list[tuple[str, int, int, int]] = []  # name, axis, its first label, its size
        self.count = 1
        for name, tensor in named.items():
            fields = []
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    self.axes.append((name, axis, self.count, size))
                    labels = torch.arange(self.count, self.count + size, device=tensor.device)
                    shape = [size if each == axis else 1 for each in range(tensor.dim())]
                    fields.append(labels.view(shape).expand(tensor.shape))
                    self.count += size
            self.facts[tensor] = Facts(fields, flag(False, tensor), name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then write down what follows from it."""
        name = func._schema.name.partition("::")[2]
        given = list(tensors_in([args, kwargs or {}]))
        before = {id(tensor): self.known(tensor) for tensor in given}
        out = func(*args, **(kwargs or {}))
        results = list(tensors_in(out))
        op = Operation(func, name.rstrip("_"), args, kwargs or {}, out, before)
        rule = rule_of(func, op.name)
        writes = func._schema.is_mutable
        if (
            (not given and rule is not _rules.unknown)
            or (writes and not (name.endswith("_") and rule is _rules.pointwise))
            or any(tensor.layout != torch.strided or tensor.is_nested for tensor in (*given, *results))
            or (rule is not _rules.cat and any(not tensor.numel() for tensor in (*given, *results[:1])))
        ):
            rule = _rules.unknown
        for tensor, facts in zip(results, rule(self.book, op), strict=True):
            self._know(tensor, facts)
        if writes:
            self._written(op)
        return out

    def known(self, tensor: Tensor) -> Facts:
        """Return what is known of ``tensor``; of a stranger, as the model's inputs are, that it has no channels."""
        facts: Facts | None = self.facts.get(tensor)
        return Facts([], flag(True, tensor)) if facts is None else facts

    def _know(self, tensor: Tensor, facts: Facts) -> None:
        """Write down what is known of ``tensor``; of fields that overlap, the first counts and others must stay."""
        kept: list[Tensor] = []
        for labels in facts.fields:
            axes = varying(labels)
            if axes and any(axes & varying(other) for other in kept):
                self.book.fix(labels, "its places are mixed with those of other channels")
            elif axes:
                kept.append(labels)
        self.facts[tensor] = Facts(kept, facts.moves, facts.source, facts.whole)

    def _written(self, op: Operation) -> None:
        """Deal with an operation that writes into tensors, of whose memory others may hold a part."""
        touched = {tensor.untyped_storage().data_ptr(): tensor for tensor in op.results if tensor.numel()}
        for other in list(self.facts.keys()):
            tensor = touched.get(other.untyped_storage().data_ptr()) if other.layout == torch.strided else None
            if tensor is not None and other is not tensor and other.numel():
                known = self.known(other)
                self.facts[other] = Facts(known.fields, flag(True, other))
                for labels in (*known.fields, *(each for facts in op.before.values() for each in facts.fields)):
                    self.book.fix(labels, "it is written into a part of a tensor")
