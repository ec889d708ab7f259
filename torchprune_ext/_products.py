"""What follows for channels from products: which channels they sum over, and which of those add nothing."""

import torch
from torch import Tensor

from torchprune_ext._facts import (
    Book,
    Facts,
    Operation,
    Read,
    constants,
    either,
    normal,
    squeezed,
    still,
    varying,
    zero,
)
from torchprune_ext._rules import unknown

ALONE = "it is multiplied with the model's input, or other values without channels of their own"


def product(book: Book, op: Operation) -> list[Facts]:
    """Matrix products, in batches or not, with or without something added."""
    added, (a, b) = (op.args[0], op.args[1:3]) if op.name in ("addmm", "baddbmm") else (None, op.args[:2])
    bias = op.of(added).source if added is not None and op.of(added).whole and not op.kwargs else None
    left, right = _in_batches(op.of(a), a, False), _in_batches(op.of(b), b, True)
    if op.kwargs:  # alpha, beta: what is summed is not what is added
        left.whole = right.whole = False
    fields, moves = _contracted(book, _three(a, False), left, _three(b, True), right, bias)
    fields, moves = [each.reshape(op.out.shape) for each in fields], moves.reshape(op.out.shape)
    if added is not None:
        own = op.of(added)
        fields = book.combined([(op.out, fields), (added, own.fields)], op.out.shape)
        moves = either(moves, own.moves.expand(op.out.shape))
    return [Facts([normal(each) for each in fields], normal(moves))]


def _three(each: Tensor, right: bool) -> Tensor:
    """Return a factor, or facts of it, as ``(batches, rows, columns)``."""
    each = each.unsqueeze(-1) if right and each.dim() == 1 else each
    return each.unsqueeze(0) if each.dim() == 2 else each


def _in_batches(facts: Facts, tensor: Tensor, right: bool) -> Facts:
    fields = [_three(each, right) for each in facts.fields]
    return Facts(fields, _three(facts.moves, right), facts.source, facts.whole)


def _contracted(
    book: Book, a: Tensor, fa: Facts, b: Tensor, fb: Facts, bias: str | None
) -> tuple[list[Tensor], Tensor]:
    """Return fields and moves of ``a @ b``, ``(b, m, k) @ (b, k, n)``, and write down which channels are summed."""
    size = torch.Size([len(a), a.shape[1], b.shape[2]])
    kept_a, summed_a = _parted(fa.fields, 2)
    kept_b, summed_b = _parted(fb.fields, 1)
    plain_a, plain_b = ([each for each in fields if len(varying(each)) == 1] for fields in (summed_a, summed_b))
    if plain_a and plain_b:
        read_a, read_b = plain_a[0][0, 0], plain_b[0][0, :, 0]
        book.unify(read_a, read_b)
        known = [facts for facts in (fa, fb) if facts.source is not None]
        reader = known[0] if len(known) == 1 else None
        labels, x, moves, axis = (read_a, b, fb.moves, 1) if reader is fa else (read_b, a, fa.moves, 2)
        silent = (zero(a, fa.moves, 1) | zero(b, fb.moves, 2)).all(0)
        unmoved, value = constants(x, moves, axis)
        name, whole = (None, False) if reader is None else (reader.source, reader.whole)
        book.reads.append(Read(labels, silent, unmoved, value, name, whole, bias))
    else:
        for each in (*plain_a, *plain_b):
            book.fix(each, ALONE)
    # labels that differ along another axis too, as heads do, go as a whole, and stay in the result
    heads_a, heads_b = ([each for each in fields if len(varying(each)) > 1] for fields in (summed_a, summed_b))
    if len(heads_a) == len(heads_b) == 1 and varying(heads_a[0]) == {0, 2} and varying(heads_b[0]) == {0, 1}:
        book.unify(heads_a[0][:, 0], heads_b[0][:, :, 0])
        book.heads.append(heads_a[0][:, 0, 0])
    kept_a += [book.joined(each, [2]) for each in heads_a]
    kept_b += [book.joined(each, [1]) for each in heads_b]
    operands = []
    for tensor, fields, axis in ((a, kept_a, 2), (b, kept_b, 1)):
        small = tensor.narrow(axis, 0, 1)
        small = small.narrow(0, 0, 1) if still(tensor, 0) else small
        operands.append((small, [each.narrow(axis, 0, 1).expand(size) for each in fields]))
    return book.combined(operands, size), _moving(a, fa, b, fb)


