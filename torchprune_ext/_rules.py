"""What follows for channels from an operation that keeps entries apart, or looks along some axes at once.

A rule takes the book and an operation that has run, and returns facts for each of its results.
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchprune_ext._facts import (
    Book,
    Facts,
    Operation,
    Read,
    alike_along,
    any_along,
    both,
    concatenated,
    either,
    flag,
    normal,
    resized,
    squeezed,
    varying,
    zero,
)

VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
CUTS = {"slice", "select", "split", "split_with_sizes", "unbind", "unsafe_split", "unsafe_split_with_sizes"}
CUTS |= {"unsafe_chunk", "diagonal", "unfold"}
CALLED = {
    "native_group_norm": "GroupNorm",
    "_weight_norm_interface": "weight_norm",
    "copy": "a write into a tensor",
    "new_empty": "a write into a tensor",
    "_trilinear": "Bilinear",
} | dict.fromkeys(("mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn"), "a recurrent layer")
SUMS = {"sum", "linalg_vector_norm"}  # to which a zero adds nothing
FREE = {
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "median",
    "std",
    "var",
    "var_mean",
    "std_mean",
    "sort",
}  # of how many equal
SYMMETRIC = SUMS | {"mean", "amax", "amin", "std", "var", "var_mean", "std_mean", "prod", "any", "all", "norm"}
SYMMETRIC |= {"logsumexp", "_softmax", "_log_softmax", "_safe_softmax"}  # whatever the order of what is looked at
ZEROS = SUMS | {"norm", "prod", "any", "cumsum", "cumprod", "argmax", "argmin"}  # of how many zeros


def unknown(book: Book, op: Operation) -> list[Facts]:
    """Let all that goes into an operation stay, as nothing is known of it."""
    for facts in op.before.values():
        for labels in facts.fields:
            book.fix(labels, f"it goes through {CALLED.get(op.name, op.name)}, in which channels are not told apart")
    number = not op.before and all(tensor.dim() == 0 for tensor in op.results) and not _may_silence(op.results)
    moving = not number or torch.Tag.nondeterministic_seeded in op.func.tags
    return [Facts([], flag(moving, tensor)) for tensor in op.results]


def _may_silence(numbers: list[Tensor]) -> bool:
    """Return whether a number of the model's code is 0, which another size of the input may make 1."""
    return any(not bool(number) for number in numbers)


def same(book: Book, op: Operation) -> list[Facts]:
    """Copies, and other dtypes."""
    facts = op.of(op.args[0])
    if op.name == "lift_fresh" and op.args[0].dim() == 0 and not _may_silence([op.args[0]]):
        facts = Facts([], flag(False, op.args[0]))  # a number in the model's code
    return [facts] * len(op.results)


def move(book: Book, op: Operation) -> list[Facts]:
    """Views and all else that only moves entries about: facts are moved alike."""
    x, facts = op.args[0], op.of(op.args[0])

    def moved(each: Tensor) -> list[Tensor]:
        if op.name in VIEWS:
            return [each.reshape(op.out.shape)]
        if "shuffle" in op.name:  # whose kernels are for real numbers
            return [op.func(each.double(), *op.args[1:], **op.kwargs).to(each.dtype)]
        out = op.func(each, *op.args[1:], **op.kwargs)
        return [out] if isinstance(out, Tensor) else list(out)

    moves, results = facts.moves, op.results
    whole = facts.whole and len(results) == 1 and results[0].numel() == x.numel()
    if op.name in CUTS and not whole and (facts.source is not None or not bool(moves.any())):
        named, dims = op.named, ("dim1", "dim2") if op.name == "diagonal" else ("dim", "dimension")
        axes = [named[each] for each in dims if each in named] or [0]
        axes += [1] * (op.name == "diagonal" and axes == [0])
        moves = either(moves, ~normal(alike_along(x, axes)))  # which part is read may depend on the input
    fields = [moved(labels) for labels in facts.fields]
    for old, pieces in zip(facts.fields, fields, strict=True):
        for piece in pieces if op.name in CUTS else ():
            book.part(old, piece)
    fields = [[normal(each) for each in pieces] for pieces in fields]
    for old, each in zip(facts.fields, fields, strict=True):
        book.grids += [squeezed(labels) for labels in each if len(varying(labels)) > max(1, len(varying(old)))]
    return [
        Facts([each[place] for each in fields], normal(part), facts.source, whole)
        for place, part in enumerate(moved(moves))
    ]


