"""Estimate BatchNorm's running statistics anew, over data, exactly as eval mode uses them.

Pruning changes what reaches a BatchNorm, but not the mean and variance by which it normalizes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Unpack

from torchprune_ext._batches import Batch, check_mask, mask_rows
from torchprune_ext._checks import check_module, warn
from torchprune_ext._fingerprints import agree_on_values
from torchprune_ext._loading import Options, PassOptions, taken, with_progress, without_offload
from torchprune_ext._ranks import Ranks
from torchprune_ext._rows import find_sample_axes
from torchprune_ext._runs import Run, calibrating, refuse_lazy, wide
from torchprune_ext.compensation.attributes import Attributes
from torchprune_ext.compensation.blocks import OTHER_WAY, replaced, side_by_side
from torchprune_ext.compensation.coroutines import Call, hand_out

Statistics = dict[nn.Module, tuple[Tensor, Tensor]]


def recalibrate_bn(model: nn.Module, loader: Iterable[Any], **options: Unpack[PassOptions]) -> None:
    r"""Set the running mean and variance of every BatchNorm to those of what reaches it in eval mode, over all data.

    One BatchNorm after the other, in the order in which the model calls them, each behind those that are set already.
    So the statistics are those of the data that the model will see there when it is used, whatever the batches are cut
    into: a mean over samples and positions, :math:`\mu = \frac{1}{n} \sum_i x_i`, and the variance
    :math:`\frac{1}{n-1} \sum_i (x_i - \mu)^2`, as PyTorch's.

    :func:`torch.optim.swa_utils.update_bn` differs: it is in train mode, so that dropout is on, every layer sees what
    was normalized by the statistics of its own batch, a last batch of 2 samples counts as much as one of 200, and how
    the samples vary from batch to batch is lost.

    Everything else stays as it is, weights, momentum, modes; ``num_batches_tracked`` is the number of batches.

    Args:
        model: any module with BatchNorm layers, pruned or not. Those with ``track_running_stats=False``, which use the
            statistics of each batch, are left alone, and so are those that are not called in eval mode.
        loader: batches as for :mod:`torchprune_ext.calibration`; targets are not used. Activations of all batches are
            held between two layers: pass as much as fits, or ``offload=``. Some hundred samples do.
        **options: see :class:`.PassOptions`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no BatchNorm, or no data; a BatchNorm that is called twice in a pass, or gets a single value per
            channel, or NaN; or batches that call different ones. Nothing is changed then.

    Warns:
        UserWarning: a BatchNorm is not called in eval mode.

    Source: Wu & Johnson 2021, *Rethinking "Batch" in BatchNorm*, arXiv:2105.07576, section 3 ("PreciseBN": population
    statistics instead of a moving average), here in the sequence of the layers and not with each batch's own.

    Example:
        >>> bn = nn.BatchNorm1d(1)
        >>> recalibrate_bn(bn, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])], progress=False)
        >>> bn.running_mean, bn.running_var
        (tensor([3.]), tensor([7.]))
    """
    ranks = Ranks(options.get("process_group"))
    with ranks.together():
        check_module("model", model)
        refuse_lazy(model)
        layers = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        tracking: dict[nn.Module, str] = {
            module: name for module, name in layers.items() if module.running_mean is not None
        }
        if not tracking:
            without = f": {list(layers.values())} are of track_running_stats=False" if layers else ""
            raise ValueError(f"model has no BatchNorm with running statistics{without}. There is nothing to estimate.")
        plain, offload = without_offload(options)
        raw = taken(loader, plain)
        bar = with_progress(tracking, "recalibrate_bn", None, options.get("progress"))
    agree_on_values(ranks, model, but=[buffer for layer in tracking for buffer in layer.buffers(recurse=False)])
    quiet: Options = {**plain, "progress": False}  # the bar counts layers
    with calibrating(model, None, quiet) as run:
        with ranks.together():
            batches = list(run.batches(raw, ""))
        found = _Pass(run, tracking, offload).over(batches, bar)
        count = run.ranks.total(len(batches))
    missed = [name for layer, name in tracking.items() if layer not in found]
    if not found:
        raise ValueError(f"no BatchNorm is called in eval mode: {missed}. There is nothing to estimate.")
    if missed:
        warn(f"recalibrate_bn: {missed} are not called in eval mode, and stay as they are.")
    _write(found, count, ranks)


def _write(found: Statistics, batches: int, ranks: Ranks) -> None:
    """Write the statistics into the layers, all of them on all ranks, or none."""
    new: list[tuple[Tensor, Tensor]] = []
    for layer, (mean, variance) in found.items():
        number = torch.tensor(batches, device="cpu")
        named = {"running_mean": mean, "running_var": variance, "num_batches_tracked": number}
        new += [
            (buffer, named[name]) for name, buffer in layer._buffers.items() if name in named and buffer is not None
        ]
    old = [(buffer, buffer.clone()) for buffer, _ in new]
    with torch.inference_mode():  # buffers that were made in it can only be written in it
        try:
            with ranks.together():
                for buffer, values in new:
                    buffer.copy_(values)
        except BaseException:
            for buffer, values in old:
                buffer.copy_(values)
            raise


class _Pass:
    """One pass of all batches side by side, that stops at each BatchNorm until its statistics are known.

    Args:
        run: the open model.
        layers: the layers to set, and how errors call them.
        offload: folder for what goes from block to block; None to hold it in memory.
    """

    def __init__(self, run: Run, layers: Mapping[nn.Module, str], offload: str | None) -> None:
        self.run, self.layers, self.offload = run, layers, offload
        self.dtypes = {
            layer: buffer.dtype for layer in layers if (buffer := layer._buffers["running_mean"]) is not None
        }
        self.found: Statistics = {}
        self.axes: dict[nn.Module, list[int]] = {}
        self.attributes = Attributes(run, but=layers)

    def over(self, batches: Sequence[Batch], bar: Iterable[Any]) -> Statistics:
        """Return mean and variance of each layer that the batches reach; ``bar`` counts the layers."""
        masked = [batch for batch in batches if batch.mask is not None]
        with self.run.ranks.together(), torch.no_grad():
            for batch in masked:
                check_mask(batch.mask, batch.size)
            if masked:
                self.axes = find_sample_axes(self.run, self.layers, masked[0], dict.fromkeys(self.layers, 0))
        with side_by_side(self.run, list(self.layers), batches, self.run.device.type, self.offload) as (each, blocks):
            calls = [call for [call] in each]
            with replaced(self.layers, self._stop), blocks.standing_in():
                try:
                    for _ in chain(bar, repeat(None)):
                        if not self._next(calls, batches):
                            break
                finally:
                    self.attributes.put()
        return self.found

    def _stop(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let a layer hand out its input before it normalizes that."""
        hand_out(layer, [*args, *kwargs.values()][0].detach(), known=layer in self.found)
        return forward(*args, **kwargs)

    def _next(self, calls: Sequence[Call], batches: Sequence[Batch]) -> bool:
        """Let all batches go on to the next layer and set it; return False if they have come to the end instead."""
        ranks = self.run.ranks
        with ranks.together():
            stops: list[tuple[nn.Module, Tensor] | None] = [self._resume(call) for call in calls]
            layer = None if stops[0] is None else stops[0][0]
            if {None if stop is None else stop[0] for stop in stops} != {layer}:
                raise ValueError(OTHER_WAY)
            if layer in self.found:
                raise ValueError(
                    f"{self.layers[layer]} is called twice in a pass, so its statistics decide about what it gets. "
                    "Recalibrate the shared part by itself, on batches of all of its inputs."
                )
            moments = [self._moments(*stop, batch) for stop, batch in zip(stops, batches, strict=True) if stop]
        ranks.agree("the BatchNorm layers that data reaches", "none" if layer is None else self.layers[layer])
        if layer is None:
            return False
        self._set(layer, _Moments.total(moments, ranks))
        return True

    def _resume(self, call: Call) -> tuple[nn.Module, Tensor] | None:
        with self.attributes.of(call):
            stop: tuple[nn.Module, Tensor] | None = call.resume()
        return stop

    def _moments(self, layer: nn.Module, x: Tensor, batch: Batch) -> "_Moments":
        """Return the moments of the rows of ``x``, shape ``(samples, channels, *positions)``, that count."""
        if batch.mask is not None:
            if not self.axes[layer] or len(x) % batch.size:
                raise ValueError(
                    f"loader: {self.layers[layer]} is called differently by later batches, so that sample_mask= does "
                    "not tell which of its rows count. Leave sample_mask out."
                )
            rows = x.movedim(1, -1).reshape(-1, x.shape[1])
            x = rows[mask_rows(batch.mask, len(rows) // batch.size, self.layers[layer]).to(rows.device)]
        return _Moments.of(x)

    def _set(self, layer: nn.Module, moments: "_Moments") -> None:
        """Let the layer normalize by the statistics of ``moments``; its own buffers stay as they are."""
        name, dtype = self.layers[layer], self.dtypes[layer]
        if moments.count < 2:
            raise ValueError(
                f"{name} gets {moments.count} values for each channel, which do not have a variance. Pass more data."
            )
        mean, variance = moments.mean.to(dtype), (moments.squares / (moments.count - 1)).to(dtype)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise ValueError(
                f"{name} gets NaN or infinity, or values whose variance is beyond the range of {dtype}. Check the data."
            )
        self.found[layer] = mean, variance
        layer._buffers.update(running_mean=mean, running_var=variance)


@dataclass(slots=True)
class _Moments:
    """Count, mean and sum of squared deviations of each channel.

    Args:
        count: values for each channel.
        mean: shape ``(channels,)``, in float64.
        squares: the same.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Moments":
        """Return those of ``x``, whose axis 1 holds the channels."""
        if not x.numel():
            zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            return cls(0, zero, zero)
        axes, count = [axis for axis in range(x.dim()) if axis != 1], x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.to(wide(x.dtype)), axes, correction=0)
        return cls(count, mean.double(), variance.double() * count)

    @classmethod
    def total(cls, each: Sequence["_Moments"], ranks: Ranks) -> "_Moments":
        """Return the moments of all together, over all ranks."""
        count = ranks.total(sum(one.count for one in each))
        mean = ranks.sum(torch.stack([one.count * one.mean for one in each]).sum(0)) / max(count, 1)
        squares = [one.squares + one.count * (one.mean - mean).square() for one in each]
        return cls(count, mean, ranks.sum(torch.stack(squares).sum(0)))
