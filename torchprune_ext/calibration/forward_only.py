"""Scores that need no loss: what reaches a weight, and the random baseline."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import Unpack

from torchprune_ext._batches import Batch, check_mask, mask_rows
from torchprune_ext._checks import check_generator, leave_out, warn
from torchprune_ext._host import Target, targets_of
from torchprune_ext._layers import Layer, Multiply
from torchprune_ext._loading import Options
from torchprune_ext._reduction import is_of_torch
from torchprune_ext._rows import find_sample_axes, hooked
from torchprune_ext._runs import calibrating, wide
from torchprune_ext._statistics import ImportanceScores, Key


def activations(
    model: nn.Module, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> ImportanceScores:
    r"""Return the size of each weight times that of what it multiplies, :math:`|w_{ij}| \cdot \|x_j\|_2`.

    The norm of an input feature (``Linear``) or input channel (convolution) is taken over all samples, positions and
    tokens. Wanda compares these scores within each output row: pass them as ``importance_scores`` to
    ``nm_structured(layer, "weight", n=kept, m=inputs)``, or with ``n=2, m=4``.

    Args:
        model: any module; runs in eval mode.
        loader: batches, see :class:`.Options`; targets are not used, and bare tensors do.
        params: ``(module, name)`` pairs of the weights of ``Linear`` layers, convolutions, and modules of other types
            that multiply as ``Linear`` does, as ``Conv1D`` of the transformers library with its
            ``(inputs, outputs)``; a probe tells, also of a subclass of ``Linear`` with a forward of its own.
        **options: see :class:`.Options`. ``sample_mask`` leaves padding out, which counts otherwise.

    Returns:
        Scores in units of the layer's output.

    Raises:
        TypeError: a layer of another type.
        ValueError: no data, or a layer that got none, as ``out_proj`` of ``MultiheadAttention``, whose parent reads
            the weight, or an expert that no token is routed to; or a mask where samples mix.

    Warns:
        UserWarning: a layer saw fewer rows than it has inputs, or nothing but zeros.

    Source: Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*, arXiv:2306.11695,
    equation 1.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, -2.0)
        >>> activations(layer, [(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), None)], [(layer, "weight")])[layer, "weight"]
        tensor([[10.,  2.]])
    """
    with calibrating(model, params, options) as run:
        watched = {key: _Inputs(Target.of(*key), label) for key, label in zip(run.keys, run.names, strict=True)}
        labels = {module: label for (module, _), label in zip(run.keys, run.names, strict=True)}
        last = {module: 0 if isinstance(module, _ConvNd) else -2 for module in labels}
        axes: dict[nn.Module, list[int]] | None = None
        calls: Counter[nn.Module] = Counter()
        batch: Batch | None = None

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for (owner, _), inputs in watched.items():
                if owner is module:
                    place = calls[module]
                    inputs.add(args, kwargs, batch, None if axes is None else axes[module][place : place + 1])
            calls[module] += 1

        with torch.no_grad():
            for batch in run.batches(loader, "activations"):
                if batch.mask is not None:
                    check_mask(batch.mask, batch.size)
                    axes = axes or find_sample_axes(run, labels, batch, last)
                calls.clear()
                with hooked(labels, watch):
                    run.output(batch.inputs)
        weights = [tensor.detach() for tensor in run.tensors]
        sums = [inputs.like(weight) for inputs, weight in zip(watched.values(), weights, strict=True)]
        rows = [inputs.rows for inputs in watched.values()]
    norms = run.mean(sums, 1 / run.ranks.size)
    for (key, norm), name, count, weight in zip(
        norms.items(), run.names, run.ranks.totals(*rows), weights, strict=True
    ):
        _check_rows(name, count, watched[key].width, dead=bool(weight.any() and not norm.any()))
    return ImportanceScores({key: w.abs() * norms[key].sqrt() for key, w in zip(run.keys, weights, strict=True)})


def _check_rows(name: str, rows: int, width: int, *, dead: bool) -> None:
    """Refuse a layer that saw no data, and warn of one that saw little or nothing but zeros."""
    if not rows:
        raise ValueError(
            f"params holds {name}, which no data reached: its module is never called, as when its parent reads the "
            "weight, or no row came to it, as to an expert that no token is routed to, or sample_mask leaves none. "
            f"{leave_out(name)}, or pass more data."
        )
    if dead:
        warn(f"activations: all inputs of {name} are 0, so all of its scores are.")
    elif rows < width:
        warn(f"activations: {name} saw {rows} rows of data, fewer than its {width} inputs. Pass more data.")


class _Inputs:
    """What reaches one weight: the sum of squares of each of its inputs, and over how many rows."""

    def __init__(self, target: Target, label: str) -> None:
        self.module, self.label, weight = target.module, label, target.parameter.detach()
        if weight.dim() < 2:
            raise TypeError(
                f"params holds {target.where}, but only the weights of Linear layers and convolutions, and of what "
                "multiplies as Linear does, have inputs to measure. Leave it out."
            )
        self.rows, self.width, self.squares = 0, 0, torch.zeros((), device="cpu")
        self.conv = 1 - weight.dim() if isinstance(target.module, _ConvNd) else None  # the axis of its channels
        known = isinstance(target.module, (nn.Linear, _ConvNd)) and is_of_torch(target.module)
        self.probed = None if known else Layer(target.module, target.name, label)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch | None, axis: list[int] | None) -> None:
        """Add the input of a call.

        Args:
            args: of the call.
            kwargs: of the call.
            batch: the batch that goes through the model.
            axis: the axis of its samples in the input, if some do not count.
        """
        given = [*args, *kwargs.values()][0] if self.probed is None else self._multiplied(self.probed, args, kwargs)
        x = given.detach()
        if not self.rows and self.probed is not None and x.numel():
            with torch.autocast(x.device.type, enabled=False):
                self.probed.check(x)
        x = x.movedim(-1 if self.conv is None else self.conv, -1)
        if axis is not None and batch is not None and batch.mask is not None:
            x = self._counting(x, batch.mask, axis)
        x = x.reshape(-1, x.shape[-1])
        found = x.to(wide(x.dtype)).square().sum(0)
        self.squares = found if not self.width else self.squares + found
        self.rows, self.width = self.rows + len(x), x.shape[-1]

    def _multiplied(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return what the weight multiplies in a call of a layer that may do more around it."""
        found: list[Tensor] = []

        def product(x: Tensor, multiply: Multiply) -> Tensor:
            found.append(x)
            return multiply() if layer.convolution else x  # what is around a convolution goes on with its output

        layer.call(product, *args, **kwargs)
        return torch.cat(found)

    def _counting(self, x: Tensor, mask: Tensor, axis: list[int]) -> Tensor:
        """Return the rows of ``x``, whose last axis holds the features, that count."""
        if not axis or x.shape[axis[0]] % len(mask):
            raise ValueError(
                f"loader: {self.label} is called differently by later batches, so that sample_mask= does not "
                "tell which of its rows count. Leave the layer out."
            )
        rows = x.movedim(axis[0], 0).reshape(-1, x.shape[-1])
        return rows[mask_rows(mask, len(rows) // len(mask), self.label).to(rows.device)]

    def like(self, weight: Tensor) -> Tensor:
        """Return the sums in the shape of ``weight``."""
        if not self.width:
            return torch.zeros_like(weight, dtype=wide(weight.dtype))
        if self.probed is not None and self.probed.swapped:  # (inputs, outputs)
            return self.squares.unsqueeze(1).expand(weight.shape).clone()
        return _inputs_like(self.module, self.squares, weight)


def random(params: Iterable[Key], *, generator: torch.Generator | None = None) -> ImportanceScores:
    """Return random scores, the baseline that any other criterion should beat.

    Args:
        params: ``(module, name)`` pairs.
        generator: source of the numbers, on any device; by default torch's own on the CPU. With a seeded one, all
            processes of a distributed run get the same scores.

    Returns:
        Scores uniform in [0, 1).

    Raises:
        TypeError: ``params`` is not an iterable of pairs, or ``generator`` not a ``torch.Generator``.
        ValueError: a pair does not name a parameter.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> scores = random([(layer, "weight")], generator=torch.Generator().manual_seed(0))
        >>> scores[layer, "weight"].shape
        torch.Size([1, 2])
    """
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    scores = {}
    for target in targets_of(params).values():
        drawn = torch.rand(target.parameter.shape, generator=generator, device=device)
        scores[target.module, target.name] = drawn.to(target.parameter.device)
    return ImportanceScores(scores)


def _inputs_like(module: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return one value per input channel of ``module`` in the shape of ``weight``."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        per_weight = inputs.view(-1, *[1] * (weight.dim() - 1))
    else:  # (out, in / groups, *kernel): the first of the equal blocks of outputs reads the first block of inputs
        blocks = inputs.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        per_weight = blocks.view(weight.shape[0], -1, *[1] * (weight.dim() - 2))
    return per_weight.expand(weight.shape).clone()
