"""One pass of a model over all its calibration data at once, stopping at each layer, dense and pruned side by side.

Every batch goes through the model twice, as two coroutines: once as the reference model, once as the pruned one. One
after the other runs until it reaches the next of the listed layers; when all are there, the layer is solved from the
inputs that it gets in both and the reference's outputs, and all go on, the pruned ones with the layer's new weights. So
a model of any structure is treated in sequence in a single pass, as long as all batches take the same way. What is held
at a time is what the batches need between two layers, and the moments of one layer.

Both are the same modules: while the reference runs, they hold the reference's tensors instead of their own. Tensors
that modules keep on themselves from one layer to a later one are swapped along.

A rehearsal with the first batch refuses what the pass could only get wrong: layers that are called twice or never, and
inputs that are random or depend on the values of the data.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch, check_mask, mask_rows
from torchprune_ext._checks import leave_out
from torchprune_ext._layers import Layer, Multiply, Solution
from torchprune_ext._rows import MIXED, Seen, sample_axis, seen
from torchprune_ext._runs import Run, wide
from torchprune_ext.compensation.attributes import Attributes
from torchprune_ext.compensation.blocks import OTHER_WAY, replaced, side_by_side
from torchprune_ext.compensation.coroutines import Call, hand_out
from torchprune_ext.compensation.residuals import Residuals, Watch
from torchprune_ext.compensation.solvers import Moments
from torchprune_ext.compensation.sources import Source

Solve = Callable[[Layer, Moments], Solution]  # the bias is None where it stays
Tables = Sequence[tuple[dict[str, Any], str, Any]]  # a table of a module, a key in it, and what to put there
SUMMED_ROWS = 4096  # of a least squares in one product: few enough for sums in float32
SUMMED_NUMBERS = 1 << 18  # or more rows, if their inputs are no more numbers than the cache holds


@dataclass(frozen=True, slots=True, eq=False)
class Passing:
    """What passes by a layer in a call.

    Args:
        x: what the layer gets.
        y: what it gives in the reference model; None in the pruned one, where that is still to be found.
        added: what the model adds to that; None if it adds nothing, or does more.
    """

    x: Tensor
    y: Any
    added: Tensor | None

    def versions(self) -> list[int]:
        """Return how often the memory of ``x`` and of what is added has been written into."""
        return [each._version for each in (self.x, self.added) if each is not None and not each.is_inference()]


class Pass:
    """One pass over the data that solves ``layers`` one after the other.

    Args:
        run: the open model.
        layers: what to solve, in any order.
        reference: what the modules hold while the reference model runs, where it is something else.
        solve: from a layer and its least squares to its new weight and bias.
        offload: folder for what goes from block to block; None to hold it in memory.
        dense_inputs: weight of a layer's inputs in the reference model, beside those in the pruned one.
        sums: fit what is added to a layer's output along with it.
    """

    def __init__(
        self,
        run: Run,
        layers: Sequence[Layer],
        reference: Tables,
        solve: Solve,
        offload: str | None = None,
        *,
        dense_inputs: float = 1.0,
        sums: bool = True,
    ) -> None:
        self.run, self.layers, self.reference, self.solve = run, layers, reference, solve
        self.offload, self.dense_inputs, self.sums = offload, dense_inputs, sums
        self.solved: dict[Layer, Solution] = {}
        self.axes: dict[Layer, int] = {}  # on which the samples stand in each layer's input, if that matters
        self.dense = False  # whether it is the reference that runs
        self.attributes = Attributes(run)
        self.residuals = Residuals(run.model, layers)
        self.followed: set[Layer] = set()  # whose input the next layer gets too, in the rehearsal
        self.before: Moments | None = None  # of the last layer, if it is one of these

    def over(self, batches: Sequence[Batch]) -> None:
        """Go through the model with all ``batches``; ``solved`` then holds the new weights of all layers."""
        with torch.no_grad():
            with self.run.ranks.together():
                for batch in batches:
                    check_mask(batch.mask, batch.size)  # which refuses a batch without samples too
                self._rehearse(batches[0], sample_axes=any(batch.mask is not None for batch in batches))
                first = batches[0].shapes()
                unlike = next((batch for batch in batches if batch.shapes() != first), None)
                if unlike is None and len(batches) > 1 and self.residuals.scaled():
                    unlike = batches[-1]  # in which the scale may be another
                if self.sums and unlike is not None:
                    with self.residuals.looking() as watch:
                        self._seen(unlike.inputs, watch=watch)
                if self.residuals.scaled():
                    self.attributes.put()  # what modules have made of their own tensors
                    with self.residuals.looking(dense=True) as watch, holding(self.reference):
                        self._seen(batches[0].inputs, watch=watch)
                    self.attributes.put()
                self.residuals.measure()
            self.residuals.agree(self.run.ranks)
            modules, device = [layer.module for layer in self.layers], self.run.tensors[0].device.type
            with (
                side_by_side(self.run, modules, batches, device, self.offload, streams=2) as (calls, blocks),
                self._instead_of_products(self._reach),
                self.residuals.taking(),
                blocks.standing_in(),
                torch.autocast(device, enabled=False),
            ):
                try:
                    while self._next(calls, batches):
                        pass
                finally:
                    self.attributes.put()

    def _next(self, calls: Sequence[Sequence[Call]], batches: Sequence[Batch]) -> bool:
        """Let all batches go on to the next layer and solve it; return False if they have come to the end instead."""
        ranks = self.run.ranks
        with ranks.together():
            reached, moments = self._advance(calls, batches)
        ranks.agree("the layers that data reaches", "none" if reached is None else reached.label)
        if reached is None:
            return False
        moments.over(ranks, reached.matrix(reached.weight))
        with ranks.together():
            weight, bias = self._solution(reached, moments, batches)
        # All ranks have solved the same, but machines may round in different ways.
        self.solved[reached] = ranks.first(weight), None if bias is None else ranks.first(bias)
        return True

    def _advance(self, calls: Sequence[Sequence[Call]], batches: Sequence[Batch]) -> tuple[Layer | None, Moments]:
        """Let all batches of this rank go on to the next layer, and return it with its moments."""
        reached, moments = None, Moments(self.before)
        for number, ((dense, pruned), batch) in enumerate(zip(calls, batches, strict=True)):
            y = self._resume(dense, dense=True)
            written = None if y is None else y[1].versions()
            x = self._resume(pruned, dense=False)
            layers = {None if stop is None else stop[0] for stop in (y, x)} | ({reached} if number else set())
            if len(layers) > 1 or (y is not None and y[0] in self.solved):
                raise ValueError(OTHER_WAY)
            if x is not None and y is not None:
                reached = x[0]
                if y[1].versions() != written:
                    raise ValueError(
                        f"{reached.label} gets its input, or what is added to its output, in memory that every call of "
                        "the model writes into, and no module holds it, so that calls cannot take turns. Let a module "
                        f"hold it, as by register_buffer. {leave_out(reached.label)}."
                    )
                self._bring(moments, reached, x[1], y[1], batch)
        if reached is None and len(self.solved) < len(self.layers):
            raise ValueError(OTHER_WAY)
        return reached, moments

    def _resume(self, call: Call, *, dense: bool) -> tuple[Layer, Passing] | None:
        """Let ``call`` go on, as the reference if ``dense``, with the tensors that modules held when it stopped."""
        self.dense = dense
        with self.attributes.of(call, watch=False), holding(self.reference) if dense else nullcontext():
            stop: tuple[Layer, Passing] | None = call.resume()
        self.residuals.forget(call)
        return stop

    def _reach(self, layer: Layer, x: Tensor, multiply: Multiply) -> Tensor:
        """Stand in for a layer's product: hand out what passes by, and go on when the layer is solved."""
        added = self.residuals.of(layer)
        if self.dense:
            y = multiply()
            given = x.detach()
            if self.attributes.written:  # into which the pruned model writes too, before this is looked at
                given, added = given.clone(), None if added is None else added.clone()
            hand_out(layer, Passing(given, y.detach(), added), known=layer in self.solved)
            return y
        hand_out(layer, Passing(x.detach(), None, added), known=layer in self.solved)
        weight, bias = self.solved[layer]
        return multiply((weight, layer.bias if bias is None else bias))

    def _instead_of_products(
        self, stand_in: Callable[[Layer, Tensor, Multiply], Tensor]
    ) -> AbstractContextManager[None]:
        """Let ``stand_in(layer, x, multiply)`` be called in place of each layer's product."""
        own = {layer.module: layer for layer in self.layers}

        def call(module: nn.Module, _: object, *args: Any, **kwargs: Any) -> Any:
            return own[module].call(partial(stand_in, own[module]), *args, **kwargs)

        return replaced(own, call)

    # --- the rehearsal

    def _rehearse(self, batch: Batch, *, sample_axes: bool) -> None:
        """See what reaches the layers, and refuse what a pass would get wrong."""
        with self.residuals.looking() if self.sums else nullcontext() as watch:
            once = self._seen(batch.inputs, watch=watch)
        for layer in self.layers:
            if layer not in once:
                raise ValueError(
                    f"params holds {layer.label}, whose module is never called on this data, as an expert that no "
                    f"token is routed to, or as when its parent reads the weight. {leave_out(layer.label)}."
                )
        again = self._seen(batch.inputs)
        for layer, (shape, rows) in once.items():
            other = again.get(layer, Seen(torch.Size(), rows))
            if shape != other.shape or not torch.allclose(rows, other.mixed, rtol=1e-3, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"{layer.label} gets another input when the model gets the same batch again, so the pruned model "
                    "cannot be compared with the dense one. Switch off what is random, as dropout that is always on."
                )
        try:
            empty = {layer: shape for layer, (shape, _) in self._seen(batch.inputs, zero=True).items()}
        except (RuntimeError, IndexError, ValueError):
            empty = {}
        for layer, (shape, _) in once.items():
            if empty.get(layer) != shape:
                raise ValueError(
                    f"{layer.label} gets an input of shape {tuple(shape)}, and of another when the listed weights are "
                    "zero: which samples reach it depends on the weights, as with the experts of a mixture, so the "
                    f"dense and the pruned model disagree about them. {leave_out(layer.label)}."
                )
        if sample_axes:
            try:
                twice = self._seen(batch.with_first_behind())
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"loader: the model fails on a batch that is given twice over. {MIXED.format(size=batch.size)}"
                ) from error
            for layer in self.layers:
                last = 0 if layer.convolution else len(once[layer].shape) - 2
                self.axes[layer] = sample_axis(layer.label, batch.size, once[layer], twice.get(layer), last)

    def _seen(self, inputs: Any, *, zero: bool = False, watch: Watch | None = None) -> dict[Layer, Seen]:
        """Return the shape of each layer's input when the model gets ``inputs``, and a mixture of its last axis.

        With ``zero`` the layers multiply with zeros instead of their weights. ``watch`` sees what they give.
        """
        found: dict[Layer, Seen] = {}
        sources: list[tuple[Layer, Source | None]] = []

        def look(layer: Layer, x: Tensor, multiply: Multiply) -> Tensor:
            if layer in found:
                raise ValueError(f"{layer.label} is called more than once in a pass. {leave_out(layer.label)}.")
            y = multiply((torch.zeros_like(layer.weight), layer.bias)) if zero else multiply()
            if not zero:
                with torch.autocast(x.device.type, enabled=False):
                    layer.check(x)
            found[layer] = seen(x)
            self.attributes.look()
            if watch is not None:
                watch.gives(layer, y)
            sources.append((layer, Source.of(x.detach(), *layer.use())))
            return y

        with self._instead_of_products(look), nullcontext() if watch is None else watch.calls_seen():
            output = self.run.output(inputs)
            if watch is not None:
                watch.kept()
            del output  # which may hold what a layer gave
        self.attributes.look()
        pairs = pairwise(sources)
        self.followed = {layer for (layer, source), (_, other) in pairs if source is not None and source.same(other)}
        return found

    # --- the pass

    def _bring(self, moments: Moments, layer: Layer, pruned: Passing, dense: Passing, batch: Batch) -> None:
        """Add what passes by ``layer`` in both calls of a batch to the moments."""
        own = wanted = y = dense.y
        if layer in self.residuals.places:
            parts = [part for part in (y, dense.added, pruned.added) if part is not None and part.shape == y.shape]
            if len(parts) < 3:
                raise ValueError(OTHER_WAY)
            y, stream, other = (part.to(wide(part.dtype)) for part in parts)
            scaling, lack = self.residuals.scalings.get(layer), stream - other
            own = y if scaling is None else scaling.own(y)
            wanted = own + (lack if scaling is None else scaling.back(lack))
        ours, theirs = weights_of(self.dense_inputs)
        self._add(moments, layer, pruned.x, wanted, batch, theirs)
        if ours:
            self._add(moments, layer, dense.x, own, batch, ours)

    def _add(self, moments: Moments, layer: Layer, x: Tensor, y: Tensor, batch: Batch, weight: float) -> None:
        """Add inputs ``x`` and the outputs ``y`` that are wanted for them, of which each row has a ``weight``."""
        axis = self.axes.get(layer, 0)
        x, y = x.movedim(axis, 0), y.movedim(axis, 0)
        if x.dim() != y.dim() or x.shape[0] != y.shape[0] or (not layer.convolution and x.shape[:-1] != y.shape[:-1]):
            raise ValueError(
                f"{layer.label} gets an input of shape {tuple(x.shape)} in the pruned model, and gives an output of "
                f"shape {tuple(y.shape)} in the dense one, so their rows do not belong together. "
                f"{leave_out(layer.label)}."
            )
        if not len(x):
            return
        each = layer.outputs(y[:1]).shape[1]  # rows of the least squares for one entry of the first axis
        keep = None
        if batch.mask is not None:
            keep = mask_rows(batch.mask, len(y) * each // batch.size, layer.label).to(x.device)
        step = max(max(SUMMED_ROWS, SUMMED_NUMBERS // layer.weight[0].numel()) // max(each, 1), 1)
        starts = range(0, len(x), step)

        def of(take: Callable[[Tensor], Tensor], tensor: Tensor, start: int) -> Tensor:
            rows = take(tensor[start : start + step])
            return rows if keep is None else rows[:, keep[start * each : (start + step) * each]]

        wanted = layer in self.followed or moments.before is not None
        source = Source.of(x, batch, axis, *layer.use()) if wanted else None
        known = moments.reads(source, lambda: (of(layer.inputs, x, start) for start in starts), weight)
        for start in starts:
            moments.add(of(layer.inputs, x, start), of(layer.outputs, y, start), weight, known=known)

    def _solution(self, layer: Layer, moments: Moments, batches: Sequence[Batch]) -> Solution:
        if not moments.count:
            masked = any(batch.mask is not None for batch in batches)
            raise ValueError(
                "sample_mask leaves out every sample. Let it be True where a sample counts."
                if masked
                else f"params holds {layer.label}, which no row of data reaches. {leave_out(layer.label)}, or pass "
                "more data."
            )
        if not all(total.isfinite().all() for total in moments.sums):
            raise ValueError(
                f"{layer.label} gets inputs, or gives outputs, that hold NaN or infinity or have squares beyond the "
                "range of their dtype. Check the data, or leave such samples out by sample_mask=."
            )
        moments.followed = layer in self.followed
        moments.scale = self.residuals.scale_of(layer)
        self.before = moments if moments.followed else None
        return self.solve(layer, moments)


def weights_of(dense_inputs: float) -> tuple[float, float]:
    """Return how much inputs in the reference and in the pruned model count, the larger 1, so that sums stay finite."""
    return (dense_inputs, 1.0) if dense_inputs <= 1 else (1.0, 1 / dense_inputs)


@contextmanager
def holding(tables: Tables) -> Iterator[None]:
    """Put what ``tables`` say into the modules, and take it out again."""
    before = [(table, key, table[key]) for table, key, _ in tables]
    for table, key, value in tables:
        table[key] = value
    try:
        yield
    finally:
        for table, key, value in before:
            table[key] = value
