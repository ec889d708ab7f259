"""Where something is added to a layer's output, the sum is fitted; whatever else is done with it, the output alone."""

import copy

import pytest
import torch
from compensating import (
    MARKS,
    best_row,
    build,
    close,
    compensate,
    data,
    in_both,
    names,
    pairs,
    prune_and_compensate,
    prune_in_rounds,
    sparsegpt,
    watch,
)
from torch import nn
from torch.nn.utils import prune

from torchprune_ext.compensation import coroutines, solvers

pytestmark = MARKS


class Block(nn.Module):
    """A layer before, and a layer whose output something is done with."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.join(x, self.down(torch.tanh(self.up(self.norm(x)))))

    def join(self, x, y):
        return x + y


class Reversed(Block):
    def join(self, x, y):
        return y + x


class InPlace(Block):
    def join(self, x, y):
        y += x
        return y * 2


class IntoTheStream(Block):
    def join(self, x, y):
        return x.clone().add_(y) if x.requires_grad else torch.add(x, y)


class Dropped(Block):
    """As models have it: dropout in eval mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def join(self, x, y):
        return x + self.drop(y)


class Joining(nn.Module):
    def forward(self, y, *, stream):
        return y + stream


class PassedOn(Block):
    """The stream goes along as a keyword, as in Hugging Face's models."""

    def __init__(self):
        super().__init__()
        self.sum = Joining()

    def join(self, x, y):
        return self.sum(y, stream=x)


class Scaled(Block):
    def join(self, x, y):
        return x + 0.5 * y


class Alpha(Block):
    def join(self, x, y):
        return torch.add(x, y, alpha=0.5)


class Looked(Block):
    """The output goes into the sum and somewhere else."""

    def join(self, x, y):
        return x + y + 0.1 * torch.tanh(y)


class Twice(Block):
    def join(self, x, y):
        return torch.cat([x + y, x * 2 + y], -1)[..., :5]


class Broadcast(Block):
    def join(self, x, y):
        return x.mean(0, keepdim=True) + y


class Changed(Block):
    """What was passed on is no longer what is added."""

    def forward(self, x):
        x = x.clone()
        y = self.down(torch.tanh(self.up(self.norm(x))))
        x.mul_(0.5)
        return x + y


class Later(Block):
    """What is added is made after the layer was called."""

    def join(self, x, y):
        return x.tanh() + y


class CalledAgain(Block):
    """What was passed by is no longer there when the layer is reached."""

    def forward(self, x):
        x = x.tanh()
        return x + self.down(torch.tanh(self.up(self.norm(self.norm(x)))))


class Returned(Block):
    """The model hands out what the layer gives, too."""

    def join(self, x, y):
        return {"sum": x + y, "parts": [(y, None)]}


class Skip(nn.Module):
    """Adds, in its last layer, what only the first block has passed by."""

    def __init__(self):
        super().__init__()
        self.start, self.down = nn.Linear(5, 5), nn.Linear(5, 5)
        self.blocks = nn.ModuleList([Scaled(), Scaled(), Scaled()])

    def forward(self, x):
        first = h = self.start(x)
        for block in self.blocks:
            h = block(h)
        return first + self.down(h)


SUMS = [Block, Reversed, InPlace, IntoTheStream, Dropped, PassedOn, Scaled]
OTHERS = [Alpha, Looked, Twice, Broadcast, Changed, Later, CalledAgain]


def two_of(block):
    return lambda: nn.Sequential(block(), block(), nn.Linear(5, 3))


def same(block, make):
    """Return a model that computes the same of either block, Block or Scaled."""
    model = build(make(block)).eval()
    for each in model[:-1] if block is Scaled else ():
        each.down.weight.data *= 2
        each.down.bias.data *= 2
    return model


def by_definition(make, masks, batches, sums, dense_inputs=1):
    """Return a plain model that was fitted layer by layer, row by row, and the errors after."""
    dense, model, errors = build(make).eval(), build(make).eval(), []
    for name, mask in zip(names(model), masks, strict=True):
        model.get_submodule(name).weight.data *= mask
    for name, mask in zip(names(model), masks, strict=True):
        layer = model.get_submodule(name)
        x, _, y = in_both(model, dense, name, batches)
        if sums and name.endswith("down"):  # what a block gets is what it adds
            block = name.removesuffix(".down")
            ours, theirs = (watch(net, net.get_submodule(block), batches)[0] for net in (dense, model))
            y[: len(ours)] += (ours - theirs) * (2 if isinstance(model.get_submodule(block), Scaled) else 1)
        half = len(x) // 2
        x, y = (torch.cat([t[:half], *[t[half:]] * dense_inputs]) for t in (x, y))
        for row in range(len(layer.weight)):
            start, keep = layer.weight.data[row].clone(), mask[row] != 0
            found = best_row(x, y[:, row], start, keep, None, solvers.RIDGE)
            layer.weight.data[row], layer.bias.data[row] = found
        errors.append(float((layer(x).detach() - y).square().sum() / (y - y.mean(0)).square().sum()))
    return model, errors


