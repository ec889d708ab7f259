"""Gradient steps on the blocks of a model, one block after the other, or on all of the model at once.

In sequence, each batch is two calls, one of the reference model and one of the model that is fitted, which stop at each
block: the block is fitted to what the reference's gives there, from what the fitted blocks before it give, and all go
on, see ``coroutines.py``. What is held at a time is what all batches need between two blocks, and one block's
gradients. As a whole, the reference model runs again for each batch, so that one batch's outputs are all that is held.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch
from torchprune_ext._loading import with_progress
from torchprune_ext._runs import Run
from torchprune_ext._tables import table
from torchprune_ext.compensation.attributes import Attributes, State
from torchprune_ext.compensation.block_outputs import (
    Blocks,
    Calls,
    Distance,
    Loss,
    copied,
    counted,
    same,
    sample_axes,
    tensors_of,
)
from torchprune_ext.compensation.blocks import replaced, side_by_side
from torchprune_ext.compensation.coroutines import Call, hand_out
from torchprune_ext.compensation.descent import Descent, Free, MakeOptimizer, Parts, checked, descend, measured
from torchprune_ext.compensation.streams import Tables, holding
from torchprune_ext.compensation.survivors import Held

OTHER_WAY = (
    "batches of loader or held_out take different ways through the model. Pass such that call the same blocks, each "
    "once, or blocks=[model] for the model as one block."
)
Stop = tuple[nn.Module, Any] | None  # a block, and what goes in or comes out there; None at the end of the model
Stops = tuple[Stop, Stop, State]  # of the reference and of what is fitted, and what modules keep there


@dataclass(frozen=True, slots=True)
class RefinedBlock:
    """What refining has given for a block, on the batches kept aside.

    Args:
        name: of the block in the model.
        before: what its outputs are off the reference model's, in squares relative to their variation.
        after: the same with the new values.
        best: the epoch whose values it has now; 0 for those that it had.
        epochs: how many epochs there were.
    """

    name: str
    before: float
    after: float
    best: int
    epochs: int


@dataclass(frozen=True, slots=True)
class Refined:
    """What :func:`refine` has done; prints as a table. All errors are on the batches kept aside.

    Args:
        blocks: in the order in which the model calls them; none where only the model's output was fitted.
        model: the same of the model's output, or what ``loss`` says of it.
    """

    blocks: tuple[RefinedBlock, ...]
    model: RefinedBlock

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, as for a JSON file."""
        return {"blocks": [asdict(block) for block in self.blocks], "model": asdict(self.model)}

    def __str__(self) -> str:
        """Return a table with a line for each block, and one for the model."""
        lines = [
            [row.name, f"{row.before:.4g}", f"{row.after:.4g}", f"{row.best} of {row.epochs}"]
            for row in (*self.blocks, self.model)
        ]
        return table(["block", "before", "after", "epoch"], lines)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How it is fitted.

    Args:
        epochs: most epochs.
        optimizer: makes the optimizer.
        progress: as in :class:`.Options`.
    """

    epochs: int
    optimizer: MakeOptimizer
    progress: bool | None


class Task:
    """What is fitted, in an open model.

    Args:
        run: the open model.
        free: what may change.
        reference: what the modules hold while the reference model runs.
        recipe: how it is fitted.
        loss: for the model's output; None for the relative error.
    """

    def __init__(
        self, run: Run, free: Mapping[Held, Free], reference: Tables, recipe: Recipe, loss: Loss | None
    ) -> None:
        self.run, self.free, self.reference, self.recipe, self.loss = run, free, reference, recipe, loss
        for module in run.model.modules():
            if "_compiled_call_impl" in vars(module):
                vars(module)["_compiled_call_impl"] = None  # of module.compile(); put back with all else
        self.attributes = Attributes(run)
        self.calls = Calls(run, {})
        self.distances: list[Distance] = []  # of the blocks, and behind them of the model
        self.fit: list[Batch] = []
        self.aside: list[Batch] = []
        self.dense = False  # whether it is the reference that runs
        self.done: dict[nn.Module, Descent] = {}  # the blocks that are fitted, in sequence

    # --- the rehearsal

    @torch.no_grad()
    def prepare(self, blocks: Blocks, fit: list[Batch], aside: list[Batch], *, found: bool, sequence: bool) -> None:
        """See what ``blocks`` give for the first batch, and refuse what a fit would get wrong.

        Args:
            blocks: to fit, and how errors call them.
            fit: the batches to fit to.
            aside: those that are kept aside.
            found: whether the blocks were found; then the model is one block where they do not do.
            sequence: whether they are fitted one after the other.
        """
        self.fit, self.aside = fit, aside
        inputs = fit[0].inputs
        self.calls = Calls(self.run, blocks)
        once = self.calls.outputs(inputs, self.attributes if sequence else None)
        several = {self.calls.blocks[block]: len(seen) for block, seen in self.calls.seen.items() if len(seen) != 1}
        if several and found:
            self.calls = Calls(self.run, {})
            once = self.calls.outputs(inputs)
        elif several:
            raise ValueError(
                f"blocks: each is called once in a pass, but {several} of them are not (with the number of calls). "
                "List what calls them, or [model] for the model as one block."
            )
        seen = self.calls.seen
        names = [*(self.calls.blocks[block] for block in self.calls.inner), type(self.run.model).__name__]
        again = self.calls.outputs(inputs)
        for name, first, second in zip(names, once, again, strict=True):
            if not same(first, second):
                raise ValueError(
                    f"{name} gives another output when the model gets the same batch again, so what is fitted cannot "
                    "be told from noise. Switch off what is random, as dropout that is always on."
                )
        if sequence:
            self._refuse_shared()
            self._refuse_frozen()
            for block, [call] in seen.items():
                self._refuse_memory(block, *call)
        masked = [batch for batch in [*fit, *aside] if batch.mask is not None]
        axes: Sequence[list[int] | None] = [None] * len(names)
        if masked:
            axes = sample_axes(self.calls, masked[0], self.calls.outputs(masked[0].inputs), names)
        losses = [*[None] * len(self.calls.inner), self.loss]
        self.distances = [Distance(*each) for each in zip(names, axes, losses, strict=True)]
        self.distances[-1].remedy = "Wrap the model in one that gives what shall be compared."

    def _refuse_memory(self, block: nn.Module, args: Any, kwargs: Any, state: Any, output: Any) -> None:
        """Refuse a block that cannot be called again and again with the same arguments, forwards and backwards."""
        free, error = [each.parameter for each in self.free.values()], None
        again, moved = [output], not self._free_in(block)
        try:
            with torch.enable_grad():
                for _ in range(2):
                    self.attributes.put(state)
                    again.append(block.forward(*copied(args), **copied(kwargs)))
                    total = sum(tensor.sum() for tensor in tensors_of(again[-1]))
                    if isinstance(total, Tensor) and total.requires_grad:
                        moved = True
                        torch.autograd.grad(total, free, allow_unused=True)
        except (RuntimeError, IndexError, ValueError) as raised:
            error = raised
        finally:
            self.attributes.put()
        if error is not None or not all(same(output, each) for each in again):
            raise ValueError(
                f"{self.calls.blocks[block]} gives another output, or fails, when it is called again with the same "
                "arguments, as with a cache of keys and values. Switch that off (use_cache=False), or pass whole=True."
            ) from error
        if not moved:
            raise ValueError(
                f"{self.calls.blocks[block]} gives what does not depend on any of its tensors that may change, as "
                "where it computes under torch.no_grad(). Leave it out of blocks, or pass whole=True."
            )

    def _free_in(self, block: nn.Module) -> list[Free]:
        """Return what may change with ``block``: what stands nowhere else."""
        inside = set(block.modules())
        return [each for held, each in self.free.items() if held.modules <= inside]

    def _refuse_frozen(self) -> None:
        """Refuse blocks none of which holds anything that may change."""
        if self.calls.inner and not any(map(self._free_in, self.calls.inner)):
            names = ", ".join(self.calls.blocks[block] for block in self.calls.inner)
            raise ValueError(
                f"nothing in blocks may change: {names} hold nothing that requires grad and stands nowhere else. Let "
                "something require grad, list other blocks, or pass whole=True."
            )

    def _refuse_shared(self) -> None:
        """Refuse blocks that hold the same tensor, which cannot be fitted one after the other."""
        inside = {name: set(block.modules()) for block, name in self.calls.blocks.items()}
        for held in self.free:
            sharing = [name for name, modules in inside.items() if held.modules & modules]
            if len(sharing) > 1:
                raise ValueError(
                    f"{' and '.join(sharing)} share {held.listed[0].where}, so they cannot be fitted one after the "
                    "other. Pass whole=True, freeze it, or leave all but one of them out of blocks."
                )

    # --- the model as a whole

    def whole(self) -> Refined:
        """Fit everything at once to the outputs of all blocks and of the model."""
        bar = with_progress(range(self.recipe.epochs), "refine", None, self.recipe.progress)
        steps = iter(bar)

        def tell(error: float) -> None:
            next(steps, None)
            _tell(bar, error)

        done = descend(
            list(self.free.values()),
            [self._all_parts(batch) for batch in self.fit],
            [(counted(batch), self._all_parts(batch)) for batch in self.aside],
            self.recipe.epochs,
            self.recipe.optimizer,
            tell,
        )
        rows = [
            RefinedBlock(distance.where, before, after, done.best, done.epochs)
            for distance, before, after in zip(self.distances, done.before, done.after, strict=True)
        ]
        return Refined(tuple(rows[:-1]), rows[-1])

    def _all_parts(self, batch: Batch) -> Parts:
        """Return what computes the errors of all blocks and of the model for ``batch``."""

        def parts() -> Tensor:
            with torch.no_grad(), holding(self.reference):
                dense = self._outputs(batch)
            found = self._outputs(batch)
            each = zip(self.distances, found, dense, strict=True)
            return torch.stack([compare(mine, other, batch) for compare, mine, other in each])

        return parts

    def _outputs(self, batch: Batch) -> list[Any]:
        """Return what the blocks and the model give for ``batch``."""
        found = self.calls.outputs(batch.inputs)
        if any(len(seen) != 1 for seen in self.calls.seen.values()):
            raise ValueError(OTHER_WAY)
        return found

    # --- one block after the other

    def sequence(self) -> Refined:
        """Fit one block after the other, each on what the fitted ones before it give."""
        before = checked(measured([(counted(batch), self._end_parts(batch)) for batch in self.aside]))
        start = [(free, free.parameter.detach().clone()) for free in self.free.values()]
        batches = [*self.fit, *self.aside]
        device = self.run.device.type
        inner = self.calls.inner
        bar = with_progress(inner, "refine", None, self.recipe.progress)
        steps = iter(bar)
        self.done.clear()
        done = self.done
        try:
            with (
                side_by_side(self.run, inner, batches, device, None, streams=2) as (calls, blocks),
                replaced(inner, self._reach),
                blocks.standing_in(),
            ):
                while len(done) < len(inner):
                    stops = [self._resume(*each) for each in calls]
                    block = self._common(stops)
                    done[block] = self._fit_block(block, stops, bar)
                    next(steps, None)
                if any(stop is not None for each in calls for stop in self._resume(*each)[:2]):
                    raise ValueError(OTHER_WAY)
        finally:
            self.attributes.put()
        next(steps, None)
        after = measured([(counted(batch), self._end_parts(batch)) for batch in self.aside])
        better = after[0] <= before[0] and any(each.best for each in done.values())
        if not better:
            for free, values in start:
                free.write(values)
        rows = [
            RefinedBlock(self.calls.blocks[block], each.before[0], each.after[0], each.best, each.epochs)
            if better
            else RefinedBlock(self.calls.blocks[block], each.before[0], each.before[0], 0, each.epochs)
            for block, each in done.items()
        ]
        name, kept = self.distances[-1].where, max(each.best for each in done.values()) if better else 0
        epochs = max(each.epochs for each in done.values())
        end = after[0] if better else before[0]
        return Refined(tuple(rows), RefinedBlock(name, before[0], end, kept, epochs))

    def _reach(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a block's forward: hand out what it gives or gets, and go on when the block is fitted."""
        if self.dense:
            output = forward(*args, **kwargs)
            hand_out(block, output, known=block in self.done)
            return output
        hand_out(block, (forward, args, kwargs), known=block in self.done)
        return forward(*args, **kwargs)

    def _resume(self, dense: Call, fitted: Call) -> Stops:
        """Let both calls of a batch go on to the next block, and return where they stop."""
        self.dense = True
        with self.attributes.of(dense), holding(self.reference):
            other: Stop = dense.resume()
        self.dense = False
        with self.attributes.of(fitted):
            mine: Stop = fitted.resume()
        return other, mine, self.attributes.now()

    def _common(self, stops: Sequence[Stops]) -> nn.Module:
        """Return the block at which all calls have stopped."""
        reached = {None if stop is None else stop[0] for *pair, _ in stops for stop in pair}
        block = reached.pop()
        if reached or block is None or block in self.done:
            raise ValueError(OTHER_WAY)
        return block

    def _fit_block(self, block: nn.Module, stops: Sequence[Stops], bar: Iterable[Any]) -> Descent:
        """Fit ``block`` to what the reference's gave at ``stops``, one for each batch."""
        compare = self.distances[self.calls.inner.index(block)]
        free = self._free_in(block)

        def parts_of(batch: Batch, dense: Any, fitted: Any, state: State) -> Parts:
            (_, target), (_, (forward, args, kwargs)) = dense, fitted

            def parts() -> Tensor:
                self.attributes.put(state)
                return compare(forward(*copied(args), **copied(kwargs)), target, batch).reshape(1)

            return parts

        batches = [*self.fit, *self.aside]
        each = [parts_of(batch, *stop) for batch, stop in zip(batches, stops, strict=True)]
        aside = [(counted(batch), parts) for batch, parts in zip(self.aside, each[len(self.fit) :], strict=True)]
        if not free:
            now = measured(aside)
            return Descent(now, now, 0, 0)
        steps, recipe = each[: len(self.fit)], self.recipe
        return descend(free, steps, aside, recipe.epochs, recipe.optimizer, partial(_tell, bar))

    def _end_parts(self, batch: Batch) -> Parts:
        """Return what computes the error of the model's output for ``batch``."""

        def parts() -> Tensor:
            with holding(self.reference):
                dense = self.run.output(batch.inputs)
            return self.distances[-1](self.run.output(batch.inputs), dense, batch).reshape(1)

        return parts


def _tell(bar: Any, error: float) -> None:
    """Show the error on the batches kept aside, if ``bar`` is a progress bar."""
    if hasattr(bar, "set_postfix"):
        bar.set_postfix(error=f"{error:.4g}")
