"""What is known of a tensor in a forward pass: which of its entries belong to which channel, and which never change.

A channel has a number, its label. A tensor has *fields*: each gives every entry a label, and varies along the axes that
count channels. The weight of a ``Linear`` has two, its rows and its columns; what the layer gives has one, the rows
again. Fields, like all facts, have the shape of the tensor and stride 0 along each axis along which they are all the
same, so they take next to no memory, and what moves entries about (a transpose, a view) moves them alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Facts:
    """What is known of a tensor.

    Args:
        fields: int64, of the tensor's shape; labels, 0 for an entry that must stay.
        moves: bool, of the tensor's shape: whether an entry may change with the model's inputs.
        source: name of the parameter or buffer that the tensor is, or a view of it.
        whole: whether it is all of that.
    """

    fields: list[Tensor]
    moves: Tensor
    source: str | None = None
    whole: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Channels that a product sums over.

    Args:
        labels: of the channels, ``(k,)``; those of the weight, if one of the factors is one.
        silent: whether a channel adds nothing, whatever the input, ``(k,)``.
        still: whether what is read there is the same whatever the input, ``(k,)``.
        value: float64, if so, its one value at all places; else NaN.
        reader: name of the weight they are multiplied with, if it is one.
        whole: whether it is multiplied with all of that weight.
        bias: name of the bias that the same operation adds.
        padded: whether the product is also taken over zeros around the input.
    """

    labels: Tensor
    silent: Tensor
    still: Tensor
    value: Tensor
    reader: str | None
    whole: bool
    bias: str | None
    padded: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """An operation that has run.

    Args:
        func: which.
        name: its name, as ``add``; of what writes into its first argument too.
        args: what it was called with.
        kwargs: the same, by name.
        out: what it gave.
        before: facts of its tensors before it ran, by id.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: dict[int, Facts]

    def of(self, tensor: Tensor) -> Facts:
        """Return what was known of an argument."""
        return self.before[id(tensor)]

    @property
    def results(self) -> list[Tensor]:
        """The tensors it gave."""
        return list(tensors_in(self.out))

    @property
    def operands(self) -> list[tuple[Tensor, Facts]]:
        """The tensors it was called with, and what was known of them."""
        return [(tensor, self.of(tensor)) for tensor in tensors_in([self.args, self.kwargs])]

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name."""
        return {a.name: v for a, v in zip(self.func._schema.arguments, self.args, strict=False)} | self.kwargs


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


