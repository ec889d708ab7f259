"""Methods that judge single entries."""

import math
import numbers

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext import criteria
from torchprune_ext._checks import (
    check_amount,
    check_finite,
    check_scores,
    check_whole,
    errors_about,
    resolve_amount,
    warn,
)
from torchprune_ext._host import Target
from torchprune_ext._scoring import gradient_scores, obd_scores
from torchprune_ext.masks import (
    entry_mask,
    every_other_mask,
    finish,
    identity,
    threshold_mask,
)
from torchprune_ext.methods.base import Method, like
from torchprune_ext.selection import Scores, select_smallest

__all__ = ["EveryOther", "GradientMagnitude", "OBDSaliency", "Threshold"]


class _Entries(Method):
    """Drop the entries of smallest score; subclasses say where the scores come from."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return the mask for scores ``t``, as PyTorch passes them: finite and >= 0."""
        try:
            check_scores("importance_scores", t, t.shape)
        except ValueError as error:
            name = type(self).__name__
            raise ValueError(f"{error} ({name} cannot rank plain weights: pass importance_scores.)") from error
        return self._drop(Scores.of(identity, t, alive=default_mask), like(t, default_mask))

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
        TypeError: ``amount`` is not a number.
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
        TypeError: ``amount`` is not a number.
        ValueError: ``amount`` is out of range.

    Source: LeCun, Denker & Solla 1989, *Optimal Brain Damage*; see :func:`torchprune_ext.criteria.obd_saliency`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
        >>> _ = OBDSaliency.apply(layer, "weight", 0.5, hessian_diag=torch.tensor([[3.0, 0.1, -5.0, 2.0]]))
        >>> layer.weight_mask
        tensor([[1., 0., 0., 1.]])
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, *, hessian_diag: Tensor
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
        TypeError: ``threshold`` is not a number.
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
        return threshold_mask(scores, float(self.threshold), like(t, default_mask))

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
        TypeError: ``step`` or ``offset`` is not an int.
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
        return every_other_mask(self.step, self.offset, like(t, default_mask), default_mask)

    def _mask(self, target: Target, importance_scores: Tensor | None) -> Tensor:
        return finish(self.compute_mask(target.parameter.detach(), target.mask), target.parameter)
