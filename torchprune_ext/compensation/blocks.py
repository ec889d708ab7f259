"""Parts of a model that calls which begin anew need not run again: they give what they gave before.

A block is a module that is called once in a pass and gives tensors. Once a call has come out of it, all its layers are
settled, so from then on its outputs stand in for it, and only what is outside of such blocks runs. Where each block
reads no earlier one than the last, as the layers of a transformer do, only the last one's outputs are held. Whether
that is so is tried with two batches: what is no longer held is NaN there, and must change nothing.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune_ext._batches import Batch, leaves
from torchprune_ext._checks import warn
from torchprune_ext._rows import Seen, seen
from torchprune_ext._runs import Run
from torchprune_ext.compensation.coroutines import Call, Replay, calls_of, hand_out, running

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Told = tuple[list[Seen], list[Seen]]  # of what goes into a module, and of what comes out
PLAIN = (bool, int, float, str, type(None))
OTHER_WAY = "loader: batches take different ways through the model. Pass such that call the same layers."


class Output:
    """What a block gave: a tree of tensors and numbers, whose tensors are copies, or in a file, or gone.

    Args:
        output: the tree.
        folder: where to put its floating-point tensors; None to hold them.
    """

    def __init__(self, output: Any, folder: str | None) -> None:
        leaves, self.form = pytree.tree_flatten(output)
        self.like = [leaf.to("meta") if _is_float(leaf) else _copied(leaf) for leaf in leaves]
        self.held: list[Tensor] | None = None
        self.file: str | None = None
        floats = [leaf.detach() for leaf in leaves if _is_float(leaf)]
        if folder is None:
            self.held = [leaf.clone() for leaf in floats]
        elif floats:
            handle, self.file = tempfile.mkstemp(".pt", dir=folder)
            with os.fdopen(handle, "wb") as file:
                torch.save([leaf.clone() for leaf in floats], file)
        self.device = floats[0].device if floats else torch.device("cpu")

    def again(self) -> Any:
        """Return the tree anew; NaN stands for floating-point tensors that are gone."""
        floats = self.held
        if self.file is not None:
            floats = torch.load(self.file, weights_only=True)
        held = None if floats is None else iter(floats)

        def leaf_of(like: Any) -> Any:
            if not _is_float(like):
                return _copied(like)
            if held is None:
                return torch.full(like.shape, float("nan"), dtype=like.dtype, device=self.device)
            return next(held) if self.file is not None else next(held).clone()

        return pytree.tree_unflatten([leaf_of(like) for like in self.like], self.form)

    def forget(self) -> None:
        """Let the floating-point tensors go."""
        self.held = None
        if self.file is not None:
            os.remove(self.file)
            self.file = None


class Blocks:
    """The blocks of a model, and whether only the last one's outputs are needed.

    Args:
        modules: the blocks.
        last: whether each reads no earlier one than the last.
        folder: where to put outputs; None to hold them in memory.
    """

    def __init__(self, modules: Sequence[nn.Module] = (), *, last: bool = True, folder: str | None = None) -> None:
        self.modules, self.last, self.folder = list(modules), last, folder

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let calls that begin anew take what blocks gave before."""
        with replaced(self.modules, self._stand_in):
            yield

    def _stand_in(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = running()
        if not isinstance(call, Replay):
            return forward(*args, **kwargs)
        if block in call.entered:
            raise ValueError(OTHER_WAY)
        call.entered.add(block)
        if block in call.outputs:
            return call.outputs[block].again()
        call.inside = block
        output = forward(*args, **kwargs)
        call.inside = None
        kept = Output(output, self.folder)
        if self.last:
            for earlier in call.outputs.values():
                earlier.forget()
        call.outputs[block] = kept
        return output


@contextmanager
def replaced(modules: Iterable[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Let ``stand_in(module, forward, *args, **kwargs)`` be called in place of each module's forward."""
    plain = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda function: function
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in before:
            other = plain(partial(stand_in, module, module.forward))
            vars(module)["forward"] = update_wrapper(other, module.forward)  # some models read its signature
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


@contextmanager
def side_by_side(
    run: Run, stops: Sequence[nn.Module], batches: Sequence[Batch], device: str, offload: str | None, streams: int = 1
) -> Iterator[tuple[list[list[Call]], Blocks]]:
    """Open calls of the model, so many ``streams`` for each batch, and the blocks by which they go on.

    Args:
        run: the open model.
        stops: the modules at which calls stop.
        batches: the batches.
        device: type of the device whose autocast counts.
        offload: folder for what blocks give; only the batch that runs is then in memory.
        streams: calls for each batch.
    """
    works = [partial(run.output, batch.inputs) for batch in batches]
    with ExitStack() as stack:
        with run.ranks.together():
            folder = None
            if offload is not None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="torchprune_ext-", dir=offload))
            calls = calls_of(works, device, streams, window=None if folder is None else 0)
            for call in chain(*calls):
                stack.callback(call.close)
            blocks = _blocks_for(run, stops, calls, batches, folder)
        yield calls, blocks


def _blocks_for(
    run: Run,
    stops: Sequence[nn.Module],
    calls: Sequence[Sequence[Call]],
    batches: Sequence[Batch],
    folder: str | None,
) -> Blocks:
    """Return the blocks by which ``calls``, one or more for each of ``batches``, that stop at ``stops`` go on.

    What they give is put into ``folder``, or held in memory if that is None.

    Warns:
        UserWarning: there are calls that begin anew, and no blocks serve.
    """
    anew = sum(any(call.restarts for call in each) for each in calls)
    if not anew or len(stops) < 2:
        return Blocks()
    blocks = find_blocks(run, stops, batches, folder)
    if blocks is None:
        remedy = "Leave offload= out, or pass" if folder is not None else "Pass"
        warn(
            f"{anew} of the {len(batches)} batches are run from the start of the model for each of the {len(stops)} "
            f"layers or blocks, since only {len(calls) - anew} can wait in the middle of it, and no parts of it "
            f"could be told apart that are run once each, one after the other. {remedy} fewer and larger batches."
        )
    return Blocks() if blocks is None else blocks


@torch.no_grad()
def find_blocks(
    run: Run, stops: Sequence[nn.Module], batches: Sequence[Batch], folder: str | None = None
) -> Blocks | None:
    """Return blocks by which calls that stop at the modules ``stops`` go on as they would without; None if none serve.

    Args:
        run: the open model.
        stops: the modules; each is called once in a pass.
        batches: one or more; unlike ones tell more.
        folder: where to put what blocks give.
    """
    runs = [partial(run.output, batch.inputs) for batch in (batches[0], _another(batches))]
    wanted = [_met(stops, work) for work in runs]
    candidates = [_called_once(modules, runs[0]) for modules in _candidates(run.model, stops)]
    fitting = [modules for modules in candidates if modules]
    by_time = sorted(fitting, key=lambda modules: _cost(modules, stops))
    by_memory = sorted(fitting, key=len)
    for last, order in ((True, by_time), (False, by_memory)):
        for modules in order:
            blocks = Blocks(modules, last=last, folder=folder)
            if _serves(blocks, stops, runs, wanted, run.device.type):
                return blocks
    return None


def _candidates(model: nn.Module, stops: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Return sets of modules that may be blocks: those in containers, by how deep containers are nested, and stops."""
    listed, levels = set(stops), [list(stops)]

    def inside(module: nn.Module, depth: int) -> list[nn.Module]:
        """Return the modules in ``depth`` containers, or in as many as there are."""
        found = []
        for child in module.children():
            if not listed.intersection(child.modules()):
                continue
            held = isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS)
            if held and depth == 1:
                found.append(child)
            else:
                found += inside(child, depth - held) or [child] * held
        return found

    while (level := inside(model, len(levels))) and level not in levels:
        levels.append(level)
    return levels


def _cost(blocks: Sequence[nn.Module], stops: Sequence[nn.Module]) -> int:
    """Return how many stops calls come by again, roughly."""
    inside = [sum(stop in set(block.modules()) for stop in stops) for block in blocks]
    return sum(count**2 for count in inside) + (len(stops) - sum(inside)) * len(stops)


def _called_once(modules: Sequence[nn.Module], work: Callable[[], object]) -> list[nn.Module]:
    """Return which of ``modules`` are called once and give nothing but plain tensors, keeping none to themselves."""
    times = dict.fromkeys(modules, 0)

    def look(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = [(vars(each), dict(vars(each))) for each in module.modules()]
        output = forward(*args, **kwargs)
        leaves = pytree.tree_leaves(output)
        kept = any(
            isinstance(value, Tensor) and value is not old.get(key)
            for table, old in before
            for key, value in table.items()
        )
        fits = not kept and any(isinstance(leaf, Tensor) for leaf in leaves) and all(map(_is_plain, leaves))
        times[module] += 1 if fits else 2
        return output

    with replaced(modules, look):
        work()
    return [module for module, count in times.items() if count == 1]


def _met(stops: Sequence[nn.Module], work: Callable[[], object]) -> list[tuple[nn.Module, Told]]:
    """Return the modules in the order in which they are called, and what is remembered of what they get and give."""
    found = []

    def look(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _told((args, kwargs))
        output = forward(*args, **kwargs)
        found.append((module, (given, _told(output))))
        return output

    with replaced(stops, look):
        work()
    return found


def _told(tree: Any) -> list[Seen]:
    """Return what is remembered of the tensors of a tree."""
    tensors = [leaf for leaf in leaves(tree) if _is_plain(leaf)]
    return [seen(tensor if tensor.dim() else tensor.unsqueeze(0)) for tensor in tensors]


def _same(one: Told, other: Told) -> bool:
    """Return whether what went in and what came out is the same."""
    return all(
        len(a) == len(b)
        and all(
            x.shape == y.shape and x.mixed.allclose(y.mixed, rtol=0, atol=0, equal_nan=True)
            for x, y in zip(a, b, strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


def _serves(
    blocks: Blocks,
    stops: Sequence[nn.Module],
    runs: Sequence[Callable[[], object]],
    wanted: Sequence[Sequence[tuple[nn.Module, Told]]],
    device: str,
) -> bool:
    """Return whether calls that take turns meet with ``blocks`` what they meet without."""
    known: set[nn.Module] = set()
    calls = [Replay(work, device) for work in runs]

    def stop(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _told((args, kwargs))
        output = forward(*args, **kwargs)
        hand_out(module, (given, _told(output)), known=module in known)
        return output

    try:
        with replaced(stops, stop), blocks.standing_in():
            for place in range(len(wanted[0]) + 1):
                for call, each in zip(calls, wanted, strict=True):
                    met = call.resume()
                    expected = each[place] if place < len(each) else None
                    if met is None or expected is None:
                        if met is not expected:
                            return False
                    elif met[0] is not expected[0] or not _same(met[1], expected[1]):
                        return False
                known.update(each[0] for each in wanted[0][place : place + 1])
    except Exception:  # whatever a model says to NaN
        return False
    finally:
        for call in calls:
            call.close()
    return True


def _another(batches: Sequence[Batch]) -> Batch:
    """Return the first batch whose inputs are unlike those of the first of all; the last if all are alike."""
    first, form = pytree.tree_flatten(batches[0].inputs)
    for batch in batches[1:]:
        leaves, other = pytree.tree_flatten(batch.inputs)
        if form != other or not all(_alike(*pair) for pair in zip(first, leaves, strict=True)):
            return batch
    return batches[-1]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.layout == other.layout == torch.strided and one.equal(other)
    return one is other


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, PLAIN) or (
        isinstance(leaf, Tensor) and type(leaf) is Tensor and leaf.layout is torch.strided
    )


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
