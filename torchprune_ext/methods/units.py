"""Methods that judge groups of entries: N of M, vectors, kernels and channels."""

import math

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext._checks import (
    check_amount,
    check_finite,
    check_order,
    check_scores,
    errors_about,
    resolve_amount,
)
from torchprune_ext._host import Target, as_one, install, warn_of_zeros
from torchprune_ext._reduction import reduction_axis
from torchprune_ext._scoring import bn_masks, bn_scores
from torchprune_ext.masks import (
    nm_mask,
    unit_mask,
    unit_scores,
)
from torchprune_ext.methods.base import Method, like
from torchprune_ext.patterns import NM, Block, Channel, Kernel, Unit, Vector
from torchprune_ext.selection import Scores, kept, select_smallest

__all__ = ["BNScaling", "BlockLn", "KernelLn", "NMStructured", "VectorLn"]


class NMStructured(Method):
    """Keep the ``n`` entries of largest score in every ``m`` consecutive entries along ``dim``.

    Args:
        n: entries kept per group (count, ``0 < n <= m``); the sparsity is ``1 - n/m`` (fraction of the tensor).
        m: group length (count); must divide the size of ``dim`` unless ``pad`` is set.
        dim: axis that the groups run along. None is the reduction axis, the one that the layer's product sums over:
            1 of ``Linear`` and of convolutions, 0 of transposed ones. A layer of a type that torch does not have is
            tried out, as Hugging Face's ``Conv1D``, which keeps (inputs, outputs) and has axis 0. The history tells
            which it was. A class that PyTorch drives knows no layer, and takes None for 1.
        pad: let a short last group count as filled up with zeros.
        groups: groups of a transposed convolution that is pruned along axis 0, else 1; with ``dim=None`` those of the
            layer. No group of ``m`` reaches from one of them into the next.

    Shapes: scores, earlier mask and mask have the weight's shape, with at least ``dim + 1`` axes.
    Units: scores are ranks within a group, so any positive scale will do. Ties keep the lower index. What is pruned
        stays pruned and the best ``n`` of what is left are kept, so repeating the call changes nothing.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: not an N:M pattern.

    Hardware: sparse tensor cores multiply matrices whose rows, along the reduction, are 2:4. A convolution is such a
        product once its weight is laid out as (outputs, kernel positions, inputs), so groups run along the input
        channels, at each kernel position by itself: ``dim=1`` of ``Conv2d``.

    Source: Mishra et al. 2021, *Accelerating Sparse Deep Neural Networks*, arXiv:2104.08378 (the 2:4 case).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> _ = NMStructured.apply(layer, "weight", 2, 4)
        >>> layer.weight_mask
        tensor([[1., 1., 0., 0.]])
    """

    PRUNING_TYPE = "global"  # groups need the full shape, in stacked calls too

    def __init__(self, n: int, m: int, dim: int | None = None, pad: bool = False, groups: int = 1) -> None:
        NM(n, m, dim, pad, groups)
        self.n, self.m, self.dim, self.pad, self.groups = n, m, dim, pad, groups

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for weights or scores ``t``."""
        check_finite("importance_scores", t)
        return nm_mask(t, NM(self.n, self.m, self.dim, self.pad, self.groups), default_mask)

    def _mask(self, target: Target, importance_scores: Tensor | None) -> Tensor:
        if self.dim is None:
            self.dim, self.groups = reduction_axis(target)
        return super()._mask(target, importance_scores)


class _Units(Method):
    """Drop the units of smallest Ln norm; subclasses say what a unit is."""

    PRUNING_TYPE = "global"  # units need the full shape, in stacked calls too

    def __init__(self, amount: float, n: float = 2) -> None:
        check_amount(amount)
        check_order(n)
        self.amount, self.n = amount, n

    def _pattern(self) -> Unit:
        raise NotImplementedError

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for weights or scores ``t``."""
        pattern = self._pattern()
        scores = unit_scores(t, pattern, self.n, default_mask)
        keep = _keep_units(scores, self.amount, pattern.units)
        return unit_mask(keep, pattern, like(t, default_mask), default_mask)


