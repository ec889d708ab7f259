"""Pruning methods: one criterion bound to one pattern, as subclasses of the host's ``BasePruningMethod``.

Each class works in two ways. Its ``apply`` checks everything, computes the mask from fresh weights and only then
touches the module. Its ``compute_mask`` follows the host's protocol, for whoever drives the class through
``torch.nn.utils.prune``, e.g. ``global_unstructured(..., pruning_method=GradientMagnitude)``.
"""

import math
import numbers
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext import criteria
from torchprune_ext._checks import (
    check_amount,
    check_finite,
    check_order,
    check_scores,
    check_whole,
    errors_about,
    resolve_amount,
    warn,
)
from torchprune_ext._host import Target, install
from torchprune_ext.masks import (
    entry_mask,
    every_other_mask,
    finish,
    identity,
    nm_mask,
    threshold_mask,
    unit_mask,
    unit_scores,
)
from torchprune_ext.patterns import NM, Channel, Kernel, Vector
from torchprune_ext.scoring import bn_masks, bn_scores, gradient_scores, obd_scores
from torchprune_ext.selection import Scores, kept, select_smallest


class Method(BasePruningMethod):
    """What all methods of this package share: a readable history, and ``apply`` in terms of ``compute_mask``.

    An instance is what stays in the module as its hook or in its ``PruningContainer``, so it holds the arguments that
    tell what was done, and never a tensor.
    """

    def __repr__(self) -> str:
        """Return the call that made this, e.g. ``KernelLn(amount=0.3, n=2)``."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if key != "_tensor_name")
        return f"{type(self).__name__}({arguments})"

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> BasePruningMethod:
        """Prune tensor ``name`` of ``module`` in place, on top of what was pruned before.

        Args:
            module: module that owns the tensor.
            name: name of the tensor, e.g. ``"weight"``.
            *args: arguments of the class.
            importance_scores: scores to rank by instead of the weights; same shape, finite, >= 0.
            **kwargs: arguments of the class.

        Returns:
            The hook that is now in the module, which is this method or the ``PruningContainer`` that ends with it.

        Raises:
            TypeError: no module, no real floating point tensor, or an argument of the wrong type.
            ValueError: any other wrong argument, scores or weights that are not finite. The module is left exactly as
                it was.
        """
        target = Target.of(module, name)
        with errors_about(target.where):
            method = cls(*args, **kwargs)
            mask = method._mask(target, importance_scores)
        return method._install(target, mask)

    def _mask(self, target: Target, importance_scores: Tensor | None) -> Tensor:
        """Return the mask for ``target`` by ``importance_scores``, or by its fresh weights."""
        if importance_scores is None:
            check_finite(target.name, target.parameter)
            scores = target.parameter.detach()  # dense: what is pruned already is left out by the mask
        else:
            check_scores("importance_scores", importance_scores, target.parameter.shape)
            scores = importance_scores.detach().to(target.parameter.device)
        mask = self.compute_mask(scores, target.mask)
        return finish(mask, target.parameter)

    def _install(self, target: Target, mask: Tensor) -> BasePruningMethod:
        """Prune ``target`` with a finished mask and return its hook."""
        return install([(target, self, mask)])[0]


class _Entries(Method):
    """Drop the entries of smallest score; subclasses say where the scores come from."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for scores ``t``, as the host passes them: finite and >= 0."""
        try:
            check_scores("importance_scores", t, t.shape)
        except ValueError as error:
            name = type(self).__name__
            raise ValueError(f"{error} ({name} cannot rank plain weights: pass importance_scores.)") from error
        return self._drop(Scores.of(identity, t, alive=default_mask), _like(t, default_mask))

    def _drop(self, scores: Scores, like: Tensor) -> Tensor:
        [cut] = select_smallest([scores], resolve_amount(self.amount, scores.count_alive(), "entries"))
        return entry_mask(scores, cut, like)


