"""Scores of a network that has not been trained yet."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import Unpack

from torchprune_ext._batches import leaves, tree_map
from torchprune_ext._checks import check_fraction, check_whole
from torchprune_ext._host import targets_of
from torchprune_ext._runs import (
    Key,
    LossFn,
    Options,
    add,
    calibrating,
)
from torchprune_ext._statistics import ImportanceScores
from torchprune_ext.masks import identity
from torchprune_ext.schedules import geometric_mean
from torchprune_ext.selection import Scores, kept, select_smallest


def snip(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> ImportanceScores:
    r"""Return the connection sensitivity of each weight, :math:`|g_j w_j| / \sum_k |g_k w_k|`, before training.

    The gradient is that of the loss over all batches given (the paper takes one). The sum runs over all listed tensors.

    Args:
        model: a freshly initialized module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`; ``max_batches=1`` is the paper's choice.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores that sum to 1 over all listed tensors, without unit; 0 where a weight is pruned.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`.

    Source: Lee, Ajanthan & Torr 2019, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*,
    arXiv:1810.02340, equation 6.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 0.5)
        >>> snip(layer, lambda out, _: out.mean(), [(torch.tensor([[1.0, -3.0]]), None)], [(layer, "weight")])
        {(Linear(in_features=2, out_features=1, bias=False), 'weight'): tensor([[0.2500, 0.7500]])}
    """
    with calibrating(model, params, options, loss_fn) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "snip"):
            add(sums, run.grads(run.loss(batch)), batch.size)
            count += batch.size
        weights = [tensor.detach() for tensor in run.tensors]
    gradient = run.mean(sums, count)
    run.refuse_zeros(gradient)
    scores = [(g * w).abs() for g, w in zip(gradient.values(), weights, strict=True)]
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores)
    return ImportanceScores(
        {key: score / total if total else score for key, score in zip(run.keys, scores, strict=True)}
    )


def grasp(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> ImportanceScores:
    r"""Return how much each weight preserves the gradient flow, :math:`w_j (Hg)_j` shifted to be >= 0.

    Removing a weight changes the squared norm of the gradient by about :math:`-2 w_j (Hg)_j`; the paper removes the
    weights with the largest :math:`-w_j (Hg)_j`, so those with the smallest score here. The gradient and the Hessian
    are those of the mean loss over all batches given, which takes two passes over the loader. Keeps the graph of the
    gradient, about the memory of a second training step, and two tensors per parameter.

    Args:
        model: a freshly initialized module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches that can be gone through twice, such as a list or a ``DataLoader`` without shuffling.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores from which the smallest of all listed tensors is subtracted, so that they are >= 0; in squared units of
        the loss per squared unit of weight.

    Raises:
        TypeError: ``loader`` is an iterator, which can be gone through once, or as :func:`gradients`.
        ValueError: as :func:`gradients`.

    Source: Wang, Zhang & Grosse 2020, *Picking Winning Tickets Before Training by Preserving Gradient Flow*,
    arXiv:2002.07376, equation 8.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]  # g = 6 x, H = 2 x x', so w * Hg = 60 x
        >>> grasp(layer, nn.functional.mse_loss, data, [(layer, "weight")])[layer, "weight"]
        tensor([[ 0., 60.]])
    """
    with calibrating(model, params, options, loss_fn) as run:
        if isinstance(loader, Iterator):
            raise TypeError("loader is an iterator, but grasp reads the data twice. Pass a list or a DataLoader.")
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "grasp, gradient"):
            add(sums, run.grads(run.loss(batch)), batch.size)
            count += batch.size
    gradient = run.mean(sums, count)
    run.refuse_zeros(gradient)
    with calibrating(model, run.keys, options, loss_fn) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "grasp, Hessian"):
            grads = run.differentiable_grads(batch)
            pairs = dict(zip(run.names, zip(grads, gradient.values(), strict=True), strict=True))  # tied ones once
            inner = torch.stack([(g * fixed.to(g)).sum() for g, fixed in pairs.values()]).sum()
            if inner.requires_grad:
                products = torch.autograd.grad(inner, run.tensors, allow_unused=True, materialize_grads=True)
                add(sums, list(products), batch.size)
            count += batch.size
        weights = [tensor.detach() for tensor in run.tensors]
    scores = [h * w for h, w in zip(run.mean(sums, count).values(), weights, strict=True)]
    least = min(float(score.min()) for score in scores if score.numel())
    return ImportanceScores({key: score - least for key, score in zip(run.keys, scores, strict=True)})


def synflow(
    model: nn.Module,
    example_inputs: Any,
    params: Iterable[Key],
    *,
    target_sparsity: float,
    steps: int = 100,
) -> ImportanceScores:
    r"""Return iterative synaptic flow scores, which need no data and collapse no layer.

    With all parameters replaced by their absolute values and an input of ones, the sum :math:`R` of the outputs counts
    the paths through the network, and :math:`w \odot \partial R / \partial w` says how much of it goes through each
    weight. In ``steps`` rounds the kept fraction falls geometrically to ``1 - target_sparsity``, and the scores of what
    is left are computed anew in each. The result ranks all weights by the round in which they went, so one global call
    with the same ``target_sparsity`` prunes as the iteration did. In float64, and so about five times the size of the
    listed tensors.

    Args:
        model: any module whose output is a tensor, with or without training; runs in eval mode, in float64.
        example_inputs: tensor, or tuple of tensors, of the shapes that the model takes; only the shapes count.
        params: ``(module, name)`` pairs within ``model``.
        target_sparsity: fraction of the listed entries that shall be pruned in the end, what is pruned already counted
            in.
        steps: number of rounds.

    Returns:
        Scores in [0, steps + 1] without unit, namely how many rounds a weight survived, and behind the point its share
        of the flow in the last of them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``target_sparsity`` is not a fraction, or the output does not depend on one of the tensors.

    Source: Tanaka, Kunin, Yamins & Ganguli 2020, *Pruning neural networks without any data by iteratively conserving
    synaptic flow*, arXiv:2006.05467, algorithm 1.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[3.0, -0.5]]))
        >>> params = [(layer[0], "weight"), (layer[1], "weight")]
        >>> scores = synflow(layer, torch.zeros(1, 2), params, target_sparsity=0.3, steps=1)
        >>> scores[params[0]].argmin()
        tensor(1)
    """
    check_fraction("target_sparsity", target_sparsity)
    check_whole("steps", steps, 1)
    targets = list(targets_of(params).values())
    with calibrating(model, [(target.module, target.name) for target in targets], {}) as run:
        constants = {name: tensor.detach().double().abs() for name, tensor in model.named_parameters()}
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():  # a shift by a mean would let flows cancel
                constants[name] = buffer.double() * (not name.endswith("running_mean"))
        ones = tree_map(
            lambda leaf: torch.ones_like(leaf, dtype=torch.float64) if leaf.is_floating_point() else leaf,
            example_inputs,
        )
        arguments = tuple(ones) if isinstance(ones, (tuple, list)) else (ones,)
        unique = dict(zip(run.names, targets, strict=True))  # tied tensors count once
        alive = [torch.ones_like(target.parameter, dtype=torch.bool) for target in unique.values()]
        alive = [a if t.mask is None else t.mask != 0 for a, t in zip(alive, unique.values(), strict=True)]
        total = sum(mask.numel() for mask in alive)
        ranks = [torch.zeros_like(mask, dtype=torch.float64) for mask in alive]
        for step in range(1, steps + 2):  # the last round ranks what survives
            tensors = [(constants[n] * mask).requires_grad_() for n, mask in zip(unique, alive, strict=True)]
            output = functional_call(model, constants | dict(zip(unique, tensors, strict=True)), arguments)
            flow = torch.stack([leaf.sum() for leaf in leaves(output)]).sum()
            grads = run.grads(flow, tensors)
            scores = [(t * g).abs().detach() for t, g in zip(tensors, grads, strict=True)]
            parts = [Scores.of(identity, score, alive=mask) for score, mask in zip(scores, alive, strict=True)]
            left = sum(part.count_alive() for part in parts)
            gone = 1 - geometric_mean(1.0, 1 - target_sparsity, step / steps) if step < steps else target_sparsity
            keep = total - round(total * gone) if step <= steps else 0
            cuts = select_smallest(parts, max(left - keep, 0))
            stay = [kept(part, cut).view(m.shape) for part, cut, m in zip(parts, cuts, alive, strict=True)]
            largest = max((float(score.max()) for score in scores if score.numel()), default=0.0) or 1.0
            for rank, score, before, after in zip(ranks, scores, alive, stay, strict=True):
                rank += (before & ~after) * (step - 1 + score / (2 * largest))
            alive = stay
    by_name = dict(zip(unique, ranks, strict=True))
    return ImportanceScores({key: by_name[name] for key, name in zip(run.keys, run.names, strict=True)})
