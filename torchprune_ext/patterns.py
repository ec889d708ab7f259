"""What one prunable unit is, independent of how units are scored: frozen values that check themselves."""

import numbers
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from torchprune_ext._checks import check_whole


class Unit(Protocol):
    """A kind of unit: entries of a tensor that live or die together.

    A value that has this name and this method is a unit for :mod:`torchprune_ext.masks` and for the global calls;
    nothing else needs to know of it. Each entry belongs to one unit.
    """

    units: ClassVar[str]
    """The plural noun for errors and budgets, such as ``"kernels"``."""

    def split(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return a view of ``tensor`` in which each unit spans whole axes, and these axes.

        The other axes, in row-major order, count the units.

        Raises:
            ValueError: the tensor does not fall into such units; the message says what does instead.
        """


def _axis(dim: int, shape: torch.Size) -> int:
    """Return ``dim`` counted from the front."""
    if not -len(shape) <= dim < len(shape):
        axes = f"0 to {len(shape) - 1}" if shape else "none"
        raise ValueError(f"dim={dim!r} is not an axis of the {len(shape)}-D shape {tuple(shape)}. Axes: {axes}.")
    return dim % len(shape)


def _check_dim(dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim={dim!r} is a {type(dim).__name__}. Pass an int.")


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` entries kept in every ``m`` consecutive entries along ``dim``.

    Args:
        n: entries kept per group (count, ``0 < n <= m``).
        m: group length (count).
        dim: axis that the groups run along. None stands for the reduction axis, the one that the layer's product sums
            over, as hardware wants: calls that know the layer fill it in by :meth:`along`, and where nothing but a
            tensor is known it is axis 1, as in ``Linear`` and ``Conv2d``.
        pad: let a short last group count as filled up with zeros; otherwise ``m`` must divide the size of ``dim``.
        groups: number of equal parts of ``dim``, across whose borders no group of ``m`` reaches: the groups of a
            transposed convolution, whose outputs each sum over one part of axis 0. 1 for everything else.

    Raises:
        TypeError: ``n``, ``m``, ``dim`` or ``groups`` is not an int.
        ValueError: not ``0 < n <= m``, or ``groups`` is less than 1.

    Example:
        >>> NM(2, 4).along(0)
        NM(n=2, m=4, dim=0, pad=False, groups=1)
    """

    n: int
    m: int
    dim: int | None = None
    pad: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check_whole("n", self.n, 1)
        check_whole("m", self.m, 1)
        check_whole("groups", self.groups, 1)
        if self.dim is not None:
            _check_dim(self.dim)
        if not isinstance(self.pad, bool):
            raise TypeError(f"pad={self.pad!r} is a {type(self.pad).__name__}. Pass True or False.")
        if self.n > self.m:
            raise ValueError(
                f"n={self.n}, m={self.m} is not an N:M pattern: n entries are kept of m, so 0 < n <= m. "
                f"Swap them for {self.m}:{self.n}, or pass e.g. n=2, m=4."
            )

    def along(self, axis: int, groups: int = 1) -> "NM":
        """Return this pattern with ``dim=axis`` and ``groups`` if its ``dim`` is None; else as it is."""
        return replace(self, dim=axis, groups=groups) if self.dim is None else self

    def axis(self, shape: torch.Size) -> int:
        """Return the axis that the groups run along in ``shape``, counted from the front.

        Raises:
            ValueError: ``dim`` is not an axis of ``shape``, ``groups`` do not divide its size, or ``m`` does not
                divide that of a part and ``pad`` is off.
        """
        dim = 1 if self.dim is None else self.dim
        axis = _axis(dim, shape)
        size, rest = divmod(shape[axis], self.groups)
        if rest:
            raise ValueError(
                f"groups={self.groups} do not divide the {shape[axis]} entries of axis {axis} in shape "
                f"{tuple(shape)}. Pass the groups of the transposed convolution, or groups=1."
            )
        if size % self.m and not self.pad:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            part = f" in each of {self.groups} groups" if self.groups > 1 else ""
            raise ValueError(
                f"m={self.m} does not divide the {size} entries of dim={dim}{part} in shape {tuple(shape)}. "
                f"Choose m from {divisors}, or pass pad=True to let the short last group count as filled with zeros."
            )
        return axis


@dataclass(frozen=True, slots=True)
class Vector:
    """A 1-D vector along ``dim``: all entries that differ in that index only.

    Args:
        dim: axis that the vectors run along; negative counts from the end.

    Raises:
        TypeError: ``dim`` is not an int.
    """

    dim: int = -1

    units: ClassVar[str] = "vectors"

    def __post_init__(self) -> None:
        """Check the value."""
        _check_dim(self.dim)

    def split(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return ``tensor`` and the axes that one unit spans in it."""
        return tensor, (_axis(self.dim, tensor.shape),)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A convolution kernel ``weight[o, i]``: all entries that share their first two indices."""

    units: ClassVar[str] = "kernels"

    def split(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return ``tensor`` and the axes that one unit spans in it.

        Raises:
            ValueError: the tensor has no kernel axes.
        """
        if tensor.dim() < 3:
            raise ValueError(
                f"shape {tuple(tensor.shape)} has no kernels: weight[o, i] of a convolution has 1 to 3 more axes. "
                "Use vector_ln for rows or columns (dim=1, dim=0), or gradient_magnitude and the like for entries."
            )
        return tensor, tuple(range(2, tensor.dim()))


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of entries of a matrix, in a grid that begins at its first entry and covers it.

    Args:
        block: number of rows and of columns (counts), ``(rows, columns)``, or one number for both.

    Raises:
        TypeError: ``block`` is neither an int nor a pair of ints.
        ValueError: a number is less than 1.
    """

    block: int | tuple[int, int]

    units: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        """Check the values."""
        sizes = self.block if isinstance(self.block, tuple) else (self.block, self.block)
        if len(sizes) != 2:
            raise TypeError(f"block={self.block!r} has {len(sizes)} sizes. Pass (rows, columns), or one int for both.")
        for size in sizes:
            check_whole("block" if size is self.block else f"block={self.block!r}, of which one", size, 1)

    def split(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return a view of ``tensor`` and the axes that one unit spans in it.

        Raises:
            ValueError: the tensor is not a matrix, or blocks do not cover it exactly.
        """
        shape = tuple(tensor.shape)
        if len(shape) != 2:
            raise ValueError(
                f"shape {shape} is not a matrix, which blocks are cut from. Use kernel_ln for a convolution, or "
                "vector_ln, which takes any shape."
            )
        rows, columns = self.block if isinstance(self.block, tuple) else (self.block, self.block)
        if shape[0] % rows or shape[1] % columns:
            divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in shape]
            raise ValueError(
                f"block={self.block!r} does not cover shape {shape} exactly. Pass (rows, columns) with rows from "
                f"{divisors[0]} and columns from {divisors[1]}."
            )
        blocks = tensor.unflatten(0, (shape[0] // rows, rows)).unflatten(2, (shape[1] // columns, columns))
        return blocks, (1, 3)


@dataclass(frozen=True, slots=True)
class Channel:
    """A slice across ``dim``: an output channel (filter) of a layer, or an input channel; or ``size`` of them together.

    Args:
        dim: axis that counts the channels.
        groups: groups of a convolution that count channels of their own: channel ``g * (channels / groups) + j`` is
            entry ``j`` of ``dim`` in the ``g``-th of ``groups`` equal blocks along axis 0. So it is with the output
            channels of a transposed convolution, and with the input channels of any other. 1 for everything else.
        size: number of consecutive channels, from the first on, that make one unit: the 64 columns of a projection
            that read one head, or the 25 columns of a ``Linear`` that read one channel of 5 x 5 places, flattened.

    Raises:
        TypeError: ``dim``, ``groups`` or ``size`` is not an int.
        ValueError: ``groups`` or ``size`` is less than 1.

    Example:
        >>> import torch
        >>> from torchprune_ext.masks import unit_mask
        >>> unit_mask(torch.tensor([1, 0, 1]), Channel(dim=1, size=2), torch.ones(2, 6))
        tensor([[1., 1., 0., 0., 1., 1.],
                [1., 1., 0., 0., 1., 1.]])
    """

    dim: int = 0
    groups: int = 1
    size: int = 1

    units: ClassVar[str] = "channels"

    def __post_init__(self) -> None:
        """Check the values."""
        _check_dim(self.dim)
        check_whole("groups", self.groups, 1)
        check_whole("size", self.size, 1)

    def axis(self, shape: torch.Size) -> int:
        """Return the axis that counts the channels in ``shape``, counted from the front.

        Raises:
            ValueError: ``dim`` is not an axis of ``shape``, ``groups`` do not divide axis 0, or ``size`` does not
                divide the channels.
        """
        axis = _axis(self.dim, shape)
        if self.groups > 1 and (axis == 0 or shape[0] % self.groups):
            raise ValueError(
                f"groups={self.groups} does not fit dim={self.dim} of shape {tuple(shape)}: groups split axis 0 of a "
                "convolution into equal blocks and count its channels on another axis. Pass groups=1."
            )
        if shape[axis] % self.size:
            divisors = [d for d in range(1, shape[axis] + 1) if shape[axis] % d == 0]
            raise ValueError(
                f"size={self.size} does not divide the {shape[axis]} channels of dim={self.dim} in shape "
                f"{tuple(shape)}. Choose size from {divisors}."
            )
        return axis

    def split(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return a view of ``tensor`` and the axes that one unit spans in it.

        Raises:
            ValueError: as :meth:`axis`.
        """
        axis, counting = self.axis(tensor.shape), set()
        if self.size > 1:
            tensor = tensor.unflatten(axis, (tensor.shape[axis] // self.size, self.size))
        if self.groups > 1:
            tensor = tensor.unflatten(0, (self.groups, tensor.shape[0] // self.groups))
            axis, counting = axis + 1, {0}
        counting.add(axis)
        return tensor, tuple(a for a in range(tensor.dim()) if a not in counting)