class KernelLn(_Units):
    """Drop the convolution kernels ``weight[o, i]`` of smallest Ln norm.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the kernels not yet pruned; a kernel counts as pruned
            when nothing is left of it.
        n: order of the norm, as in :func:`torch.linalg.vector_norm`.

    Shapes: weight of a convolution, ``(out, in / groups, *kernel)``, or of a transposed one,
        ``(in, out / groups, *kernel)``; scores and masks likewise.
    Units: norms are only ranked, so any positive scale will do. Ties keep the lower index.

    Raises:
        TypeError: ``amount`` or ``n`` is not a number.
        ValueError: ``amount`` is out of range.

    Source: Mao et al. 2017, *Exploring the Regularity of Sparse Structure in Convolutional Neural
    Networks*, arXiv:1705.08922, section 3.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(2, 1, 2)
        >>> _ = conv.weight.data.copy_(torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[3.0, 0.1], [0.1, 0.1]]]]))
        >>> _ = KernelLn.apply(conv, "weight", 0.5, n=2)
        >>> conv.weight_mask
        tensor([[[[0., 0.],
                  [0., 0.]],
        <BLANKLINE>
                 [[1., 1.],
                  [1., 1.]]]])
    """

    def _pattern(self) -> Kernel:
        return Kernel()


class VectorLn(_Units):
    """Drop the 1-D vectors along ``dim`` of smallest Ln norm.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the vectors not yet pruned; a vector counts as pruned
            when nothing is left of it.
        n: order of the norm, as in :func:`torch.linalg.vector_norm`.
        dim: axis that the vectors run along: of a ``Linear``, 1 (or -1) drops rows and 0 columns.

    Shapes: weight, scores and masks of one shape with at least one axis.
    Units: norms are only ranked, so any positive scale will do. Ties keep the lower index.

    Raises:
        TypeError: ``amount`` or ``n`` is not a number, ``dim`` not an int.
        ValueError: ``amount`` is out of range.

    Source: Mao et al. 2017, *Exploring the Regularity of Sparse Structure in Convolutional Neural
    Networks*, arXiv:1705.08922, section 3.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1.0], [-3.0, 0.1]]))
        >>> _ = VectorLn.apply(layer, "weight", 1, n=2, dim=1)
        >>> layer.weight_mask
        tensor([[0., 0.],
                [1., 1.]])
    """

    def __init__(self, amount: float, n: float = 2, dim: int = -1) -> None:
        super().__init__(amount, n)
        Vector(dim)
        self.dim = dim

    def _pattern(self) -> Vector:
        return Vector(self.dim)


class BlockLn(_Units):
    """Drop the blocks of a matrix, rectangles in a grid, of smallest Ln norm.

    Block sparse storage (PyTorch's BSR) and block sparse kernels skip what goes, for the same ``block``.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the blocks not yet pruned; a block counts as pruned when
            nothing is left of it.
        n: order of the norm, as in :func:`torch.linalg.vector_norm`.
        block: rows and columns of a block (counts), ``(rows, columns)``, or one number for both; of a ``Linear``, rows
            are outputs and columns are inputs. They must divide the weight's.

    Shapes: weight, scores and masks of one shape with two axes.
    Units: norms are only ranked, so any positive scale will do. Ties keep the lower index, row by row of blocks.

    Raises:
        TypeError: ``amount`` or ``n`` is not a number, ``block`` neither an int nor a pair of ints.
        ValueError: ``amount`` or ``block`` is out of range.

    Source: Narang, Undersander & Diamos 2017, *Block-Sparse Recurrent Neural Networks*, arXiv:1711.02782, who take the
    largest entry for the block (``n=float("inf")``).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1.0, 3.0, 0.1], [1.0, 1.0, 0.1, 0.1]]))
        >>> _ = BlockLn.apply(layer, "weight", 1, block=2)
        >>> layer.weight_mask
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """

    def __init__(self, amount: float, n: float = 2, *, block: int | tuple[int, int]) -> None:
        super().__init__(amount, n)
        Block(block)
        self.block = block

    def _pattern(self) -> Block:
        return Block(self.block)


