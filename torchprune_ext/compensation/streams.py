"""One pass of a model over all its calibration data at once, stopping at each layer, with a dense and a pruned stream.

Every batch is given twice over, first half dense, second half pruned, and goes through the model as a coroutine: one
after the other runs until it reaches one of the listed layers, and when all are there, the layer is solved from what
they have brought, and all go on with the layer's new weights. So a model of any structure is treated in sequence in a
single pass, as long as its samples do not mix and all batches take the same way. What is held at a time is what the
batches need between two layers, and the moments of one layer.

A rehearsal with the first batch finds out beforehand where the samples stand in each layer's input, and refuses what
the pass could only get wrong.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from torchprune_ext._layers import Layer
from torchprune_ext._runs import Batch, Run, tree_map
from torchprune_ext.compensation.coroutines import Coroutine, hand_out
from torchprune_ext.compensation.solvers import Moments, Problem

Solution = tuple[Tensor, Tensor | None]  # the pruned stream's weight and, if it is new, bias, in the module's shapes
Solve = Callable[["Layer", Problem], Solution]
SUMMED_ROWS = 4096  # of a least squares in one product: few enough for sums in float32
SUMMED_NUMBERS = 1 << 18  # or more rows, if their inputs are no more numbers than the cache holds
MIXED = (
    "Samples may not mix, and every tensor of a batch whose first axis is as long as the batch, here {size}, counts as "
    "one entry per sample. If one is something else, choose another batch size or pass prepare=."
)


class Pass:
    """One pass over the data that solves ``layers`` one after the other."""

    def __init__(self, run: Run, layers: Sequence[Layer], solve: Solve) -> None:
        self.run, self.layers, self.solve = run, layers, solve
        self.solved: dict[Layer, Solution] = {}
        self.axes: dict[Layer, int] = {}  # on which the samples stand in each layer's input
        self.kept: list[tuple[dict[str, Any], str]] = []  # where modules keep tensors while a batch goes through
        self.held: dict[Coroutine, list[Any]] = {}

    def over(self, batches: Sequence[Batch], masks: Sequence[Tensor | None]) -> None:
        """Go through the model with all ``batches``; ``solved`` then holds the new weights of all layers.

        Args:
            batches: the data.
            masks: for each batch which samples, or rows of samples, count: ``(samples, ...)``; None for all.
        """
        for batch, mask in zip(batches, masks, strict=True):
            if mask is not None and mask.shape[:1] != (batch.size,):
                raise ValueError(
                    f"sample_mask gave shape {tuple(mask.shape)} for a batch of {batch.size} samples. Let it return "
                    "one value for each sample, (samples,), or for each token, (samples, tokens)."
                )
        with torch.no_grad():
            self._rehearse(batches[0])
            device = self.run.tensors[0].device.type
            calls = [Coroutine(partial(self.run.output, _joined(batch, lambda t: t)), device) for batch in batches]
            try:
                with self._instead_of_forward(self._reach), torch.autocast(device, enabled=False):
                    while self._next(calls, batches, masks):
                        pass
            finally:
                for call in calls:
                    call.close()

    def _next(self, calls: Sequence[Coroutine], batches: Sequence[Batch], masks: Sequence[Tensor | None]) -> bool:
        """Let all batches go on to the next layer and solve it; return False if they have come to the end instead."""
        layer, moments = None, Moments()
        for call, batch, mask in zip(calls, batches, masks, strict=True):
            with self._keeping(call):
                stop: tuple[Layer, Tensor, Tensor] | None = call.resume()
            reached = None if stop is None else stop[0]
            if call is calls[0]:
                layer = reached
            if reached is not layer or layer in self.solved:
                raise self._other_way()
            if stop is not None:
                _bring(moments, *stop, batch, mask)
        if layer is None and len(self.solved) < len(self.layers):
            raise self._other_way()
        if layer is not None:
            self.solved[layer] = self._solution(layer, moments)
        return layer is not None

    @contextmanager
    def _instead_of_forward(self, stand_in: Callable[..., Tensor]) -> Iterator[None]:
        """Let ``stand_in(layer, ...)`` be called in place of each layer's forward."""
        plain = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda function: function
        for layer in self.layers:
            layer.module.forward = plain(lambda *args, layer=layer, **kwargs: stand_in(layer, *args, **kwargs))
        try:
            yield
        finally:
            for layer in self.layers:
                vars(layer.module).pop("forward", None)

    # --- the rehearsal

    def _rehearse(self, batch: Batch) -> None:
        """See what reaches the layers, once with ``batch`` and once with its first sample over and over behind it."""
        before = [(vars(module), dict(vars(module))) for module in self.run.model.modules()]
        once = self._seen(batch.inputs)
        try:
            twice = self._seen(_joined(batch, lambda t: t[:1].expand_as(t)))
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"loader: the model fails on a batch that is given twice over. {MIXED.format(size=batch.size)}"
            ) from error
        for layer in self.layers:
            if layer not in once:
                raise ValueError(
                    f"params holds {layer.label}, whose module is never called, as when its parent reads the weight. "
                    "Leave it out."
                )
            self.axes[layer] = self._sample_axis(layer, batch.size, once[layer], twice.get(layer))
        for table, old in before:
            changed = [key for key, value in table.items() if isinstance(value, Tensor) and value is not old.get(key)]
            self.kept += [(table, key) for key in changed]

    def _seen(self, inputs: Any) -> dict[Layer, tuple[torch.Size, Tensor]]:
        """Return the shape of each layer's input when the model gets ``inputs``, and a mixture of its last axis."""
        found: dict[Layer, tuple[torch.Size, Tensor]] = {}

        def look(layer: Layer, *args: Any, **kwargs: Any) -> Tensor:
            x = layer.input(args, kwargs)
            if layer in found:
                raise ValueError(f"{layer.label} is called more than once in a pass. Leave it out.")
            y: Tensor = layer.original(x)
            with torch.autocast(x.device.type, enabled=False):
                layer.check(x)
                mixed = x.detach().to(torch.promote_types(x.dtype, torch.float32))
                found[layer] = x.shape, mixed @ torch.ones_like(mixed[(0,) * (x.dim() - 1)]).cumsum(0).sin()
            return y

        with self._instead_of_forward(look):
            self.run.output(inputs)
        return found

    def _sample_axis(
        self, layer: Layer, size: int, once: tuple[torch.Size, Tensor], twice: tuple[torch.Size, Tensor] | None
    ) -> int:
        """Return the axis of a layer's input on which the ``size`` samples stand, or rows of them one after another."""
        (shape, plain), (longer, other) = once, twice or (torch.Size(), once[1])
        grown = [axis for axis, pair in enumerate(zip(shape, longer, strict=False)) if pair[0] != pair[1]]
        if len(shape) == len(longer) and len(grown) == 1 and longer[grown[0]] == 2 * shape[grown[0]]:
            [axis] = grown
            last = 0 if isinstance(layer.module, _ConvNd) else len(shape) - 2
            if axis <= last and shape[axis] % size == 0:
                first = plain.narrow(axis, 0, shape[axis] // size)
                expected = torch.cat([plain, *[first] * size], axis)
                most = float(expected.nan_to_num(0, 0, 0).abs().max())
                if torch.allclose(other, expected, rtol=1e-2, atol=1e-2 * most, equal_nan=True):
                    return axis
        raise ValueError(
            f"{layer.label} gets an input of shape {tuple(shape)} in which a sample's rows depend on other samples or "
            f"do not stand together. {MIXED.format(size=size)} Otherwise leave the layer out."
        )

    # --- the pass

    def _reach(self, layer: Layer, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for the layer's forward: hand out what it gets and gives, and go on when it is solved."""
        x, axis = layer.input(args, kwargs), self.axes[layer]
        if x.dim() <= axis or x.shape[axis] % 2:
            raise self._other_way()
        dense, pruned = x.chunk(2, axis)
        y = layer.forward(dense, layer.dense, layer.dense_bias)
        hand_out((layer, pruned.detach().movedim(axis, 0), y.detach().movedim(axis, 0)))
        weight, bias = self.solved[layer]
        return torch.cat((y, layer.forward(pruned, weight, layer.bias_now if bias is None else bias)), axis)

    @contextmanager
    def _keeping(self, call: Coroutine) -> Iterator[None]:
        """Let modules hold the tensors that they held when ``call`` stopped, and note those of its next stop."""
        for (table, key), value in zip(self.kept, self.held.get(call, ()), strict=False):
            table[key] = value
        yield
        self.held[call] = [table.get(key) for table, key in self.kept]

    def _solution(self, layer: Layer, moments: Moments) -> Solution:
        if not moments.count:
            raise ValueError("sample_mask leaves out every sample. Let it be True where a sample counts.")
        if not all(total.isfinite().all() for total in moments.sums):
            raise ValueError(
                f"{layer.label} gets inputs, or gives outputs, that hold NaN or infinity or have squares beyond the "
                "range of their dtype. Check the data, or leave such samples out by sample_mask=."
            )
        return self.solve(layer, moments.problem(None if layer.bias else layer.bias_rows()))

    def _other_way(self) -> ValueError:
        return ValueError("loader: batches take different ways through the model. Pass such that call the same layers.")


def _joined(batch: Batch, other: Callable[[Tensor], Tensor]) -> Any:
    """Return the inputs of ``batch`` with ``other`` of them behind, as more samples."""
    return tree_map(lambda t: torch.cat((t, other(t))) if t.dim() and len(t) == batch.size else t, batch.inputs)


def _bring(moments: Moments, layer: Layer, x: Tensor, y: Tensor, batch: Batch, mask: Tensor | None) -> None:
    """Add the pruned stream's inputs ``x`` and the dense outputs ``y``, samples first, to the moments."""
    each = layer.outputs(y[:1]).shape[1]  # rows of the least squares for one entry of the first axis
    keep = None if mask is None else _rows_that_count(mask, layer, len(y) * each // batch.size)
    step = max(max(SUMMED_ROWS, SUMMED_NUMBERS // layer.dense[0].numel()) // each, 1)
    for start in range(0, len(x), step):
        inputs, outputs = layer.inputs(x[start : start + step]), layer.outputs(y[start : start + step])
        if keep is not None:
            some = keep[start * each : (start + step) * each]
            inputs, outputs = inputs[:, some], outputs[:, some]
        moments.add(inputs, outputs)


def _rows_that_count(mask: Tensor, layer: Layer, each: int) -> Tensor:
    """Return which of all rows count, of which there are ``each`` for a sample."""
    mask = mask.flatten(1) if mask.dim() > 1 else mask.unsqueeze(1)
    if each == 1:
        mask = mask.any(1)
    elif mask.shape[1] == 1:
        mask = mask.expand(-1, each)
    elif mask.shape[1] != each:
        raise ValueError(
            f"sample_mask gave {mask.shape[1]} values for each sample, of which {layer.label} sees {each} rows. "
            "Let it return one for each sample, or leave the layer out."
        )
    return mask.reshape(-1).to(layer.dense.device)