class GradientMagnitude(_Entries):
    r"""Drop the entries whose loss gradient is smallest, :math:`|\partial L / \partial w|`.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the entries not yet pruned.

    Shapes: gradient, earlier mask and mask have the weight's shape, which may be any.
    Units: gradients are only ranked, so any positive scale of the loss will do. Ties keep the lower index.

    Raises:
        TypeError: ``amount`` is no number.
        ValueError: ``amount`` is out of range.

    Source: see :func:`torchprune_ext.criteria.gradient_magnitude`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> layer(torch.tensor([[1.0, -4.0, 2.0, 3.0]])).sum().backward()
        >>> _ = GradientMagnitude.apply(layer, "weight", 0.5)
        >>> layer.weight_mask
        tensor([[0., 1., 0., 1.]])
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, *, grad: Tensor | None = None
    ) -> BasePruningMethod:
        """Prune tensor ``name`` of ``module`` in place, on top of what was pruned before.

        Args:
            module: module that owns the tensor.
            name: name of the tensor, e.g. ``"weight"``.
            amount: fraction (float) or number (int) of the entries not yet pruned.
            grad: gradient to rank by, any sign; by default the one that ``backward()`` left in the parameter.

        Returns:
            The hook that is now in the module.

        Raises:
            TypeError: as :meth:`Method.apply`.
            ValueError: as :meth:`Method.apply`; also if there is no gradient. The module is left as it was.
        """
        target = Target.of(module, name)
        with errors_about(target.where):
            method = cls(amount)
            mask = method._drop(gradient_scores(target, grad), target.parameter)
        return method._install(target, mask)


class OBDSaliency(_Entries):
    r"""Drop the entries whose deletion is predicted to raise the loss least, :math:`h_{kk} w_k^2 / 2`.

    Args:
        amount: fraction (float in [0, 1]) or number (int) of the entries not yet pruned.

    Shapes: Hessian diagonal, earlier mask and mask have the weight's shape, which may be any.
    Units: saliencies are only ranked, so any positive scale of the loss will do. Ties keep the lower index; entries
        with negative curvature all score 0.

    Raises:
        TypeError: ``amount`` is no number.
        ValueError: ``amount`` is out of range.

    Source: LeCun, Denker & Solla 1989, *Optimal Brain Damage*; see :func:`torchprune_ext.criteria.obd_saliency`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> _ = OBDSaliency.apply(layer, "weight", 0.5, torch.tensor([[3.0, 0.1, -5.0, 2.0]]))
        >>> layer.weight_mask
        tensor([[1., 0., 0., 1.]])
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, hessian_diag: Tensor
    ) -> BasePruningMethod:
        """Prune tensor ``name`` of ``module`` in place, on top of what was pruned before.

        Args:
            module: module that owns the tensor.
            name: name of the tensor, e.g. ``"weight"``.
            amount: fraction (float) or number (int) of the entries not yet pruned.
            hessian_diag: second derivative of the loss with respect to each entry.

        Returns:
            The hook that is now in the module.

        Raises:
            TypeError: as :meth:`Method.apply`.
            ValueError: as :meth:`Method.apply`. The module is left as it was.
        """
        target = Target.of(module, name)
        with errors_about(target.where):
            method = cls(amount)
            mask = method._drop(obd_scores(target, hessian_diag), target.parameter)
        return method._install(target, mask)


class Threshold(Method):
    r"""Drop every entry whose score lies strictly below a threshold; :math:`|w|` is the score unless others are given.

    Args:
        threshold: least score that is kept, in the units of the scores, finite and >= 0.

    Shapes: scores, earlier mask and mask have the weight's shape, which may be any.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is negative or not finite.

    Source: Han, Pool, Tran & Dally 2015, arXiv:1506.02626, section 3: "all connections with weights below a threshold
    are removed".

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.2, -0.5, 0.04, -0.01]]))
        >>> _ = Threshold.apply(layer, "weight", 0.05)
        >>> layer.weight_mask
        tensor([[1., 1., 0., 0.]])
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold: float) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
            raise TypeError(f"threshold={threshold!r} is a {type(threshold).__name__}. Pass a number, e.g. 0.05.")
        if not 0 <= threshold < math.inf:
            raise ValueError(
                f"threshold={threshold!r} cannot be compared with scores, which are finite and >= 0. "
                "Pass a finite number >= 0."
            )
        self.threshold: float = threshold

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for weights or scores ``t``."""
        check_finite("importance_scores", t)
        scores = Scores.of(criteria.magnitude, t, alive=default_mask)
        return threshold_mask(scores, float(self.threshold), _like(t, default_mask))

    def _mask(self, target: Target, importance_scores: Tensor | None) -> Tensor:
        mask = super()._mask(target, importance_scores)
        if not mask.any() and (target.mask is None or target.mask.any()) and mask.numel():
            warn(f"{target.where}: threshold={self.threshold!r} leaves nothing of it. Choose a lower threshold.")
        return mask


