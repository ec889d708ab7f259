"""Scores that need no loss: what reaches a weight, and the random baseline."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import Unpack

from torchprune_ext._host import targets_of
from torchprune_ext._runs import (
    Key,
    Options,
    Statistics,
    calibrating,
    wide,
)


def activations(
    model: nn.Module, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return the size of each weight times that of what it multiplies, :math:`|w_{ij}| \cdot \|x_j\|_2`.

    The norm of an input feature (``Linear``) or input channel (convolution) is taken over all samples, positions and
    tokens. Wanda compares these scores within each output row: pass them as ``importance_scores`` to
    ``nm_structured(layer, "weight", n=kept, m=inputs)``, or with ``n=2, m=4``.

    Args:
        model: any module; runs in eval mode.
        loader: batches, see :class:`.Options`; targets are not used.
        params: ``(module, name)`` pairs of the weights of ``Linear`` layers and convolutions.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the layer's output.

    Raises:
        TypeError: a layer of another type.
        ValueError: no data, or a layer that was never called, as ``out_proj`` of ``MultiheadAttention``.

    Source: Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*, arXiv:2306.11695,
    equation 1.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, -2.0)
        >>> activations(layer, [(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), None)], [(layer, "weight")])[layer, "weight"]
        tensor([[10.,  2.]])
    """
    with calibrating(model, params, options) as run:
        squares: dict[nn.Module, Tensor] = {}

        def watch(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = (inputs[0] if inputs else keywords["input"]).detach()
            axis = -module.get_parameter("weight").dim() + 1 if isinstance(module, _ConvNd) else -1
            x = x.movedim(axis, -1).flatten(0, -2)
            found = x.to(wide(x.dtype)).square().sum(0)
            squares[module] = squares[module] + found if module in squares else found

        for (module, name), tensor in zip(run.keys, run.tensors, strict=True):
            if not isinstance(module, (nn.Linear, _ConvNd)) or tensor.dim() < 2:
                raise TypeError(
                    f"params holds {type(module).__name__}.{name}, but only the weights of Linear layers and "
                    "convolutions have inputs to measure. Leave it out."
                )
        modules = dict.fromkeys(module for module, _ in run.keys)
        hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
        try:
            with torch.no_grad():
                for batch in run.batches(loader, "activations"):
                    run.output(batch.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        sums = []
        for (module, _), name, tensor in zip(run.keys, run.names, run.tensors, strict=True):
            if module not in squares:
                raise ValueError(
                    f"params holds {name}, whose module is never called, as when its parent reads the weight. "
                    "Leave it out."
                )
            sums.append(_inputs_like(module, squares[module], tensor))
        weights = [tensor.detach() for tensor in run.tensors]
    norms = run.mean(sums, 1 / run.ranks.size)
    return {key: w.abs() * norms[key].sqrt() for key, w in zip(run.keys, weights, strict=True)}


def random(params: Iterable[Key], *, generator: torch.Generator | None = None) -> Statistics:
    """Return random scores, the baseline that any other criterion should beat.

    Args:
        params: ``(module, name)`` pairs.
        generator: source of the numbers, on the CPU; by default torch's own. With a seeded one, all processes of a
            distributed run get the same scores.

    Returns:
        Scores uniform in [0, 1).

    Raises:
        TypeError: ``params`` is no iterable of pairs.
        ValueError: a pair does not name a parameter.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> scores = random([(layer, "weight")], generator=torch.Generator().manual_seed(0))
        >>> scores[layer, "weight"].shape
        torch.Size([1, 2])
    """
    return {
        (target.module, target.name): torch.rand(target.parameter.shape, generator=generator).to(
            target.parameter.device
        )
        for target in targets_of(params).values()
    }


def _inputs_like(module: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return one value per input channel of ``module`` in the shape of ``weight``."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        per_weight = inputs.view(-1, *[1] * (weight.dim() - 1))
    else:  # (out, in / groups, *kernel): the first of the equal blocks of outputs reads the first block of inputs
        blocks = inputs.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        per_weight = blocks.view(weight.shape[0], -1, *[1] * (weight.dim() - 2))
    return per_weight.expand(weight.shape).clone()
