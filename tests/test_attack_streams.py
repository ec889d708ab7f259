"""What a model does with a layer's output beside adding it, and with its memory, out of sight of its operations."""

import copy
import inspect
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from compensating import MARKS, best_row, build, close, compensate, data, in_both, pairs, watch
from test_residuals import Block, by_definition, two_of
from torch import nn
from torch.nn.utils import prune

from torchprune_ext.compensation import coroutines, solvers, streams

pytestmark = [*MARKS, pytest.mark.usefixtures("to_the_end")]
windows = pytest.mark.parametrize("window", [coroutines.WINDOW, 0])


def fitted(make, batches, **options):
    """Return a model of which half is pruned and the rest re-fitted."""
    model = build(make).to(batches[0][0].dtype).eval()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    compensate(model, batches, pairs(model), **options)
    return model


def same_weights(model, expected):
    for (one, _), (other, _) in zip(pairs(model), pairs(expected), strict=True):
        close(one.weight.detach(), other.weight.detach())
        close(one.bias.detach(), other.bias.detach())


class Reusing(nn.Module):
    """Writes what goes into its layer into a buffer that it has for that."""

    def __init__(self):
        super().__init__()
        self.start, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("room", torch.zeros(63, 6))

    def forward(self, x):
        return self.down(self.put(torch.tanh(self.start(x))))

    def put(self, x):
        self.room[: len(x)] = x
        return self.room[: len(x)]


class NotReusing(Reusing):
    def put(self, x):
        return x


class StreamInBuffer(Block):
    """Holds its stream in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("room", torch.zeros(63, 5))

    def forward(self, x):
        self.room[: len(x)] = x
        stream = self.room[: len(x)]
        return stream + self.down(torch.tanh(self.up(self.norm(stream))))


class Elsewhere(Reusing):
    """Has its room where nobody can see it."""

    def put(self, x, room=torch.zeros(63, 6, dtype=torch.float64)):  # noqa: B008
        room[: len(x)] = x
        return room[: len(x)]


@windows
def test_memory_that_no_module_holds_is_refused(window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    with pytest.raises(ValueError, match=r"down.weight gets its input, or .*memory .* Let a module hold it, as by reg"):
        fitted(Elsewhere, data((5,), (40, 23)))


@windows
def test_memory_that_both_models_write_into_holds_what_either_wrote(window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    batches = data((5,), (40, 23))
    same_weights(fitted(Reusing, batches), fitted(NotReusing, batches))
    model = fitted(two_of(StreamInBuffer), batches)
    masks = [module.weight_mask for module, _ in pairs(model)]
    same_weights(model, by_definition(two_of(StreamInBuffer), masks, batches, True)[0])


@dataclass
class Handed:
    """An output that is not a tree of tensors."""

    total: torch.Tensor
    part: torch.Tensor


class HandsOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Block(), Block()

    def forward(self, x):
        x = self.first(x)
        y = self.last.down(torch.tanh(self.last.up(self.last.norm(x))))
        return self.hand_out(x + y, y)

    def hand_out(self, total, y):
        return Handed(total, y)


class Holds(HandsOut):
    def hand_out(self, total, y):
        self.seen = y
        return total


class Cyclic(HandsOut):
    """Leaves a cycle behind that holds the layer's output, but nobody can reach it."""

    def hand_out(self, total, y):
        cycle = [y]
        cycle.append(cycle)
        return total


@pytest.mark.parametrize("how", [HandsOut, Holds, Cyclic])
def test_outputs_that_are_held_are_used(how):
    batches = data((5,), (40, 23))
    model = fitted(how, batches)
    close(model.last.down.weight.detach(), _by_hand(model, how, batches, how is Cyclic))


def _by_hand(model, how, batches, sums):
    """Return the weight of the last layer, fitted to the sum or not."""
    dense = build(how).eval()
    x, _, y = in_both(model, dense, "last.down", batches)
    if sums:
        ours, theirs = (watch(net, net.last.norm, batches)[0] for net in (dense, model))
        y[: len(ours)] += ours - theirs
    mask, found = model.last.down.weight_mask, dense.last.down.weight.detach().clone()
    for row in range(len(found)):
        found[row] = best_row(x, y[:, row], (found * mask)[row], mask[row] != 0, None, solvers.RIDGE)[0]
    return found


def test_streams_do_not_wait_in_memory_where_batches_are_offloaded(monkeypatch, tmp_path):
    held, advance = [], streams.Pass._next

    def look(self, *args):
        on = advance(self, *args)
        held.append(sum(len(each) for each in self.residuals.held.values()))
        return on

    monkeypatch.setattr(streams.Pass, "_next", look)
    batches = data((5,), (9,) * 5)
    model = fitted(two_of(Block), batches, offload=str(tmp_path))
    assert held == [0] * 6
    same_weights(model, by_definition(two_of(Block), [m.weight_mask for m, _ in pairs(model)], batches, True)[0])