def test_a_layer_whose_output_the_model_hands_out_is_fitted_to_it():
    batches, model = data((5,), (40, 23)), build(Returned).eval()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    expected, _ = by_definition(Returned, [m.weight_mask for m, _ in pairs(model)], batches, False)
    compensate(model, batches, pairs(model))
    close(model.down.weight.detach(), expected.down.weight.detach())


@pytest.mark.parametrize("window", [coroutines.WINDOW, 1, 0])
def test_a_stream_that_passed_by_long_ago_is_remembered(window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    batches, model = data((5,), (40, 23)), build(Skip).eval()
    dense = copy.deepcopy(model)
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    compensate(model, batches, pairs(model))
    x, _, y = in_both(model, dense, "down", batches)
    ours, theirs = (watch(net, net.start, batches)[1] for net in (dense, model))
    y[: len(ours)] += ours - theirs
    start, keep = (dense.down.weight * model.down.weight_mask).detach(), model.down.weight_mask != 0
    for row in range(5):
        found, _ = best_row(x, y[:, row], start[row], keep[row], None, solvers.RIDGE)
        close(model.down.weight[row].detach(), found)


@pytest.mark.parametrize("dense_inputs", [0, 2, 2.0])
def test_dense_inputs_count_as_often_as_is_said(dense_inputs):
    make, batches = two_of(Block), data((5,), (40, 23))
    model = build(make).eval()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    masks = [m.weight_mask for m, _ in pairs(model)]
    expected, errors = by_definition(make, masks, batches, True, int(dense_inputs))
    fits = compensate(model, batches, pairs(model), dense_inputs=dense_inputs)
    for name in names(model):
        close(model.get_submodule(name).weight.detach(), expected.get_submodule(name).weight.detach())
    torch.testing.assert_close([fit.after for fit in fits.values()], errors, rtol=1e-6, atol=1e-9)
    assert [fit.rows for fit in fits.values()] == [63] * 5


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), True, "1", None, torch.ones(2)])
@pytest.mark.parametrize("call", [compensate, prune_and_compensate, prune_in_rounds])
def test_other_weights_are_refused(call, value):
    model, more = build(two_of(Block)).eval(), {} if call is compensate else {"target_sparsity": 0.5}
    given = (lambda _: {},) if call is prune_in_rounds else ()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    with pytest.raises((TypeError, ValueError), match=r"dense_inputs=.*Pass a (finite )?number >= 0"):
        call(model, data((5,), (40,)), pairs(model), *given, dense_inputs=value, **more)


@pytest.mark.parametrize("window", [coroutines.WINDOW, 0])
@pytest.mark.parametrize("block", [*SUMS, *OTHERS])
def test_against_the_definition(block, window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    make, batches = two_of(block), data((5,), (40, 23))
    model = build(make).eval()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    expected, errors = by_definition(make, [m.weight_mask for m, _ in pairs(model)], batches, block in SUMS)
    fits = compensate(model, batches, pairs(model))
    for name in names(model):
        close(model.get_submodule(name).weight.detach(), expected.get_submodule(name).weight.detach())
        close(model.get_submodule(name).bias.detach(), expected.get_submodule(name).bias.detach())
    torch.testing.assert_close([fit.after for fit in fits.values()], errors, rtol=1e-6, atol=1e-9)


def test_sparsegpt_looks_at_the_output_alone_as_published():
    batches, found = data((5,), (60,)), []
    for block in (Block, Scaled):
        model = same(block, two_of)
        sparsegpt(model, batches, pairs(model), target_sparsity=0.5)
        found.append(
            [(m.weight / (2 if block is Scaled and m.out_features == 5 else 1)).detach() for m, _ in pairs(model)]
        )
    for one, other in zip(*found, strict=True):
        close(one, other)


class Uneven(nn.Module):
    """Passes what it adds by a module for large batches only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.hold = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

    def forward(self, x):
        x = self.a(x)
        return (self.hold(x) if len(x) > 2 else x) + self.b(x * 1)


def test_a_batch_that_takes_another_way_is_refused():
    model = build(Uneven).eval()
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="different ways"):
        compensate(model, data((4,), (8, 5, 2)), pairs(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_are_left_as_they_were():
    model, batches = build(two_of(PassedOn)).eval(), data((5,), (20,))
    hooks = {name: dict(vars(module)) for name, module in model.named_modules()}
    prune_and_compensate(model, batches, pairs(model), target_sparsity=0.5)
    for name, module in model.named_modules():
        assert ("forward" in vars(module)) == ("forward" in hooks[name])
