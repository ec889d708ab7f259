"""What is known of a tensor in a forward pass: which of its entries belong to which channel, and which never change.

A channel has a number, its label. A tensor has *fields*: each gives every entry a label, and varies along the axes that
count channels. The weight of a ``Linear`` has two, its rows and its columns; what the layer gives has one, the rows
again. Fields, like all facts, have the shape of the tensor and stride 0 along each axis along which they are all the
same, so they take next to no memory, and what moves entries about (a transpose, a view) moves them alike.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Facts:
    """What is known of a tensor.

    Args:
        fields: int64, of the tensor's shape; labels, 0 for an entry that must stay.
        moves: bool, of the tensor's shape: whether an entry may change with the model's inputs.
        source: name of the parameter or buffer that the tensor is, or a view of it.
    """

    fields: list[Tensor]
    moves: Tensor
    source: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Channels that a product sums over.

    Args:
        labels: of the channels, ``(k,)``.
        silent: whether a channel adds nothing, whatever the input, ``(k,)``.
        value: float64, the constant that is read there, whatever the input; NaN where there is not one.
        reader: name of the weight they are multiplied with, if it is one.
        bias: name of the bias that the same operation adds.
        padded: whether the product is also taken over zeros around the input.
    """

    labels: Tensor
    silent: Tensor
    value: Tensor
    reader: str | None
    bias: str | None
    padded: bool


@dataclass(eq=False, slots=True)
class Book:
    """What a trace has found out about labels.

    Args:
        pairs: labels of the same channel, each ``(2, n)``.
        fixed: labels that must stay, and why.
        reads: products that sum over labels.
        grids: fields that vary along two axes or more since a view, so that only whole rows or columns can go.
    """

    pairs: list[Tensor] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)

    def fix(self, labels: Tensor, why: str) -> None:
        """Note that channels must stay."""
        found = squeezed(labels).unique()
        self.fixed.append((found[found > 0], why))

    def unify(self, one: Tensor, other: Tensor) -> None:
        """Note that two fields of the same shape give each entry the same channel under two labels."""
        for axis in range(one.dim()):
            if still(one, axis) and still(other, axis):
                one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
        pairs = torch.stack([one.reshape(-1), other.reshape(-1)])
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


def fitted(facts: Tensor, shape: Sequence[int]) -> Tensor:
    """Return facts broadcast to ``shape``, as values are."""
    return facts.expand(shape)


def moved(facts: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return facts after what moves entries about."""
    return normal(move(facts))


def any_along(facts: Tensor, axes: Iterable[int]) -> Tensor:
    """Return a bool fact that holds wherever it does for some entry along ``axes``; the shape stays."""
    small = squeezed(facts)
    for axis in axes:
        small = small.any(axis, keepdim=True)
    return small.expand(facts.shape)


def constants(values: Tensor, moves: Tensor, axis: int) -> Tensor:
    """Return, for each place along ``axis``, the one value that all its entries have whatever comes in, else NaN."""
    rows, moving = values.movedim(axis, 0).flatten(1), moves.movedim(axis, 0)
    moving = squeezed(moving).flatten(1).any(1).expand(len(rows))
    if bool(moving.all()) or not rows.numel():
        return torch.full((len(rows),), float("nan"), dtype=torch.float64, device=values.device)
    alike = (rows == rows[:, :1]).all(1) & ~moving
    return rows[:, 0].double().masked_fill(~alike, float("nan"))