class EveryOther(Method):
    """Drop every ``step``-th of the entries not yet pruned, in row-major order.

    Args:
        step: distance between dropped entries (count, >= 1); 1 drops everything behind ``offset``.
        offset: entries that come before the first that is dropped (count, >= 0).

    Shapes: earlier mask and mask have the weight's shape, which may be any; the order does not depend on how the
        tensor lies in memory.

    Raises:
        TypeError: ``step`` or ``offset`` is no int.
        ValueError: ``step`` or ``offset`` is too small.

    Source: the custom method of the pruning chapter of *datawhalechina/awesome-compression*, section 3.8.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 5)
        >>> _ = EveryOther.apply(layer, "bias")
        >>> layer.bias_mask
        tensor([0., 1., 0., 1., 0.])
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, step: int = 2, offset: int = 0) -> None:
        check_whole("step", step, 1)
        check_whole("offset", offset, 0)
        self.step, self.offset = step, offset

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, step: int = 2, offset: int = 0
    ) -> BasePruningMethod:
        """Prune tensor ``name`` of ``module`` in place; arguments of the class, errors as :meth:`Method.apply`."""
        return super().apply(module, name, step, offset)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask; of ``t`` only the shape counts."""
        return every_other_mask(self.step, self.offset, _like(t, default_mask), default_mask)

    def _mask(self, target: Target, importance_scores: Tensor | None) -> Tensor:
        return finish(self.compute_mask(target.parameter.detach(), target.mask), target.parameter)


class NMStructured(Method):
    """Keep the ``n`` entries of largest score in every ``m`` consecutive entries along ``dim``.

    Args:
        n: entries kept per group (count, ``0 < n <= m``); the sparsity is ``1 - n/m`` (fraction of the tensor).
        m: group length (count); must divide the size of ``dim`` unless ``pad`` is set.
        dim: axis that the groups run along; 1 is the reduction axis of ``Linear`` and ``Conv2d``, which is what
            hardware for 2:4 sparsity reads.
        pad: let a short last group count as filled up with zeros.

    Shapes: scores, earlier mask and mask have the weight's shape, with at least ``dim + 1`` axes.
    Units: scores are ranks within a group, so any positive scale will do. Ties keep the lower index. What is pruned
        stays pruned and the best ``n`` of what is left are kept, so repeating the call changes nothing.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no N:M pattern.

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

    def __init__(self, n: int, m: int, dim: int = 1, pad: bool = False) -> None:
        NM(n, m, dim, pad)
        self.n, self.m, self.dim, self.pad = n, m, dim, pad

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for weights or scores ``t``."""
        check_finite("importance_scores", t)
        return nm_mask(t, NM(self.n, self.m, self.dim, self.pad), default_mask)


class _Units(Method):
    """Drop the units of smallest Ln norm; subclasses say what a unit is."""

    PRUNING_TYPE = "global"  # units need the full shape, in stacked calls too

    def __init__(self, amount: float, n: float = 2) -> None:
        check_amount(amount)
        check_order(n)
        self.amount, self.n = amount, n

    def _pattern(self) -> Vector | Kernel:
        raise NotImplementedError

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for weights or scores ``t``."""
        pattern = self._pattern()
        scores = unit_scores(t, pattern, self.n, default_mask)
        keep = _keep_units(scores, self.amount, pattern.units)
        return unit_mask(keep, pattern, _like(t, default_mask), default_mask)


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
        TypeError: ``amount`` or ``n`` is no number.
        ValueError: ``amount`` is out of range.

    Source: Mao et al. 2017, *Exploring the Regularity of Sparse Structure in Convolutional Neural
    Networks*, arXiv:1705.08922, section 3.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(2, 1, 2)
        >>> _ = conv.weight.data.copy_(torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]]]]))
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
        TypeError: ``amount`` or ``n`` is no number, ``dim`` no int.
        ValueError: ``amount`` is out of range.

    Source: Mao et al. 2017, *Exploring the Regularity of Sparse Structure in Convolutional Neural
    Networks*, arXiv:1705.08922, section 3.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1.0], [-3.0, 0.0]]))
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
        TypeError: ``amount`` is no number.
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
            TypeError: ``bn`` is no BatchNorm, or as :meth:`Method.apply`.
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
        return install(masks)[0]

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for scores ``t``, as the host passes them; the largest score of a channel counts."""
        check_scores("importance_scores", t, t.shape)
        pattern = Channel(self.dim, self.groups)
        keep = _keep_units(unit_scores(t, pattern, math.inf, default_mask), self.amount, pattern.units)
        return unit_mask(keep, pattern, _like(t, default_mask), default_mask)


def _like(t: Tensor, default_mask: Tensor | None) -> Tensor:
    """Return the tensor whose dtype and memory format the new mask gets."""
    return t if default_mask is None else default_mask


def _keep_units(scores: Scores, amount: float, units: str) -> Tensor:
    """Return, flat and bool, which units stay when ``amount`` of the living ones go."""
    [cut] = select_smallest([scores], resolve_amount(amount, scores.count_alive(), units))
    return kept(scores, cut)