def pad(book: Book, op: Operation) -> list[Facts]:
    """Zeros or another number around: of the same channels, unless along an axis that counts them."""
    x, widths, facts = op.args[0], op.args[1], op.of(op.args[0])
    axes = {x.dim() - 1 - place // 2 for place, width in enumerate(widths) if width}
    fields = [
        normal(op.func(each, widths, 0)) if varying(each) & axes else resized(each, axes, op.out.shape)
        for each in facts.fields
    ]
    for old, new in zip(facts.fields, fields, strict=True):
        book.part(old, new)
    moves = facts.moves
    if min(widths, default=0) < 0:  # of inputs of another size more may be left
        moves = either(moves, normal(~alike_along(x, axes)))
    if not any(widths):  # of those there may be something around
        moves = either(moves, normal(x != (op.named.get("value") or 0)))
    return [Facts(fields, normal(op.func(moves, widths, 0)))]


def pointwise(book: Book, op: Operation) -> list[Facts]:
    """What computes entry by entry."""
    shape = op.results[0].shape
    fields = book.combined([(tensor, facts.fields) for tensor, facts in op.operands], shape)
    moves = flag(torch.Tag.nondeterministic_seeded in op.func.tags, op.results[0])
    for _, facts in op.operands:
        moves = either(moves, facts.moves.expand(shape))
    if op.name == "mul":  # by a constant 0
        for tensor, facts in op.operands:
            if tensor is not op.out and not bool(facts.moves.all()):
                moves = both(moves, (~((tensor == 0) & ~facts.moves)).expand(shape))
    return [Facts(fields, moves) for _ in op.results]


def batch_norm(book: Book, op: Operation) -> list[Facts]:
    """BatchNorm: each channel on its own."""
    x, weight = op.args[:2]
    facts = op.of(x)

    def spread(each: Tensor) -> Tensor:
        return each.view(-1, *[1] * (x.dim() - 2))

    operands, moves = [(x, facts.fields)], facts.moves
    for tensor in op.args[1:5]:
        if isinstance(tensor, Tensor):
            operands.append((spread(tensor), [spread(each) for each in op.of(tensor).fields]))
    if isinstance(weight, Tensor) and not bool(op.of(weight).moves.any()):
        moves = both(moves, spread(weight != 0).expand(x.shape))
    others = [Facts([], flag(True, each)) for each in op.results[1:]]
    return [Facts(book.combined(operands, x.shape), moves), *others]


def layer_norm(book: Book, op: Operation) -> list[Facts]:
    """LayerNorm and RMSNorm: over the last axes."""
    x, shape = op.args[:2]
    axes = set(range(x.dim() - len(shape), x.dim()))
    why = f"{'LayerNorm' if op.name == 'native_layer_norm' else 'RMSNorm'} is taken over all channels"
    operands = [(x, [book.looked(each, axes, why, symmetric=True) for each in op.of(x).fields])]
    operands += [(tensor, op.of(tensor).fields) for tensor in op.args[2:4] if isinstance(tensor, Tensor)]
    first, *others = op.results
    return [
        Facts(book.combined(operands, x.shape), flag(True, first)),
        *(Facts([], flag(True, each)) for each in others),
    ]


def reduce(book: Book, op: Operation) -> list[Facts]:
    """A sum, mean, maximum and the like over some axes, which go or have size 1."""
    x, given = op.args[0], op.named.get("dim")
    if len(op.operands) > 1:
        return unknown(book, op)
    if given is None or (isinstance(given, (list, tuple)) and not given):
        given = range(x.dim())
    axes = {axis % max(1, x.dim()) for axis in ([given] if isinstance(given, int) else given)}
    keep = op.named.get("keepdim") or not x.dim()

    def less(each: Tensor) -> Tensor:
        for axis in sorted(axes, reverse=True) if x.dim() else ():
            each = each.narrow(axis, 0, 1) if keep else each.select(axis, 0)
        return each

    facts, fields = op.of(x), []
    for each in facts.fields:
        if op.name in SUMS and len(varying(each)) == 1 and varying(each) <= axes:
            [axis] = varying(each)
            labels = each.movedim(axis, 0).flatten(1)[:, 0]
            silent = zero(x.movedim(axis, 0).flatten(1), facts.moves.movedim(axis, 0).flatten(1), 1)
            unknown_value = torch.full_like(labels, math.nan, dtype=torch.float32)
            book.reads.append(Read(labels, silent, silent, unknown_value, None, False, None))
        else:
            why, free = f"{op.name} is taken over all channels", op.name in SYMMETRIC
            fields.append(less(book.looked(each, axes, why, symmetric=free)))
    moves = any_along(facts.moves, axes if x.dim() else ())
    if x.dim() and not (facts.source is not None and facts.whole):
        moves = either(moves, ~_of_any_number(op, x, axes))
    return [Facts(fields, less(moves)) for _ in op.results]


def _of_any_number(op: Operation, x: Tensor, axes: set[int]) -> Tensor:
    """Return where the operation gives the same for any number of such entries along axes, as there may be later on."""
    if op.name in FREE:
        return normal(alike_along(x, axes))
    return normal(~any_along(x != 0, axes)) if op.name in ZEROS else flag(False, x)


def along_one(book: Book, op: Operation) -> list[Facts]:
    """Softmax, cumulative sums and the like: all entries along an axis at once, which stays."""
    x, facts = op.args[0], op.of(op.args[0])
    axes = {op.named.get("dim", -1) % x.dim()} if x.dim() else set()
    why, free = f"{op.name.lstrip('_')} is taken over all channels", op.name in SYMMETRIC
    fields = [book.looked(each, axes, why, symmetric=free) for each in facts.fields]
    moves = any_along(facts.moves, axes)
    if not (facts.source is not None and facts.whole):
        moves = either(moves, ~_of_any_number(op, x, axes))
    return [Facts(fields, moves) for _ in op.results]


def spatial(book: Book, op: Operation) -> list[Facts]:
    """Pooling, resizing and padding of the last axes, whose sizes change."""
    x, facts = op.args[0], op.of(op.args[0])
    inner = next((int(digit) for digit in "123" if f"{digit}d" in op.name), 0)
    if not inner or len(op.operands) > 1:
        return unknown(book, op)
    axes = set(range(x.dim() - inner, x.dim()))
    fields = [book.looked(each, axes, f"{op.name} is taken over all channels") for each in facts.fields]
    free = alike_along(x, axes)
    padding = op.named.get("padding", 0) if "avg_pool" in op.name else 0
    if (any(padding) if isinstance(padding, (list, tuple)) else padding) or op.named.get("divisor_override"):
        free = ~any_along(x != 0, axes)  # how much of zeros around comes in depends on the size
    moves = either(any_along(facts.moves, axes), normal(~free))
    return [
        Facts([resized(each, axes, tensor.shape) for each in fields], resized(moves, axes, tensor.shape))
        for tensor in op.results
    ]


def cat(book: Book, op: Operation) -> list[Facts]:
    """One behind the other along an axis, which counts channels or does not."""
    parts = [tensor for tensor in op.args[0] if tensor.numel()]
    axis = op.named.get("dim", 0) % op.out.dim()
    facts, labels = [op.of(part) for part in parts], []
    for part, known in zip(parts, facts, strict=True):
        own = sorted(known.fields, key=lambda each: axis not in varying(each))
        labels.append(own[0] if own else torch.zeros((), dtype=torch.int64, device=part.device).expand(part.shape))
        for each in own[1:]:
            book.fix(each, "it is concatenated with other axes")
    if any(axis in varying(each) for each in labels):
        together = concatenated(labels, axis)
        if len(varying(together)) > max(1, *(len(varying(each)) for each in labels)):
            book.grids.append(squeezed(together))
    else:  # one behind the other along an axis without channels: all have the same ones
        first = labels[0].narrow(axis, 0, 1)
        for each in labels[1:]:
            book.unify(first, each.narrow(axis, 0, 1))
        together = first.expand(op.out.shape)
    return [Facts([together], concatenated([known.moves for known in facts], axis))]


def stack(book: Book, op: Operation) -> list[Facts]:
    """Side by side along a new axis: all have the same channels."""
    parts, axis = op.args[0], op.named.get("dim", 0) % op.out.dim()
    fields = book.combined([(part, op.of(part).fields) for part in parts], parts[0].shape)
    moves = torch.stack([op.of(part).moves for part in parts], axis)
    return [Facts([each.unsqueeze(axis).expand(op.out.shape) for each in fields], normal(moves))]


def glu(book: Book, op: Operation) -> list[Facts]:
    """One half times the sigmoid of the other."""
    facts, axis = op.of(op.args[0]), op.named.get("dim", -1) % op.out.dim()
    halves: list[list[Tensor]] = [[], []]
    for each in facts.fields:
        for place, half in enumerate(each.chunk(2, axis)):
            book.part(each, half)
            halves[place].append(normal(half))
    left, right = facts.moves.chunk(2, axis)
    return [Facts(book.combined([(op.out, half) for half in halves], op.out.shape), either(left, right))]


def embedding(book: Book, op: Operation) -> list[Facts]:
    """Rows that the input chooses."""
    weight, facts = op.args[0], op.of(op.args[0])
    fields = []
    for labels in facts.fields:
        if 0 in varying(labels):
            book.fix(labels, "the input chooses among rows of an embedding")
        else:
            fields.append(labels[0].expand(op.out.shape))
    alike = (weight == weight[:1]).all(0) & ~facts.moves.any(0)
    return [Facts(fields, (~alike).expand(op.out.shape))]


def index(book: Book, op: Operation) -> list[Facts]:
    """Entries that are chosen along some axes; channels along the others stay apart."""
    x, chosen = op.args[:2]
    facts, axes = op.of(x), {axis for axis, each in enumerate(chosen) if each is not None}
    if any(isinstance(each, Tensor) and each.dtype == torch.bool for each in chosen):
        return unknown(book, op)
    marks: list[Any] = [slice(None) if each is None else torch.zeros_like(each) for each in chosen]
    fields = []
    for labels in facts.fields:
        if varying(labels) & axes:
            book.fix(labels, "indices choose among channels")
        else:
            fields.append(normal(labels[tuple(marks)]))
    return [Facts(fields, flag(True, op.out))]
