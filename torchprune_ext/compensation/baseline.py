"""SparseGPT as published, the baseline."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_fraction
from torchprune_ext._layers import Layer
from torchprune_ext._runs import Key, Options
from torchprune_ext.compensation.calls import fitting_targets, prune_and_fit
from torchprune_ext.compensation.fitting import (
    Fits,
    SampleMask,
)
from torchprune_ext.compensation.solvers import (
    BLOCK,
    Problem,
    prune_columns,
)
from torchprune_ext.masks import nm_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import NM


def sparsegpt(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    amount: float | None = None,
    n: int | None = None,
    m: int | None = None,
    pad: bool = False,
    sample_mask: SampleMask | None = None,
    **options: Unpack[Options],
) -> Fits:
    """Prune as SparseGPT does: column by column, each error made up for by the columns behind it; the baseline.

    As in the paper, biases stay, and weights of inputs that are always 0 become 0.

    Args:
        model: as for :func:`compensate`, and so are ``loader`` and ``params``.
        loader: batches.
        params: ``(module, name)`` pairs.
        amount: fraction of the entries of every 128 columns of each weight that goes.
        n: instead of it, keep ``n`` of ``m`` consecutive input features or channels.
        m: group length (count); must divide the number of input features or channels unless ``pad`` is set.
        pad: let a short last group count as filled up with zeros.
        sample_mask: which samples count.
        **options: see :class:`.Options`, without ``process_group``.

    Returns:
        The error of each layer before and after, as :class:`Fit`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`compensate`, or an argument out of range. Nothing is changed then.

    Source: Frantar & Alistarh 2023, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
    arXiv:2301.00774.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> layer = nn.Linear(8, 4)
        >>> fits = tpe.sparsegpt(layer, [(torch.randn(64, 8), None)], [(layer, "weight")], n=2, m=4, progress=False)
        >>> int(layer.weight_mask.sum())
        16
    """
    if (amount is None) == (n is None) or (n is None) != (m is None):
        raise TypeError(f"amount={amount!r}, n={n!r}, m={m!r}: pass either amount, or n and m.")
    pattern = None if n is None or m is None else NM(n, m, dim=1, pad=pad)
    if amount is not None:
        check_fraction("amount", amount)

    def decide(layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        if pattern is not None:
            pattern.axis(layer.dense.mT.shape if layer.swapped else layer.dense.shape)
        order = layer.input_order(1 if pattern is None else pattern.m)
        real, width = order < weight.shape[-1], BLOCK if pattern is None else pattern.m
        weight, alive, gram = (F.pad(t, (0, 1)) for t in (weight * alive, alive, problem.gram.to(weight.dtype)))
        for group, moments in enumerate(F.pad(gram, (0, 0, 0, 1))):
            left = alive[group][:, order]

            def choose(scores: Tensor, start: int, left: Tensor = left) -> Tensor:
                there = left[:, start : start + scores.shape[1]]
                if pattern is not None:
                    return nm_mask(scores, pattern, there)
                keep = scores.numel() - round((amount or 0.0) * scores.numel())
                flat = scores.reshape(1, -1), there.reshape(1, -1)
                return nm_mask(flat[0], NM(keep, scores.numel()), flat[1]).view_as(scores) if keep else there * 0

            found, mask = prune_columns(moments[order][:, order], weight[group][:, order], width, choose)
            weight[group][:, order[real]], alive[group][:, order[real]] = found[:, real], mask[:, real]
        return weight[..., :-1], alive[..., :-1]

    asked = {"amount": amount} if pattern is None else {"n": n, "m": m, "pad": pad}
    targets = fitting_targets(model, params)
    biases_stay = [False] * len(targets)
    return prune_and_fit(
        model, loader, targets, decide, lambda _: GlobalPruning("sparsegpt", **asked), sample_mask, biases_stay, options
    )
