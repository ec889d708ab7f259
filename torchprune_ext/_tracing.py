"""Watches one forward pass, operation by operation, and writes down which entries are one channel.

Every operation that PyTorch runs passes by here, with real tensors. It either computes entry by entry, or moves entries
about, or sums over an axis, and is treated as such; of what is not known, all channels that go in must stay. So what is
missing here costs a chance and never a wrong answer.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from torchprune_ext._facts import (
    Book,
    Facts,
    Read,
    any_along,
    constants,
    fitted,
    normal,
    squeezed,
    still,
    varying,
)

SAME = {"clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "native_dropout"}
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
MOVES = {
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "roll", "repeat", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold", "diagonal", "constant_pad_nd"),
    *("split", "split_with_sizes", "unbind", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"),
    *("slice", "select"),
}
CUTS = {"slice", "select"}
POINTWISE = {"hardswish", "hardtanh", "hardsigmoid", "masked_fill", "_prelu_kernel", "prelu", "nan_to_num"}
NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training"}
LOOK = {"_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "flip"}  # along one axis, which stays
REDUCE = {"sum", "mean", "amax", "amin", "max", "min", "std", "var", "var_mean", "prod", "any", "all", "argmax"}
REDUCE |= {"linalg_vector_norm", "norm", "argmin", "logsumexp", "median"}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


class Trace(TorchDispatchMode):
    """Follows channels while it is open.

    Args:
        named: all parameters and buffers of the model, by name.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
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
            self.facts[tensor] = Facts(fields, _flag(False, tensor), name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then write down what follows from it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [tensor for tensor in tensors_in([args, kwargs]) if tensor.numel()]
        before = {id(tensor): self.known(tensor) for tensor in given}
        out = func(*args, **kwargs)
        rule = self._rule(func, name.rstrip("_"))
        results = list(tensors_in(out))
        if func._schema.is_mutable and not (name.endswith("_") and rule in (self._pointwise, self._same)):
            rule = self._unknown
        if any(t.layout != torch.strided or t.is_nested for t in [*given, *results]):
            rule = self._unknown
        if all(not t.numel() for t in results):
            return out
        rule(func, name, args, kwargs, out, before)
        if func._schema.is_mutable:
            self._written(given, results, before)
        return out

    def known(self, tensor: Tensor) -> Facts:
        """Return what is known of ``tensor``; of a stranger, as the model's inputs are, that it has no channels."""
        facts = self.facts.get(tensor)
        return Facts([], _flag(True, tensor)) if facts is None else facts

    def know(self, tensor: Tensor, fields: list[Tensor], moves: Tensor, source: str | None = None) -> None:
        """Write down what is known of ``tensor``; of fields that overlap, the first counts and others must stay."""
        kept: list[Tensor] = []
        for labels in fields:
            axes = varying(labels)
            if not axes:
                continue
            if any(axes & varying(other) for other in kept):
                self.book.fix(labels, "its places are mixed with those of other channels")
            else:
                kept.append(labels)
        self.facts[tensor] = Facts(kept, moves, source)

    def _rule(self, func: Any, name: str) -> Callable[..., None]:
        if name in SAME:
            return self._same
        if name in MOVES or name in VIEWS:
            return self._moves
        if name in NORMS:
            return self._batch_norm
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            return self._pointwise
        if name in REDUCE:
            return self._reduce
        if name in LOOK:
            return self._along_one
        if "pool" in name or "upsample" in name or (name.endswith(("pad1d", "pad2d", "pad3d"))):
            return self._spatial
        others = {
            "convolution": self._convolution,
            "mm": self._product,
            "bmm": self._product,
            "mv": self._product,
            "addmm": self._product,
            "baddbmm": self._product,
            "cat": self._cat,
            "stack": self._stack,
            "embedding": self._embedding,
            "native_layer_norm": self._layer_norm,
            "_fused_rms_norm": self._layer_norm,
            "glu": self._glu,
        }
        return others.get(name, self._unknown)

    # ------------------------------------------------------------------------------------- what keeps entries apart

    def _unknown(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        """Fix all that goes in."""
        for facts in before.values():
            for labels in facts.fields:
                self.book.fix(labels, f"it goes through {name}, in which channels are not told apart")
        scalar = not before and all(tensor.dim() == 0 for tensor in tensors_in(out))
        moving = any(bool(facts.moves.any()) for facts in before.values()) or not (before or scalar)
        for tensor in tensors_in(out):
            self.know(tensor, [], _flag(moving or torch.Tag.nondeterministic_seeded in func.tags, tensor))

    def _same(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        if not before:
            return self._unknown(func, name, args, kwargs, out, before)
        facts = before[id(args[0])]
        if self.facts.get(args[0]) is None and name == "lift_fresh" and args[0].dim() == 0:
            facts = Facts([], _flag(False, args[0]))  # a number in the model's code
        for tensor in tensors_in(out):
            self.know(tensor, facts.fields, facts.moves, facts.source)

    def _moves(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        facts, rest = before[id(args[0])], args[1:]

        def move(each: Tensor) -> Any:
            if name in VIEWS:
                return each.reshape(out.shape)
            if name == "constant_pad_nd":
                return func(each, args[1], 0)
            return func(each, *rest, **kwargs)

        moves = facts.moves
        if name in CUTS and facts.source is not None:  # which part of a parameter is read may depend on the input
            axis = args[1] if len(args) > 1 else 0
            moves = ~normal((args[0] == args[0].narrow(axis, 0, 1)).all(axis, keepdim=True).expand(args[0].shape))
        fields = [move(labels) for labels in facts.fields]
        moved_ones = move(moves)
        for place, tensor in enumerate(tensors_in(out)):
            results = [normal(f if isinstance(out, Tensor) else f[place]) for f in fields]
            for labels, old in zip(results, facts.fields, strict=True):
                if len(varying(labels)) > max(1, len(varying(old))):
                    self.book.grids.append(squeezed(labels))
            self.know(
                tensor, results, normal(moved_ones if isinstance(out, Tensor) else moved_ones[place]), facts.source
            )

    def _pointwise(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        results = list(tensors_in(out))
        operands = [(tensor, before[id(tensor)]) for tensor in tensors_in([args, kwargs]) if id(tensor) in before]
        shape = results[0].shape
        fields = self.combined([(tensor, facts.fields) for tensor, facts in operands], shape)
        moves = _flag(torch.Tag.nondeterministic_seeded in func.tags, results[0])
        for _, facts in operands:
            moves = _either(moves, fitted(facts.moves, shape))
        if name in ("mul", "mul_"):  # by a constant 0
            for tensor, facts in operands:
                if tensor is not out and not bool(facts.moves.all()):
                    moves = _both(moves, fitted(~squeezed((tensor == 0) & ~facts.moves), shape))
        for tensor in results:
            self.know(tensor, fields, moves)

    def combined(self, operands: list[tuple[Tensor, list[Tensor]]], shape: torch.Size) -> list[Tensor]:
        """Return the fields of what is computed entry by entry from tensors and their fields."""
        kept: list[Tensor] = []
        for _, fields in operands:
            for labels in [fitted(each, shape) for each in fields]:
                for place, other in enumerate(kept):
                    if varying(labels) & varying(other):
                        kept[place] = self.met(other, labels)
                        break
                else:
                    kept.append(labels)
        for tensor, fields in operands:
            real = {axis + len(shape) - tensor.dim() for axis in range(tensor.dim()) if tensor.size(axis) > 1}
            own: set[int] = set().union(*(varying(fitted(each, shape)) for each in fields))
            for labels in kept:
                if varying(labels) & (real - own):
                    self.book.fix(labels, "it meets a tensor of fixed width that the model makes or is given")
        return kept

    def met(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the field of entries that two fields, which overlap, give labels."""
        if varying(one) < varying(other):
            one, other = other, one
        common = varying(one) & varying(other)
        if varying(one) == varying(other) or slow(one) in varying(other):
            rest = varying(one) - common
            self.book.unify(self.book.joined(one, rest) if rest else one, other)
            if not varying(other) <= varying(one):
                self.book.fix(other, "it meets another tensor crosswise")
        else:  # as the one rotation of all heads: heads go as a whole, and what they share stays
            self.book.fix(other, "it is shared by several heads")
            if not varying(other) <= varying(one):
                self.book.fix(one, "it meets another tensor crosswise")
            self.book.joined(one, common)
        return one

    # ---------------------------------------------------------------------------------- what looks along some axes

    def _looked(self, labels: Tensor, axes: set[int], why: str) -> Tensor:
        """Return the field after an operation that looks at all entries along ``axes`` at once."""
        if varying(labels) & axes:
            if varying(labels) <= axes:
                self.book.fix(labels, why)
            return self.book.joined(labels, axes)
        return labels

    def _reduce(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, named = args[0], {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        facts = before[id(x)]
        given = named.get("dim")
        if given is None or isinstance(given, str) or (isinstance(given, (list, tuple)) and not given):
            axes = set(range(x.dim()))
        else:
            axes = {axis % x.dim() for axis in ([given] if isinstance(given, int) else given)} if x.dim() else set()
        fields = [self._looked(each, axes, f"{name} is taken over all channels") for each in facts.fields]
        moves = any_along(facts.moves, axes)

        def less(each: Tensor) -> Tensor:
            for axis in sorted(axes, reverse=True):
                each = each.narrow(axis, 0, 1) if named.get("keepdim") else each.select(axis, 0)
            return each

        for tensor in tensors_in(out):
            self.know(tensor, [less(each) for each in fields], less(moves))

    def _along_one(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        facts, axes = before[id(args[0])], {named.get("dim", -1) % max(1, args[0].dim())}
        fields = [self._looked(each, axes, f"{name.lstrip('_')} is taken over all channels") for each in facts.fields]
        for tensor in tensors_in(out):
            self.know(tensor, fields, any_along(facts.moves, axes))

    def _spatial(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, facts = args[0], before[id(args[0])]
        inner = next((int(d) for d in "123" if f"{d}d" in name), 0)
        if not inner or len(before) > 1:
            return self._unknown(func, name, args, kwargs, out, before)
        axes = set(range(x.dim() - inner, x.dim()))
        fields = [self._looked(each, axes, f"{name} is taken over all channels") for each in facts.fields]
        for tensor in tensors_in(out):
            shape = tensor.shape
            self.know(
                tensor,
                [_resized(each, axes, shape) for each in fields],
                _resized(any_along(facts.moves, axes), axes, shape),
            )

    def _layer_norm(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, shape = args[0], args[1]
        axes = set(range(x.dim() - len(shape), x.dim()))
        what = "LayerNorm" if name == "native_layer_norm" else "RMSNorm"
        fields = [self._looked(each, axes, f"{what} is taken over all channels") for each in before[id(x)].fields]
        rest = [(tensor, before[id(tensor)].fields) for tensor in args[2:4] if isinstance(tensor, Tensor)]
        fields = self.combined([(x, fields), *rest], x.shape)
        first, *others = tensors_in(out)
        self.know(first, fields, _flag(True, first))
        for tensor in others:
            self.know(tensor, [], _flag(True, tensor))

    def _batch_norm(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, weight = args[0], args[1]
        shape, fields, moves = x.shape, [(x, before[id(x)].fields)], before[id(x)].moves

        def spread(each: Tensor) -> Tensor:
            return each.view(-1, *[1] * (len(shape) - 2))

        for tensor in args[1:5]:
            if isinstance(tensor, Tensor):
                facts = before[id(tensor)]
                fields.append((spread(tensor), [spread(f).expand(-1, *shape[2:]) for f in facts.fields]))
        if isinstance(weight, Tensor) and not bool(before[id(weight)].moves.any()):
            moves = _both(moves, fitted(spread(weight != 0), shape))
        first, *others = tensors_in(out)
        self.know(first, self.combined(fields, shape), moves)
        for tensor in others:
            self.know(tensor, [], _flag(True, tensor))

    # ------------------------------------------------------------------------------------------- what joins tensors

    def _cat(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        parts = [tensor for tensor in args[0] if tensor.numel()]
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        facts, labels = [before[id(part)] for part in parts], []
        for part, known in zip(parts, facts, strict=True):
            own = sorted(known.fields, key=lambda each: axis not in varying(each))
            labels.append(own[0] if own else torch.zeros((), dtype=torch.int64, device=part.device).expand(part.shape))
            for each in own[1:]:
                self.book.fix(each, "it is concatenated with other axes")
        if any(axis in varying(each) for each in labels):
            together = normal(_concatenated(labels, axis))
            if len(varying(together)) > max(1, *(len(varying(each)) for each in labels)):
                self.book.grids.append(squeezed(together))
        else:  # one behind the other along an axis without channels: all have the same ones
            first = labels[0].narrow(axis, 0, 1)
            for each in labels[1:]:
                self.book.unify(first, each.narrow(axis, 0, 1))
            together = first.expand(out.shape)
        self.know(out, [together], normal(_concatenated([known.moves for known in facts], axis)))

    def _stack(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        facts = [before[id(part)] for part in args[0]]
        fields = self.combined(
            [(part, fact.fields) for part, fact in zip(args[0], facts, strict=True)], args[0][0].shape
        )
        moves = torch.stack([fact.moves for fact in facts], axis)
        self.know(out, [each.unsqueeze(axis).expand(out.shape) for each in fields], normal(moves))

    def _glu(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, facts = args[0], before[id(args[0])]
        axis = (args[1] if len(args) > 1 else -1) % x.dim()
        halves = [each.chunk(2, axis) for each in facts.fields]
        fields = [(out, [normal(half[place]) for half in halves]) for place in (0, 1)]
        left, right = facts.moves.chunk(2, axis)
        self.know(out, self.combined(fields, out.shape), _either(left, right))

    def _embedding(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        weight, facts = args[0], before[id(args[0])]
        fields = []
        for labels in facts.fields:
            if 0 in varying(labels):
                self.book.fix(labels, "rows of an embedding are chosen by the input")
            else:
                fields.append(labels[0].expand(out.shape))
        alike = (weight == weight[:1]).all(0) & ~squeezed(facts.moves).any(0)
        self.know(out, fields, (~alike).expand(out.shape))

    def _product(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        added, (a, b) = (args[0], args[1:3]) if name.startswith(("addmm", "badd")) else (None, args[:2])
        fa, fb = before[id(a)], before[id(b)]
        shape = out.shape

        def three(each: Tensor, *, last: bool) -> Tensor:
            each = each.unsqueeze(-1) if last and each.dim() == 1 else each
            return each.unsqueeze(0) if each.dim() == 2 else each

        left = Facts([three(f, last=False) for f in fa.fields], three(fa.moves, last=False), fa.source)
        right = Facts([three(f, last=True) for f in fb.fields], three(fb.moves, last=True), fb.source)
        bias = None if added is None else before[id(added)].source
        fields, moves = self.contracted(three(a, last=False), left, three(b, last=True), right, bias)
        fields, moves = [each.reshape(shape) for each in fields], moves.reshape(shape)
        if added is not None:
            own = before[id(added)]
            fields = self.combined([(out, fields), (added, own.fields)], shape)
            moves = _either(moves, fitted(own.moves, shape))
        self.know(out, [normal(each) for each in fields], normal(moves))

    def contracted(self, a: Tensor, fa: Facts, b: Tensor, fb: Facts, bias: str | None) -> tuple[list[Tensor], Tensor]:
        """Return fields and moves of ``a @ b``, ``(b, m, k) @ (b, k, n)``, and write down which channels are summed."""
        size = torch.Size([len(a), a.shape[1], b.shape[2]])
        kept_a, summed_a = _parted(fa.fields, 2)
        kept_b, summed_b = _parted(fb.fields, 1)
        plain_a, plain_b = ([f for f in each if len(varying(f)) == 1] for each in (summed_a, summed_b))
        if plain_a and plain_b:
            read_a, read_b = plain_a[0][0, 0], plain_b[0][0, :, 0]
            self.book.unify(read_a, read_b)
            reader = fb.source if fa.source is None else fa.source if fb.source is None else None
            labels, x, moves, axis = (read_b, a, fa.moves, 2) if fb.source else (read_a, b, fb.moves, 1)
            silent = (_zero(a, fa.moves, 1) | _zero(b, fb.moves, 2)).all(0)
            value = constants(x, moves, axis) if reader else torch.full(labels.shape, math.nan)
            self.book.reads.append(Read(labels, silent, value, reader, bias, False))
        else:
            for each in (*plain_a, *plain_b):
                self.book.fix(each, "it is multiplied with what has no channels, as the model's input, or whole heads")
        # labels that differ along another axis too, as heads do, go as a whole, and stay in the result
        heads_a = [each for each in summed_a if len(varying(each)) > 1]
        heads_b = [each for each in summed_b if len(varying(each)) > 1]
        if len(heads_a) == len(heads_b) == 1 and varying(heads_a[0]) == {0, 2} and varying(heads_b[0]) == {0, 1}:
            self.book.unify(heads_a[0][:, 0], heads_b[0][:, :, 0])
        kept_a += [self.book.joined(each, [2]) for each in heads_a]
        kept_b += [self.book.joined(each, [1]) for each in heads_b]
        operands = []
        for tensor, fields, axis in ((a, kept_a, 2), (b, kept_b, 1)):
            small = tensor.narrow(axis, 0, 1)
            small = small.narrow(0, 0, 1) if still(tensor, 0) else small
            operands.append((small, [each.narrow(axis, 0, 1).expand(size) for each in fields]))
        return self.combined(operands, size), _moving(a, fa, b, fb)

    def _convolution(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: dict[int, Facts]) -> None:
        x, weight, bias, _, padding, _, transposed, _, groups = args
        fx, fw = before[id(x)], before[id(weight)]
        if transposed:
            if groups > 1:
                return self._unknown(func, name, args, kwargs, out, before)
            weight = weight.transpose(0, 1)
            fw = Facts([each.transpose(0, 1) for each in fw.fields], fw.moves.transpose(0, 1), fw.source)
        labels = [self.book.joined(each, varying(each) - {1}) for each in fx.fields]
        channels = labels[0].select(0, 0).flatten(1)[:, 0] if labels and 1 in varying(labels[0]) else None
        rows = next((each.flatten(1)[:, 0] for each in fw.fields if varying(each) == {0}), None)
        columns = next((each[0].flatten(1)[:, 0] for each in fw.fields if varying(each) == {1}), None)
        for each in [
            *labels[channels is not None :],
            *(f for f in fw.fields if not varying(f) <= {0} and not varying(f) <= {1}),
        ]:
            self.book.fix(each, "it is a place of a convolution")
        zero_x = _zero(x.transpose(0, 1).flatten(1), fx.moves.transpose(0, 1).flatten(1), 1)
        grouped = weight.unflatten(0, (groups, -1))  # (groups, outputs, inputs, ...)
        zero_w = _zero(grouped.flatten(3), normal(fw.moves.unflatten(0, (groups, -1)).flatten(3)), 3).all(1).flatten()
        if weight.shape[1] == 1 and groups > 1:
            self._depthwise(channels, rows, len(weight) // groups)
        elif channels is not None and columns is not None:
            self.book.unify(channels.view(groups, -1), columns.expand(groups, -1))
            value = (
                constants(x, fx.moves, 1) if groups == 1 and not transposed else torch.full((len(zero_w),), math.nan)
            )
            padded = any(bool(pad) for pad in padding)
            own_bias = before[id(bias)].source if isinstance(bias, Tensor) else None
            self.book.reads.append(Read(columns.repeat(groups), zero_x | zero_w, value, fw.source, own_bias, padded))
        else:
            for lone in (channels, columns):
                if lone is not None:
                    self.book.fix(lone, "it is convolved with what has no channels, as the model's input")
        if rows is not None and groups > 1 and weight.shape[1] > 1:
            self.book.grids.append(rows.view(groups, -1))
        alive = any_places(grouped != 0) & _moving_channels(fx.moves).view(groups, 1, -1)
        shape = (1, -1, *[1] * (out.dim() - 2))
        fields = [] if rows is None else [rows.view(shape).expand(out.shape)]
        moves = (alive.any(2).view(shape) | bool(fw.moves.any())).expand(out.shape)
        if isinstance(bias, Tensor):
            own = before[id(bias)]
            spread = [(bias.view(shape), [each.view(shape) for each in own.fields])]
            fields = self.combined([(out, fields), *spread], out.shape)
            moves = _either(moves, own.moves.view(shape).expand(out.shape)) if bool(own.moves.any()) else moves
        self.know(out, fields, normal(moves))

    def _depthwise(self, channels: Tensor | None, rows: Tensor | None, each: int) -> None:
        """Make a channel of each input and the outputs that a depthwise convolution computes from it."""
        if channels is not None and rows is not None:
            self.book.unify(channels.view(-1, 1).expand(-1, each), rows.view(-1, each))
        else:
            for labels in (channels, rows):
                if labels is not None:
                    self.book.fix(labels, "it is convolved with what has no channels, as the model's input")

    def _written(self, given: list[Tensor], results: list[Tensor], before: dict[int, Facts]) -> None:
        """Deal with an operation that writes into a tensor whose memory others share."""
        for tensor in results:
            place = tensor.untyped_storage().data_ptr()
            for other in list(self.facts.keys()):
                if other is not tensor and other.untyped_storage().data_ptr() == place and place:
                    known = self.facts[other]
                    known.moves = _flag(True, other)
                    for labels in (*known.fields, *(f for t in given for f in before[id(t)].fields)):
                        self.book.fix(labels, "it is written into a part of a tensor")


def _parted(fields: list[Tensor], axis: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the fields that do not vary along ``axis``, and those that do."""
    return [f for f in fields if axis not in varying(f)], [f for f in fields if axis in varying(f)]


def _flag(value: bool, tensor: Tensor) -> Tensor:
    return torch.tensor(value, device=tensor.device).expand(tensor.shape)


def _either(one: Tensor, other: Tensor) -> Tensor:
    return (squeezed(one) | squeezed(other)).expand(one.shape)


def _both(one: Tensor, other: Tensor) -> Tensor:
    return (squeezed(one) & squeezed(other)).expand(one.shape)


def slow(labels: Tensor) -> int:
    """Return the axis along which labels differ most, which counts heads or groups."""

    def spread(axis: int) -> int:
        line = labels.movedim(axis, 0).flatten(1)[:, 0]
        return int(line.amax() - line.amin())

    return max(varying(labels), key=spread)


def _resized(facts: Tensor, axes: set[int], shape: torch.Size) -> Tensor:
    """Return facts that are the same along ``axes`` for a tensor of another size there."""
    for axis in axes:
        facts = facts.narrow(axis, 0, 1)
    return facts.expand(shape)


def _concatenated(parts: list[Tensor], axis: int) -> Tensor:
    """Return facts one behind the other."""
    whole = [*parts[0].shape]
    whole[axis] = sum(part.size(axis) for part in parts)
    for other in range(len(whole)):
        if other != axis and all(still(part, other) for part in parts):
            parts = [part.narrow(other, 0, 1) for part in parts]
    return torch.cat(parts, axis).expand(whole)


def _zero(values: Tensor, moves: Tensor, axis: int) -> Tensor:
    """Return where all entries along ``axis`` are 0 whatever comes in."""
    small = squeezed(moves)
    if small.numel() == 1 and bool(small):
        return torch.zeros_like(values.select(axis, 0), dtype=torch.bool)
    return ((values == 0) & ~small).all(axis)


def any_places(alive: Tensor) -> Tensor:
    """Return ``(groups, outputs, inputs)`` of ``(groups, outputs, inputs, *kernel)``: whether any place holds."""
    return alive.flatten(3).any(3)


def _moving_channels(moves: Tensor) -> Tensor:
    """Return which channels, on axis 1, move anywhere."""
    small = squeezed(moves).transpose(0, 1).flatten(1).any(1)
    return small.expand(moves.shape[1])


def _moving(a: Tensor, fa: Facts, b: Tensor, fb: Facts) -> Tensor:
    """Return which entries of ``a @ b`` may change."""
    shape = (len(a), a.shape[1], b.shape[2])
    moves_a, moves_b = bool(fa.moves.any()), bool(fb.moves.any())
    if not moves_a and not moves_b:
        return torch.zeros((), dtype=torch.bool, device=a.device).expand(shape)
    if not moves_b:  # b is a weight: the outputs whose moving inputs it multiplies by something
        moving = squeezed(fa.moves).any(1, keepdim=True).expand(len(a), 1, a.shape[2]).float()
        weight = b[:1] if still(b, 0) else b
        moving = moving[:1] if still(moving, 0) or bool((moving == moving[:1]).all()) else moving
        return ((moving @ (weight != 0).float()) > 0).expand(shape)
    dead = _zero(a, fa.moves, 2).unsqueeze(2) | _zero(b, fb.moves, 1).unsqueeze(1)
    return ~dead.expand(shape)
