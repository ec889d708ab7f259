"""Scores from the gradients of the loss: of the mean, or of single samples."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from typing_extensions import Unpack

from torchprune_ext._runs import (
    Key,
    LossFn,
    Options,
    add,
    calibrating,
)
from torchprune_ext._statistics import Curvature, Gradients, ImportanceScores


def gradients(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Gradients:
    r"""Return the size of the mean gradient, :math:`|\frac1N \sum_i \partial L_i / \partial w|`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the loss per unit of weight. At a minimum they are near zero and say little.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no data, a loss that is not a finite number or a sum over samples, or a parameter that the loss
            does not depend on, or whose statistic is 0 in every entry.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, -3.0]]), None)]
        >>> scores = gradients(layer, lambda out, _: out.mean(), data, [(layer, "weight")])
        >>> scores[layer, "weight"]
        tensor([[1., 3.]])
    """
    with calibrating(model, params, options, loss_fn) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "gradients"):
            add(sums, run.grads(run.loss(batch)), batch.size)
            count += batch.size
    found = run.mean(sums, count)
    run.refuse_zeros(found)
    return Gradients({key: mean.abs_() for key, mean in found.items()})


def taylor(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    per: Literal["sample", "batch"] = "sample",
    **options: Unpack[Options],
) -> ImportanceScores:
    r"""Return the mean of the first-order estimate of deleting a weight, :math:`\frac1N \sum_i |g_i w|`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        per: take the absolute value for each ``"sample"``, or for each ``"batch"``, which is cheaper and lets samples
            of a batch cancel.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the loss; 0 where a weight is pruned, as it is 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`, ``per`` is unknown, or, per sample, the model or the loss mixes samples.

    Warns:
        UserWarning: the loss weighs samples differently, while the statistic counts them alike.

    Source: Molchanov et al. 2017, *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
    arXiv:1611.06440, equation 7, for weights instead of feature maps.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2))]
        >>> taylor(layer, lambda out, _: out.mean(), data, [(layer, "weight")])[layer, "weight"]
        tensor([[2., 4.]])
        >>> taylor(layer, lambda out, _: out.mean(), data, [(layer, "weight")], per="batch")[layer, "weight"]
        tensor([[0., 4.]])
    """
    with calibrating(model, params, options, loss_fn) as run:
        if per not in ("sample", "batch"):
            raise ValueError(f"per={per!r} is unknown. Pass 'sample' or 'batch'.")
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "taylor"):
            if per == "batch":
                grads = run.grads(run.loss(batch))
                add(sums, ((g * t).abs() for g, t in zip(grads, run.tensors, strict=True)), batch.size)
            else:
                for each in run.sample_grads(batch):
                    add(sums, ((g * t).abs().sum(0) for g, t in zip(each, run.tensors, strict=True)))
            count += batch.size
        weights = [tensor.detach() for tensor in run.tensors]
    found = run.mean(sums, count)
    run.refuse_zeros(found, weights)
    return ImportanceScores(found)


def fisher(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Curvature:
    r"""Return the diagonal of the empirical Fisher information, :math:`\frac1N \sum_i (\partial L_i / \partial w)^2`.

    Gradients are squared per sample, not per batch. Pass the result as ``hessian_diag`` to score by Fisher times
    :math:`w^2 / 2`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        A curvature in squared units of the loss per squared unit of weight.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`, or the model or the loss mixes samples.

    Warns:
        UserWarning: the loss weighs samples differently, while the statistic counts them alike.

    Source: Theis et al. 2018, *Faster Gaze Prediction with Dense Networks and Fisher Pruning*, arXiv:1801.05787.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2))]
        >>> fisher(layer, lambda out, _: out.mean(), data, [(layer, "weight")])[layer, "weight"]
        tensor([[1., 5.]])
    """
    with calibrating(model, params, options, loss_fn) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "fisher"):
            for each in run.sample_grads(batch):
                add(sums, (g.square().sum(0) for g in each))
            count += batch.size
    found = run.mean(sums, count)
    run.refuse_zeros(found)
    return Curvature(found)