@dataclass(eq=False, slots=True)
class Book:
    """What a trace has found out about labels.

    Args:
        pairs: labels of the same channel, each ``(2, n)``.
        fixed: labels that must stay, and why.
        reads: products that sum over labels.
        grids: fields that vary along two axes or more since a view, so that only whole rows or columns can go.
        blocks: the same of the outputs of a convolution, one row for each of its groups.
        heads: labels of what is multiplied head by head.
        symmetric: places in ``fixed`` of channels that cannot go, but can change places with each other.
        counted: places in ``pairs`` of channels that can only go together, but of which each has a place of its own.
        parts: labels of what is cut out of a tensor whose axis counts channels, for each piece.
        within: labels, and those of what each of them must stay with, as the inputs that belong to a head.
    """

    pairs: list[Tensor] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    symmetric: set[int] = field(default_factory=set)
    counted: set[int] = field(default_factory=set)
    parts: list[Tensor] = field(default_factory=list)
    within: list[Tensor] = field(default_factory=list)

    def fix(self, labels: Tensor, why: str, *, symmetric: bool = False) -> None:
        """Note that channels must stay; ``symmetric``: their number, but not their order."""
        found = squeezed(labels).unique()
        if symmetric:
            self.symmetric.add(len(self.fixed))
        self.fixed.append((found[found > 0], why))

    def part(self, old: Tensor, new: Tensor) -> None:
        """Note that ``new`` labels are cut out of those of a tensor, so that only these can change places."""
        found = squeezed(new).unique()
        if len(found) < len(squeezed(old).unique()):
            self.parts.append(found[found > 0])

    def unify(self, one: Tensor, other: Tensor) -> None:
        """Note that two fields of the same shape give each entry the same channel under two labels."""
        pairs = _side_by_side(one, other)
        pairs = pairs[:, pairs[0] != pairs[1]]
        lonely = (pairs == 0).any(0)
        if bool(lonely.any()):
            self.fix(pairs[:, lonely].amax(0), "it is joined to values that are not channels")
        self.pairs.append(pairs[:, ~lonely].unique(dim=1))

    def joined(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """Make one channel of what differs along ``axes``, and return the field, which varies along others only."""
        first = labels
        for axis in axes:
            if first.size(axis) > 1:
                first = first.narrow(axis, 0, 1)
        first = first.expand(labels.shape)
        self.unify(labels, first)
        return first

    def looked(self, labels: Tensor, axes: set[int], why: str, *, symmetric: bool = False) -> Tensor:
        """Return the field after an operation that looks at all entries along ``axes`` at once, in whatever order."""
        if varying(labels) & axes:
            if not varying(labels) <= axes:
                return self.joined(labels, axes)
            self.fix(labels, why, symmetric=symmetric)
        return labels

    def combined(self, operands: Iterable[tuple[Tensor, list[Tensor]]], shape: torch.Size) -> list[Tensor]:
        """Return the fields of what is computed entry by entry from tensors and their fields."""
        spread = [(tensor, [each.expand(shape) for each in fields]) for tensor, fields in operands]
        kept: list[Tensor] = []
        for _, fields in spread:
            for labels in fields:
                for place, other in enumerate(kept):
                    if varying(labels) & varying(other):
                        kept[place] = self._met(other, labels)
                        break
                else:
                    kept.append(labels)
        for tensor, fields in spread:
            real = {axis + len(shape) - tensor.dim() for axis in range(tensor.dim()) if tensor.size(axis) > 1}
            own: set[int] = set().union(*(varying(each) for each in fields))
            for labels in kept:
                if varying(labels) & (real - own):
                    self.fix(labels, "it meets a tensor of fixed width that the model makes or is given")
        return kept

    def _met(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the field of entries that two fields, which overlap, give labels."""
        if varying(one) < varying(other):
            one, other = other, one
        common = varying(one) & varying(other)
        if varying(one) == varying(other) or slow(one) in varying(other):
            rest, start = varying(one) - common, len(self.pairs)
            self.unify(self.joined(one, rest) if rest else one, other)
            if rest:  # whole heads go, but what belongs to a head has no order in it
                self.counted.update(range(start, len(self.pairs)))
                pairs = _side_by_side(one, other)
                self.within.append(pairs[:, (pairs > 0).all(0)].unique(dim=1))
        else:  # as the one rotation of all heads: heads go as a whole, and what they share stays
            self.fix(other, "it is shared by several heads")
            self.joined(one, common)
        if not varying(other) <= varying(one):
            self.fix(one, "it meets another tensor crosswise")
            self.fix(other, "it meets another tensor crosswise")
        return one


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    """Return the labels of two fields of the same shape, ``(2, n)``, without what is the same all along an axis."""
    for axis in range(one.dim()):
        if still(one, axis) and still(other, axis):
            one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    return torch.stack([one.reshape(-1), other.reshape(-1)])


def still(facts: Tensor, axis: int) -> bool:
    """Return whether facts are known to be the same all along ``axis``."""
    return facts.size(axis) == 1 or facts.stride(axis) == 0


def varying(facts: Tensor) -> set[int]:
    """Return the axes along which facts differ."""
    return {axis for axis in range(facts.dim()) if not still(facts, axis)}


def squeezed(facts: Tensor) -> Tensor:
    """Return facts with size 1 along the axes along which they are the same."""
    for axis in range(facts.dim()):
        if facts.size(axis) and still(facts, axis):
            facts = facts.narrow(axis, 0, 1)
    return facts


def normal(facts: Tensor) -> Tensor:
    """Return the same facts with stride 0 along every axis along which they are the same."""
    small = squeezed(facts)
    for axis in range(small.dim()):
        first = small.narrow(axis, 0, min(1, small.size(axis)))
        if small.size(axis) > 1 and bool((small == first).all()):
            small = first
    return small.expand(facts.shape)


def slow(labels: Tensor) -> int:
    """Return the axis along which labels differ most, which counts heads or groups."""

    def spread(axis: int) -> int:
        line = labels.movedim(axis, 0).flatten(1)[:, 0]
        return int(line.amax() - line.amin())

    return max(varying(labels), key=spread)


def flag(value: bool, tensor: Tensor) -> Tensor:
    """Return a fact that holds for all entries of ``tensor``, or for none."""
    return torch.tensor(value, device=tensor.device).expand(tensor.shape)


def either(one: Tensor, other: Tensor) -> Tensor:
    """Return where one of two facts of the same shape holds."""
    return (squeezed(one) | squeezed(other)).expand(one.shape)


def both(one: Tensor, other: Tensor) -> Tensor:
    """Return where two facts of the same shape hold."""
    return (squeezed(one) & squeezed(other)).expand(one.shape)


def any_along(facts: Tensor, axes: Iterable[int]) -> Tensor:
    """Return a bool fact that holds wherever it does for some entry along ``axes``; the shape stays."""
    small = squeezed(facts)
    for axis in axes:
        small = small.any(axis, keepdim=True)
    return small.expand(facts.shape)


def alike_along(values: Tensor, axes: Iterable[int]) -> Tensor:
    """Return a bool fact that holds where all ``values`` along ``axes`` are the same, so that their number is free."""
    same = torch.ones_like(values, dtype=torch.bool)
    for axis in axes:
        if values.size(axis):
            same &= values == values.narrow(axis, 0, 1)
    return ~any_along(~same, axes)


def resized(facts: Tensor, axes: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Return facts that are the same along ``axes`` for a tensor of another size there."""
    for axis in axes:
        facts = facts.narrow(axis, 0, 1)
    return facts.expand(shape)


def concatenated(parts: list[Tensor], axis: int) -> Tensor:
    """Return facts one behind the other."""
    whole = [*parts[0].shape]
    whole[axis] = sum(part.size(axis) for part in parts)
    for other in range(len(whole)):
        if other != axis and all(still(part, other) for part in parts):
            parts = [part.narrow(other, 0, 1) for part in parts]
    return normal(torch.cat(parts, axis).expand(whole))


def zero(values: Tensor, moves: Tensor, axis: int) -> Tensor:
    """Return where all entries along ``axis`` are 0 whatever comes in."""
    small = squeezed(moves)
    if small.numel() == 1 and bool(small):
        return torch.zeros_like(values.select(axis, 0), dtype=torch.bool)
    return ((values == 0) & ~small).all(axis)


def constants(values: Tensor, moves: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return for each place along ``axis`` whether its entries stay whatever comes in, and their one value or NaN."""
    rows, moving = values.movedim(axis, 0).flatten(1), squeezed(moves).movedim(axis, 0).flatten(1).any(1)
    moving = moving.expand(len(rows))
    if bool(moving.all()) or not rows.numel() or rows.is_complex():  # constants are real numbers
        return ~moving, torch.full((len(rows),), float("nan"), dtype=torch.float64, device=values.device)
    alike = (rows == rows[:, :1]).all(1) & ~moving & rows[:, 0].isfinite()
    return ~moving, rows[:, 0].double().masked_fill(~alike, float("nan"))
