"""What scales and shifts the channels of a layer's output, as a BatchNorm in eval mode does, in two models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_ext._layers import Layer
from torchprune_ext._ranks import Ranks
from torchprune_ext._runs import wide

LEAST = 1e-3  # of the largest scale, and an output of what it is added to: less is too little to be fitted to a sum
OFF = {torch.float64: 1e-6, torch.float32: 1e-3}  # most by which scale and shift may miss a module's output
OFF_HALF = 3e-2  # the same in half precision


class Times(NamedTuple):
    """Multiplies by a number, or divides."""

    operation: Callable[[Tensor, float], Tensor]
    number: float

    @classmethod
    def of(cls, operation: Any, args: Sequence[Any], kwargs: Any) -> "Times | None":
        """Return what an ``operation`` of aten does to its first argument, None if it is something else."""
        if operation not in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor) or kwargs:
            return None
        plain = isinstance(args[0], Tensor) and isinstance(args[1], (int, float)) and not isinstance(args[1], bool)
        return cls(operation, args[1]) if plain else None

    def affine(self, layer: Layer, y: Tensor) -> "Affine":
        """Return what it does to each channel of outputs like ``y``."""
        ones = y.new_ones(channel_shape(layer, y), dtype=wide(y.dtype))
        return self.operation(ones, self.number), torch.zeros_like(ones)


Step = nn.Module | Times
Affine = tuple[Tensor, Tensor]  # by what each channel is multiplied, and what is added


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """By what the output of a layer is multiplied before it goes into a sum, each channel by its own.

    All tensors broadcast to the output, whatever axes it has before that of the channels.

    Args:
        scale: of the pruned model.
        ratio: by what the dense layer's output has to be multiplied, for both models to give the same then.
        offset: what has to be added to that.
        counts: bool, which channels are multiplied by something at all; ``ratio`` is 1 and ``offset`` 0 in the others.
    """

    scale: Tensor
    ratio: Tensor
    offset: Tensor
    counts: Tensor

    @classmethod
    def of(cls, pruned: Affine, dense: Affine) -> "Scaling":
        """Return it for the scale and shift of both models."""
        scale, shift = pruned
        finite = scale.isfinite() & shift.isfinite() & dense[0].isfinite() & dense[1].isfinite()
        sizes = torch.where(finite, scale.abs(), 0.0)
        counts = sizes > LEAST * sizes.max()
        ratio = torch.where(counts, dense[0] / scale, 1.0)
        offset = torch.where(counts, (dense[1] - shift) / scale, 0.0)
        return cls(torch.where(finite, scale, 0.0), ratio, offset, counts)

    def of_first(self, ranks: Ranks) -> "Scaling":
        """Return that of the first rank, bit for bit."""
        return Scaling(*[ranks.first(each) for each in (self.scale, self.ratio, self.offset, self.counts)])

    def own(self, y: Tensor) -> Tensor:
        """Return what the layer has to give for both models to give the same, where the dense one gives ``y``."""
        return y * self.ratio + self.offset

    def back(self, z: Tensor) -> Tensor:
        """Return what becomes ``z`` once it is multiplied; 0 in channels that do not count."""
        return torch.where(self.counts, z / self.scale, 0.0)


def channel_axis(layer: Layer, y: Tensor) -> int:
    """Return the axis of the output ``y`` of a layer on which its channels stand."""
    return 1 if layer.convolution else y.dim() - 1


def channel_shape(layer: Layer, y: Tensor) -> list[int]:
    """Return the shape of one value for each channel, which broadcasts to ``y``, and to what has more axes before."""
    axis = channel_axis(layer, y)
    return [y.shape[axis], *[1] * (y.dim() - 1 - axis)]


def composed(affine: Sequence[Affine]) -> Affine:
    """Return what one or more steps do, one after the other."""
    scale, shift = affine[0]
    for times, more in affine[1:]:
        scale, shift = scale * times, shift * times + more
    return scale, shift


def might_scale(module: nn.Module, layer: Layer, y: Tensor) -> bool:
    """Return whether ``module`` may scale the channels of a layer's output: it has a value for each, and no more."""
    tensors, channels = [*module.parameters(), *module.buffers()], y.shape[channel_axis(layer, y)]
    alone = next(module.children(), None) is None
    return alone and bool(tensors) and all(each.numel() in (1, channels) for each in tensors)


def probed(layer: Layer, forward: Callable[[Tensor], Tensor], y: Tensor) -> Affine | None:
    """Return by what ``forward`` multiplies each channel of outputs like ``y`` and what it adds, as if that were all.

    It is asked with half the largest size, which tells apart a division by that. None if it cannot be asked.
    """
    probe, axis = probe_of(y), channel_axis(layer, y)
    try:
        high, low = (z.to(wide(z.dtype)) for z in (forward(probe), forward(-probe)))
        half, shift = (each.movedim(axis, -1).flatten(0, -2)[0] for each in ((high - low) / 2, (high + low) / 2))
        shape = channel_shape(layer, y)
        return (half / probe.flatten()[0].to(half)).view(shape), shift.view(shape)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return None  # as where it needs whole batches, or gives something else than a tensor


def scales(affine: Affine, y: Tensor, z: Any) -> bool:
    """Return whether that is what made ``z`` of the output ``y`` of a layer."""
    if type(z) is not Tensor or z is y or (z.shape, z.dtype) != (y.shape, y.dtype) or not z.is_floating_point():
        return False
    scale, shift = affine
    off = (y.to(scale) * scale + shift - z.to(scale)).abs()
    return bool((off <= OFF.get(y.dtype, OFF_HALF) * largest(z)).all())


def alike(one: Affine, other: Affine, probe: Tensor, *, closely: bool = False) -> bool:
    """Return whether two scales and shifts are the same for outputs like ``probe``, ``closely`` but for rounding."""
    size = largest(probe)
    off = 8 * torch.finfo(probe.dtype).eps if closely else OFF.get(probe.dtype, OFF_HALF)
    ones, others = (torch.cat([scale.flatten() * size, shift.flatten()]) for scale, shift in (one, other))
    return ones.shape == others.shape and torch.allclose(
        ones, others, rtol=off, atol=off * largest(ones), equal_nan=True
    )


def probe_of(y: Tensor) -> Tensor:
    """Return a sample of ``y`` with half the largest size everywhere."""
    return torch.full_like(y[:1], largest(y) / 2)


def largest(y: Tensor) -> float:
    """Return the largest size in ``y``; 1 if that is 0."""
    return float(y.abs().max()) or 1.0
