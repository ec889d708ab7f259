"""Copies of a pruned model, and products of weights and masks that are up to date."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from torchprune_ext._checks import check_module
from torchprune_ext._host import product, pruned, renew

M = TypeVar("M", bound=nn.Module)


def refresh(model: M) -> M:
    """Set every pruned ``weight`` of ``model`` to ``weight_orig * weight_mask`` now, without a forward pass.

    The attribute ``weight`` is the product that the last forward pass made. After an optimizer step, loading, a change
    of dtype or device it is out of date until the next one. That matters to code that reads it without calling its
    module: an export, a quantizer, or a parent that computes with a child's weight by itself. Such a parent of your
    own can call this in a forward-pre-hook.

    Args:
        model: any module, pruned by whatever method.

    Returns:
        The model. Parameters, masks and hooks are as they were.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torchprune_ext import every_other
        >>> layer = every_other(nn.Linear(2, 1, bias=False), "weight")
        >>> _ = nn.init.constant_(layer.weight_orig, 3.0)
        >>> refresh(layer).weight.tolist()
        [[0.0, 3.0]]
    """
    check_module("model", model)
    for target in pruned(model):
        renew(target)
    return model


@contextmanager
def copyable(model: M) -> Iterator[M]:
    """Let :func:`copy.deepcopy` work on ``model`` while the scope is open, for code that calls it by itself.

    Without it, copying fails right after pruning, training or evaluation with gradients: the attribute ``weight`` is
    then the result of a computation, which cannot be copied. In the scope it is a plain tensor of the same values.
    What the copy lacks is only the way of the gradient through that attribute, up to its first forward pass.

    Args:
        model: any module, pruned by whatever method. A forward pass of it inside the scope makes it uncopyable again.

    Yields:
        The model. When the scope ends, also by an error, it holds the same tensors as before.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> from torchprune_ext import every_other
        >>> model = nn.Sequential(every_other(nn.Linear(2, 1), "weight"))
        >>> with copyable(model):
        ...     average = AveragedModel(model)
        >>> average.update_parameters(model)
    """
    check_module("model", model)
    lent = []
    try:
        for target in list(pruned(model)):
            with torch.inference_mode(False):
                plain = target.weight()
            lent.append((target, vars(target.module).get(target.name), plain))
            setattr(target.module, target.name, plain)
        yield model
    finally:
        for target, computed, plain in lent:
            if vars(target.module).get(target.name) is plain:  # else somebody has set another one meanwhile
                setattr(target.module, target.name, product(target) if computed is None else computed)


def copy_pruned(model: M) -> M:
    """Return a deep copy of ``model`` with its pruning: values, masks, hooks and their history.

    Args:
        model: any module, pruned by whatever method, or not at all.

    Returns:
        The copy, which shares no tensor with ``model``. Tied tensors are tied in it, too.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
        >>> clone = copy_pruned(model)
        >>> bool((clone[0].weight == model[0].weight).all()), clone[0].weight_mask is model[0].weight_mask
        (True, False)
    """
    with copyable(model), torch.inference_mode(False):  # a copy made in inference mode could never be trained
        clone = copy.deepcopy(model)
    return refresh(clone)