def _parted(fields: list[Tensor], axis: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the fields that do not vary along ``axis``, and those that do."""
    return [f for f in fields if axis not in varying(f)], [f for f in fields if axis in varying(f)]


def _moving(a: Tensor, fa: Facts, b: Tensor, fb: Facts) -> Tensor:
    """Return which entries of ``a @ b`` may change."""
    shape = (len(a), a.shape[1], b.shape[2])
    if not bool(fa.moves.any()) and not bool(fb.moves.any()):
        return torch.zeros((), dtype=torch.bool, device=a.device).expand(shape)
    if not bool(fb.moves.any()):  # a weight: those outputs move for which it multiplies moving inputs by something
        moving = squeezed(fa.moves).any(1, keepdim=True).any(0, keepdim=True).expand(1, 1, a.shape[2])
        weight = b[:1] if still(b, 0) else b
        return ((moving.float() @ (weight != 0).float()) > 0).expand(shape)
    dead = zero(a, fa.moves, 2).unsqueeze(2) | zero(b, fb.moves, 1).unsqueeze(1)
    return ~dead.expand(shape)


def convolution(book: Book, op: Operation) -> list[Facts]:
    """Convolutions and transposed ones."""
    x, weight, bias, _, padding, _, transposed, _, groups = op.args
    fx, fw, shape = op.of(x), op.of(weight), (1, -1, *[1] * (op.out.dim() - 2))
    if transposed and groups > 1:
        return unknown(book, op)
    if transposed:
        weight, fields = weight.transpose(0, 1), [each.transpose(0, 1) for each in fw.fields]
    else:
        fields = fw.fields
    rows, columns = (next((_line(each, axis) for each in fields if varying(each) == {axis}), None) for axis in (0, 1))
    for each in fields:
        if not (varying(each) == {0} or varying(each) == {1}):
            book.fix(each, "it is a place of a convolution")
    channels = None
    for each in fx.fields:
        labels = book.joined(each, varying(each) - {1})
        if channels is None and 1 in varying(labels):
            channels = _line(labels, 1)
        else:
            book.fix(labels, "it is a place of a convolution")
    if weight.shape[1] == 1 and groups > 1:
        _depthwise(book, channels, rows, len(weight) // groups)
    elif channels is not None and columns is not None:
        book.unify(channels.view(groups, -1), columns.expand(groups, -1))
        own = op.of(bias).source if isinstance(bias, Tensor) else None
        unmoved, value = constants(x, fx.moves, 1)
        silent = zero(x.transpose(0, 1).flatten(1), fx.moves.transpose(0, 1).flatten(1), 1)
        if not bool(fw.moves.any()):
            silent = silent | ~_nonzero(weight, groups).any(1).flatten()
        unfit = groups > 1 or transposed or any(bool(pad) for pad in padding)
        book.reads.append(Read(columns.repeat(groups), silent, unmoved, value, fw.source, fw.whole, own, unfit))
    else:
        for lone in (channels, columns):
            if lone is not None:
                book.fix(lone, ALONE)
    if rows is not None and groups > 1 and weight.shape[1] > 1:
        book.blocks.append(rows.view(groups, -1))
    moving = squeezed(fx.moves).transpose(0, 1).flatten(1).any(1).expand(x.shape[1]).view(groups, 1, -1)
    alive = (_nonzero(weight, groups) & moving).any(2).view(shape) | bool(fw.moves.any())
    if transposed or any(bool(pad) for pad in padding):  # what zeros around do may show at another size only
        given = (x != 0).transpose(0, 1).flatten(1).any(1).view(groups, 1, -1)
        places = op.out.transpose(0, 1).flatten(1)
        alike = (places == places[:, :1]).all(1)
        alive = alive | ((_nonzero(weight, groups) & given).any(2).flatten() & alike).view(shape)
    operands = [(op.out, [] if rows is None else [rows.view(shape).expand(op.out.shape)])]
    if isinstance(bias, Tensor):
        operands.append((bias.view(shape), [each.view(shape) for each in op.of(bias).fields]))
        alive = alive | op.of(bias).moves.view(shape)
    return [Facts(book.combined(operands, op.out.shape), normal(alive.expand(op.out.shape)))]


def _line(labels: Tensor, axis: int) -> Tensor:
    """Return the labels along the only axis along which they vary."""
    return labels.movedim(axis, 0).flatten(1)[:, 0]


def _nonzero(weight: Tensor, groups: int) -> Tensor:
    """Return which kernels of a convolution are not all zero, ``(groups, outputs, inputs)``."""
    alive = (weight != 0).flatten(2).any(2)
    return alive.view(groups, -1, alive.shape[1])


def _depthwise(book: Book, channels: Tensor | None, rows: Tensor | None, each: int) -> None:
    """Make a channel of each input and the outputs that a depthwise convolution computes from it."""
    if channels is not None and rows is not None:
        book.unify(channels.view(-1, 1).expand(-1, each), rows.view(-1, each))
    else:
        for labels in (channels, rows):
            if labels is not None:
                book.fix(labels, ALONE)
