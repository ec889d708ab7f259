"""Refining with what goes wrong in other people's hands: losses, optimizers, blocks, half precision, inference mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from snapshots import Snapshot
from test_refining import QUIET, Block, Stack, adam, aside_error, data, made
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.compensation import coroutines

pytestmark = pytest.mark.usefixtures("no_thread_left")
both = pytest.mark.parametrize("whole", [False, True])


def refused(match, model, batches, error=ValueError, **options):
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        tpe.refine(model, batches, **{"epochs": 1, **options}, **QUIET)
    assert not before.differences()


# -------------------------------------------------------------------------------------------------------------- losses


def nothing(output, dense):
    return (output - dense).sum() * float("nan")


@both
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("loss", "match", "error"),
    [
        (nothing, "loss= gave NaN or infinity", ValueError),
        (lambda a, b: a - b, r"loss= gave a tensor of shape \(8, 4, 3\), not a number", ValueError),
        (lambda a, b: 1.5, "loss= gave a float, not a tensor", TypeError),
        (lambda a, b: None, "loss= gave a NoneType, not a tensor", TypeError),
        (lambda a, b: (a.argmax(-1) != b.argmax(-1)).sum(), "loss= gave a tensor of torch.int64", ValueError),
    ],
    ids=["nan", "vector", "float", "none", "integer"],
)
def test_a_loss_that_is_not_one(loss, match, error, alone, whole):
    model, dense, _ = made(layers=2)
    blocks = [model] if alone else None
    refused(match, model, data(), error, dense=dense, loss=loss, whole=whole, blocks=blocks)


@pytest.mark.parametrize("alone", [False, True])
def test_a_loss_without_gradient_is_refused_where_it_is_gone_down(alone):
    model, dense, _ = made(layers=2)
    how = {"dense": dense, "loss": lambda a, b: (a - b).detach().square().mean()}
    refused("loss= .* no gradient", model, data(), whole=True, blocks=[model] if alone else None, **how)


def test_a_loss_without_gradient_may_decide_in_sequence():
    model, dense, _ = made(layers=2, seed=1)

    def differing(output, target):
        return (output.argmax(-1) != target.argmax(-1)).float().mean()

    done = tpe.refine(model, data(), dense=dense, loss=differing, epochs=2, optimizer=adam(1e-2), **QUIET)
    assert done.model.best
    assert done.model.after <= done.model.before


# ---------------------------------------------------------------------------------------------------------- optimizers


class OfItself(torch.optim.SGD):
    """Reads the gradients that are there."""

    def step(self, closure=None):
        return super().step()


class WithoutArguments(torch.optim.SGD):
    def step(self):
        return super().step()


@both
@pytest.mark.parametrize("kind", [OfItself, WithoutArguments])
def test_an_optimizer_that_does_not_ask_for_gradients(kind, whole):
    model, dense, _ = made(layers=2)
    refused(
        f"a {kind.__name__}, whose step.* closure",
        model,
        data(),
        dense=dense,
        whole=whole,
        optimizer=lambda parameters: kind(parameters, lr=1e-2),
    )


@both
def test_an_optimizer_that_is_made_with_other_values_does_not_make_it_worse(whole):
    model, dense, _ = made(layers=2, seed=1)

    def emptied(parameters):
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        return torch.optim.SGD(parameters, lr=1e-9)

    before = aside_error(model, dense, data(), 0.1)
    done = tpe.refine(model, data(), dense=dense, whole=whole, epochs=2, optimizer=emptied, **QUIET)
    assert done.model.best == 0
    assert done.model.before == done.model.after == pytest.approx(before)
    assert aside_error(model, dense, data(), 0.1) == before


# -------------------------------------------------------------------------------------------------------------- blocks


class Passing(Block):
    """Gives what it got."""

    def forward(self, x, *, keep=None):
        super().forward(x)
        return (x,)


class Cut(Block):
    """Gives what has no gradient."""

    def forward(self, x, *, keep=None):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [Passing, Cut])
def test_a_block_whose_output_nothing_can_change(kind):
    model, dense, _ = made(lambda layers: Stack(layers, kind), layers=2)
    refused("layers.0 gives what does not depend on any of its tensors that may change", model, data(), dense=dense)


@pytest.mark.parametrize("kind", [Passing, Cut])
def test_a_model_whose_output_nothing_can_change(kind):
    model, dense, _ = made(lambda layers: Stack(layers, kind), layers=2)
    for module in (model.stem, model.head):
        module.requires_grad_(False)
    refused("depends on nothing that may change", model, data(), dense=dense, whole=True)


def test_blocks_in_which_nothing_may_change():
    model, dense, _ = made(layers=2)
    model.layers.requires_grad_(False)
    refused("nothing in blocks may change: layers.0, layers.1 .* whole=True", model, data(), dense=dense)
    done = tpe.refine(model, data(), dense=dense, epochs=1, whole=True, **QUIET)
    assert done.model.epochs == 1


class Later(Stack):
    """Calls the last block on short sequences never, once or twice."""

    times = 0

    def forward(self, x):
        short, x = x.shape[1] == 3, self.layers[0](self.stem(x))[0]
        for _ in range(self.times if short else 1):
            x = self.layers[1](x)[0]
        return self.head(x)


@both
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("aside", [False, True])
def test_blocks_that_only_later_batches_call_twice_or_never(times, aside, window, whole, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    monkeypatch.setattr(Later, "times", times)
    model, dense, _ = made(Later, layers=2)
    short = data(2, 8, (3, 5))
    how = {"held_out": short} if aside else {}
    match = "batches .*take different ways through the model. Pass such that call the same"
    refused(match, model, data(4) + ([] if aside else short), dense=dense, whole=whole, **how)
    done = tpe.refine(model, data(4) + short, dense=dense, blocks=[model], epochs=1, whole=whole, **QUIET)
    assert done.model.epochs == 1


# ------------------------------------------------------------------------------------------- half precision, inference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_are_not_lost_in_half_precision(dtype):
    """Not even those of a mean over very many outputs, for which a factor stands here."""
    model, dense, _ = made(layers=1, seed=1)
    model, dense, batches = model.to(dtype), dense.to(dtype), [x.to(dtype) for x in data()]

    def fine(parameters):
        return torch.optim.Adam(parameters, lr=1e-2, eps=1e-20)

    def small(output, target):
        return 1e-7 * (output.float() - target.float()).square().mean()

    done = tpe.refine(model, batches, dense=dense, loss=small, blocks=[model], optimizer=fine, **QUIET)
    assert done.model.after < 0.5 * done.model.before


def test_gradients_beyond_the_range_of_half_precision():
    """A loss of its own may have gradients that are large enough already."""
    model, dense, _ = made(layers=1, seed=1)
    model, dense, batches = model.half(), dense.half(), [x.half() for x in data()]

    def steep(output, target):
        return 1e3 * (output.float() - target.float()).square().sum()

    done = tpe.refine(model, batches, dense=dense, loss=steep, blocks=[model], epochs=2, optimizer=adam(1e-2), **QUIET)
    assert done.model.best


@both
def test_data_that_was_made_in_inference_mode(whole):
    results = []
    for inference in (False, True):
        model, dense, _ = made(layers=2, seed=1)
        with torch.inference_mode(inference):
            batches = data()
            done = tpe.refine(model, batches, dense=dense, whole=whole, epochs=2, optimizer=adam(1e-2), **QUIET)
        results.append((done, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert results[0][0].model.best
    assert all(map(torch.equal, results[0][1].values(), results[1][1].values()))


def test_statistics_of_data_that_was_made_in_inference_mode():
    layer = nn.Linear(4, 3)
    with torch.inference_mode():
        batches = [(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))]
    plain = [(x.clone(), y.clone()) for x, y in batches]
    params = [(layer, "weight")]
    found, wanted = (
        tpe.calibration.gradients(layer, F.cross_entropy, each, params, **QUIET) for each in (batches, plain)
    )
    assert torch.equal(found[layer, "weight"], wanted[layer, "weight"])
    assert batches[0][0].is_inference()


def test_shares_of_data_that_was_made_in_inference_mode():
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), []
    plain = [torch.randn(30, 6) for _ in range(4)]
    with torch.inference_mode():
        made_there = [x.clone() for x in plain]
    for batches in (plain, made_there):
        again = copy.deepcopy(model)
        tpe.prune_and_compensate(
            again, batches, tpe.prunable_parameters(again), target_sparsity=0.5, allocation="auto", **QUIET
        )
        found.append(again.state_dict())
    assert all(map(torch.equal, found[0].values(), found[1].values()))