class CalledTwiceInLarge(Block):
    """Calls its norm with something else, too, in large batches."""

    def forward(self, x):
        normed = self.norm(x)
        if len(x) > 30:
            self.norm(x * 3)
        return x + self.down(torch.tanh(self.up(normed)))


class ScaledInLarge(Block):
    def join(self, x, y):
        return x + 0.5 * y if len(x) > 30 else x + y


class OtherStreamInLarge(Block):
    def join(self, x, y):
        return (x.tanh() if len(x) > 30 else x) + y


class ScaledInOdd(Block):
    """Tells batches apart by their values."""

    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 0 else self.twice(x)

    def twice(self, x):
        normed = self.norm(x)
        self.norm(x * 3)
        return x + self.down(torch.tanh(self.up(normed)))


@pytest.mark.parametrize("sizes", [(40, 23), (23, 40)])
@pytest.mark.parametrize("block", [CalledTwiceInLarge, ScaledInLarge, OtherStreamInLarge])
def test_what_batches_of_another_shape_do_with_an_output_counts(block, sizes):
    batches = data((5,), sizes)
    model = fitted(two_of(block), batches)
    masks = [module.weight_mask for module, _ in pairs(model)]
    same_weights(model, by_definition(two_of(block), masks, batches, block is CalledTwiceInLarge)[0])


@windows
def test_a_module_that_is_called_again_in_a_batch_of_the_same_shape_is_refused(window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    (x, _), *_ = data((5,), (20,))
    with pytest.raises(ValueError, match="different ways"):
        fitted(ScaledInOdd, [(x.abs(), None), (-x.abs(), None)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_dense_inputs_may_be_any_number(dtype):
    batches = data((5,), (40, 23), dtype=dtype)
    found = [
        torch.cat([m.weight.detach().flatten() for m, _ in pairs(fitted(two_of(Block), batches, dense_inputs=d))])
        for d in (0, 1e-300, 1e12, 1e38, 1.7e308)
    ]
    tolerance = 0.05 if dtype is torch.float16 else 1e-3
    for one, other in ((0, 1), (2, 3), (3, 4)):
        torch.testing.assert_close(found[one], found[other], rtol=tolerance, atol=tolerance)


class ReadsSignature(Block):
    """Does something else where its own forward takes other arguments, as models do that are wrapped."""

    def forward(self, x, scale=1.0):
        known = "scale" in inspect.signature(self.forward).parameters
        return x + self.down(torch.tanh(self.up(self.norm(x * (scale if known else 2)))))


def test_signatures_stay_what_they_are():
    batches = data((5,), (40, 23))
    model = fitted(two_of(ReadsSignature), batches)
    masks = [module.weight_mask for module, _ in pairs(model)]
    same_weights(model, by_definition(two_of(ReadsSignature), masks, batches, True)[0])


class PostNorm(Block):
    """Its stream is made by the block and goes into a layer, but into no other module."""

    def forward(self, x):
        x = self.norm(x)
        return x + self.down(torch.tanh(self.up(x)))


@windows
@pytest.mark.parametrize("listed", ["all", "down"])
def test_the_sum_is_fitted_whatever_else_is_listed(window, listed, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    batches, model = data((5,), (40, 23)), build(two_of(PostNorm)).eval()
    dense = copy.deepcopy(model)
    params = [(block.down, "weight") for block in model[:2]]
    if listed == "all":
        params += [(block.up, "weight") for block in model[:2]]
    for module, name in params:
        prune.random_unstructured(module, name, amount=0.5)
    compensate(model, batches, params)
    x, _, y = in_both(model, dense, "1.down", batches)
    ours, theirs = (watch(net, net[1].up, batches)[0] for net in (dense, model))
    y[: len(ours)] += ours - theirs
    mask, start = model[1].down.weight_mask, dense[1].down.weight.detach()
    for row in range(len(start)):
        found = best_row(x, y[:, row], start[row] * mask[row], mask[row] != 0, None, solvers.RIDGE)[0]
        close(model[1].down.weight[row].detach(), found)


def on_two_ranks(rank, init):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solvers, "TOLERANCE", 0.0)
            for block in (Block, ScaledInLarge):
                batches = data((5,), (40, 23))
                alone, model = (
                    fitted(two_of(block), each, **options)
                    for each, options in ((batches, {}), ([batches[rank]], {"process_group": dist.group.WORLD}))
                )
                same_weights(model, alone)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
def test_ranks_whose_batches_take_other_ways_find_what_one_process_finds(tmp_path, processes):
    processes.spawn(on_two_ranks, (f"file://{tmp_path}/init",), 2)
