"""What every pruning method of this package is, and the history entry of calls over many tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext._checks import (
    check_finite,
    check_scores,
    errors_about,
)
from torchprune_ext._host import Target, install, told, warn_of_zeros
from torchprune_ext.masks import (
    finish,
)

__all__ = ["GlobalPruning", "Method"]


class Method(BasePruningMethod):
    """What all methods of this package share: a readable history, and ``apply`` in terms of ``compute_mask``.

    An instance is what stays in the module as its hook or in its ``PruningContainer``, so it holds the arguments that
    tell what was done, and never a tensor.
    """

    def __repr__(self) -> str:
        """Return the call that made this, e.g. ``KernelLn(amount=0.3, n=2)``."""
        shown = {key: value for key, value in vars(self).items() if key[0] != "_" and key != "apply_mask"}
        return told(type(self).__name__, shown)  # apply_mask is that of a frozen scope

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
            TypeError: not a module, not a real floating point tensor, or an argument of the wrong type.
            ValueError: any other wrong argument, scores or weights that are not finite. The module is left exactly as
                it was.
        """
        target = Target.of(module, name)
        with errors_about(target.where):
            method = cls(*args, **kwargs)
            mask = method._mask(target, importance_scores)
        if importance_scores is not None:
            vars(method)["importance_scores"] = ...  # for the history
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
        if hasattr(self, "amount"):  # of what is not pruned yet
            warn_of_zeros({target.where: target})
        return install([(target, self, mask)])[0]


class GlobalPruning(Method):
    """History entry of a global call: its name and arguments, e.g. ``global_unstructured(amount=0.8, min_keep=1)``.

    The mask came from a budget over many tensors, so one tensor alone cannot repeat it: driven by the host, this
    method keeps the mask that is there.

    Args:
        call: name of the function.
        **arguments: its arguments, with ``...`` in the place of tensors.
    """

    PRUNING_TYPE = "global"

    def __init__(self, call: str, **arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __repr__(self) -> str:
        """Return the call."""
        return told(self.call, self.arguments)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Return ``default_mask``."""
        return torch.ones_like(t) if default_mask is None else default_mask.clone()


def like(t: Tensor, default_mask: Tensor | None) -> Tensor:
    """Return the tensor whose dtype and memory format the new mask gets."""
    return t if default_mask is None else default_mask