class BNScaling(Method):
    r"""Drop the output channels of a layer whose BatchNorm scale :math:`|\gamma|` is smallest.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the channels not yet pruned; a channel counts as pruned
            when nothing is left of it in the layer's weight.
        dim: axis of the masked tensor that counts the channels.
        groups: groups of a transposed convolution, else 1.

    Shapes: scales ``(channels,)``; weight of a convolution ``(channels, in / groups, *kernel)``, of a transposed one
        ``(in, channels / groups, *kernel)``, of a ``Linear`` ``(channels, in)``.
    Units: scales are only ranked. Ties keep the lower index.

    Raises:
        TypeError: ``amount`` is not a number.
        ValueError: ``amount`` is out of range.

    Source: Liu et al. 2017, *Learning Efficient Convolutional Networks through Network Slimming*, arXiv:1708.06519.

    Example:
        >>> import torch
        >>> conv, bn = torch.nn.Conv2d(1, 3, 1), torch.nn.BatchNorm2d(3)
        >>> _ = bn.weight.data.copy_(torch.tensor([0.9, -0.1, 0.5]))
        >>> _ = BNScaling.apply(conv, "weight", 1, bn)
        >>> conv.weight_mask.flatten(), conv.bias_mask, bn.bias_mask
        (tensor([1., 0., 1.]), tensor([1., 0., 1.]), tensor([1., 0., 1.]))
    """

    PRUNING_TYPE = "global"  # channels need the full shape, in stacked calls too

    def __init__(self, amount: float, dim: int = 0, groups: int = 1) -> None:
        check_amount(amount)
        Channel(dim, groups)
        self.amount, self.dim, self.groups = amount, dim, groups

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, bn: nn.Module, *, paired: bool = True
    ) -> BasePruningMethod:
        """Prune output channels of ``module`` in place, on top of what was pruned before.

        Args:
            module: layer that feeds the BatchNorm.
            name: name of the layer's tensor, e.g. ``"weight"``.
            amount: fraction (float) or number (int) of the channels not yet pruned.
            bn: the BatchNorm behind the layer, with as many channels.
            paired: also mask the layer's bias and the weight and bias of ``bn``, so that the output of ``bn`` is
                exactly 0 in these channels. Without it, their output is the constant that bias and ``bn`` make of 0.

        Returns:
            The hook that is now in ``module``.

        Raises:
            TypeError: ``bn`` is not a BatchNorm, or as :meth:`Method.apply`.
            ValueError: ``bn`` has no weight or other channels than the layer, or as :meth:`Method.apply`. Both
                modules are left as they were.
        """
        target = Target.of(module, name)
        with errors_about(target.where):
            check_amount(amount)
            keep = _keep_units(bn_scores(target, bn), amount, Channel.units)
            masks = [
                (each, cls(amount, pattern.dim, pattern.groups), mask)
                for each, pattern, mask in bn_masks(target, bn, keep, paired=paired)
            ]
        warn_of_zeros({target.where: target})
        as_one(masks)
        return install(masks)[0]

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for scores ``t``, as PyTorch passes them; the largest score of a channel counts."""
        check_scores("importance_scores", t, t.shape)
        pattern = Channel(self.dim, self.groups)
        keep = _keep_units(unit_scores(t, pattern, math.inf, default_mask), self.amount, pattern.units)
        return unit_mask(keep, pattern, like(t, default_mask), default_mask)


def _keep_units(scores: Scores, amount: float, units: str) -> Tensor:
    """Return, flat and bool, which units stay when ``amount`` of the living ones go."""
    [cut] = select_smallest([scores], resolve_amount(amount, scores.count_alive(), units))
    return kept(scores, cut)
