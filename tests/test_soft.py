"""Soft filter pruning: what is small is zero after each update, trains on, and is masked only in the end."""

import copy

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.workflow import soft as soft_module

pytestmark = toys.unwarned


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Flatten()
    )


def convolutions(model):
    return [(model[0], "weight"), (model[3], "weight")]


X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, soft):
    model(torch.randn(8, 1, 6, 6)).square().mean().backward()
    optimizer.step()
    soft.step()
    optimizer.zero_grad()


@given(
    sparsity=st.sampled_from([0.0, 0.25, 0.5]) | st.floats(0, 0.8),
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=3),
    every=st.integers(1, 3),
    scope=st.sampled_from(["layer", "global"]),
    ties=st.booleans(),
)
def test_updates_against_plain_loops(sparsity, sizes, every, scope, ties):
    model = nn.Sequential(*(nn.Linear(3, size) for size in sizes))
    for layer in model:
        if ties:
            layer.weight.data.random_(0, 2).add_(0.5)
    params = [(layer, "weight") for layer in model]
    goal = round(sparsity * sum(sizes))
    if goal > sum(size - 1 for size in sizes):
        with pytest.raises(ValueError, match=r"sparsity=.*floors"):
            tpe.SoftFilterPruner(model, params, sparsity, every=every, scope=scope)
        return
    soft = tpe.SoftFilterPruner(model, params, sparsity, every=every, scope=scope)
    for step in range(2 * every):
        before = [layer.weight.detach().clone() for layer in model]
        biases = [layer.bias.detach().clone() for layer in model]
        soft.step()
        after = [layer.weight.detach() for layer in model]
        assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True))
        if (step + 1) % every:
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            continue
        zero = [[not any(row) for row in weight.tolist()] for weight in after]
        assert sum(map(sum, zero)) == goal
        assert soft.sparsity == goal / sum(sizes)
        for new, old, flags in zip(after, before, zero, strict=True):
            assert torch.equal(new, old * ~torch.tensor(flags)[:, None])  # nothing else changed
        norms = [weight.norm(dim=1).tolist() for weight in before]
        for p, (flags, values) in enumerate(zip(zero, norms, strict=True)):
            for q, (others, more) in enumerate(zip(zero, norms, strict=True)):
                if p == q or (scope == "global" and sum(others) < len(others) - 1):
                    gone = [v for v, flag in zip(values, flags, strict=True) if flag]
                    kept = [v for v, flag in zip(more, others, strict=True) if not flag]
                    assert not gone or not kept or max(gone) <= min(kept) + 1e-6
        for layer in model:
            layer.weight.data.normal_()
    assert not any(prune.is_pruned(layer) for layer in model)


def test_filters_come_back_and_are_chosen_anew():
    model = network()
    nn.init.constant_(model[1].bias, 1.0)  # a ReLU of less has no gradient
    soft = tpe.SoftFilterPruner(model, convolutions(model), 0.5, every=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        train(model, optimizer, soft)
    zero = (model[0].weight == 0).all(3).all(2).all(1)
    assert int(zero.sum()) == 4
    for _ in range(2):
        train(model, optimizer, soft)
    assert not (model[0].weight == 0).any()  # all of them have trained on
    model[0].weight.data[zero] *= 1e3
    train(model, optimizer, soft)
    assert not (model[0].weight[zero] == 0).any()
    assert int((model[0].weight == 0).all(3).all(2).all(1).sum()) == 4
    assert (soft.steps, soft.sparsity) == (6, 0.5)


@pytest.mark.parametrize("paired", [False, True])
def test_masks_in_the_end(paired):
    model = network()
    soft = tpe.SoftFilterPruner(model, convolutions(model), 0.5, every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        train(model, optimizer, soft)
    model.eval()
    before = model(X)
    soft.harden(tpe.bn_pairs(model, X) if paired else ())
    kept = model[0].weight_mask.amax((1, 2, 3))
    assert torch.equal(kept, (model[0].weight_orig != 0).any(3).any(2).any(1).float())
    assert int(kept.sum()) == 4
    if paired:
        channels = model[:2](X)
        assert not channels[:, kept == 0].any()
        assert channels[:, kept == 1].any()
        for module, name in ((model[0], "bias"), (model[1], "weight"), (model[1], "bias")):
            assert torch.equal(getattr(module, f"{name}_mask"), kept)
    else:
        assert torch.equal(model(X), before)
        assert not prune.is_pruned(model[1])
    assert tpe.history(model[0], "weight") == [f"SoftFilterPruner(sparsity=0.5, unit={str(tpe.Channel(0))!r}, every=2)"]
    masks = model[0].weight_mask.clone()
    for _ in range(4):
        train(model, optimizer, soft)
    assert torch.equal(model[0].weight_mask, masks)


def test_a_schedule_and_a_state():
    model = network()
    schedule = tpe.schedules.linear(0, 7, final=0.5)
    soft = tpe.SoftFilterPruner(model, convolutions(model), schedule, every=2, scope="global")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = None
    for step in range(10):
        if step == 5:
            twin = copy.deepcopy(model)
            other = tpe.SoftFilterPruner(twin, convolutions(twin), schedule, every=2, scope="global")
            other.load_state_dict(soft.state_dict())
        torch.manual_seed(step)
        train(model, optimizer, soft)
        if twin is not None:
            torch.manual_seed(step)
            train(twin, torch.optim.SGD(twin.parameters(), 0.1), other)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        if step % 2:
            assert soft.sparsity == round(schedule(step) * 14) / 14
    for bad, error, words in (
        ([], TypeError, "is a list"),
        ({}, ValueError, "Make the pruner as that one was"),
        ({**soft.state_dict(), "every": 3}, ValueError, "'every': 3"),
        ({**soft.state_dict(), "steps": -3}, ValueError, r"state_dict\['steps'\]=-3"),
    ):
        with pytest.raises(error, match=words):
            other.load_state_dict(bad)
    assert other.steps == 10


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"model": 3}, TypeError, "model=3"),
        ({"params": []}, ValueError, r"params=\[\]"),
        ({"params": [(nn.Linear(2, 2), "weight")]}, ValueError, "not a part of"),
        ({"sparsity": 1.0}, ValueError, "sparsity=1.0"),
        ({"sparsity": "half"}, TypeError, "sparsity='half'"),
        ({"sparsity": 0.99}, ValueError, "sparsity=0.99: "),
        ({"unit": tpe.NM(2, 4)}, TypeError, "fixes the sparsity itself"),
        ({"every": 0}, ValueError, "every=0"),
        ({"scope": "all"}, ValueError, "scope='all'"),
    ],
)
def test_bad_arguments_are_named(bad, error, words):
    model = network()
    picture = Snapshot(model)
    arguments = {"model": model, "params": convolutions(model), "sparsity": 0.5, "every": 1, **bad}
    with pytest.raises(error, match=words):
        tpe.SoftFilterPruner(**arguments)
    assert picture.differences() == []


def test_bad_pairs_are_named():
    model = network()
    pairs = tpe.bn_pairs(model, X)
    only = tpe.SoftFilterPruner(model, convolutions(model)[:1], 0.5, every=1)
    kernels = tpe.SoftFilterPruner(model, convolutions(model), 0.5, tpe.Kernel(), every=1)
    picture = Snapshot(model)
    for soft, given_pairs, error, words in (
        (only, pairs, ValueError, r"pairs\[1\], Conv2d: its weight is not in params"),
        (kernels, pairs, ValueError, r"pairs\[0\], Conv2d: unit=Kernel\(\) is not its output channels"),
        (only, [model[0]], TypeError, "is not a"),
        (only, model, TypeError, "pairs is a Sequential"),
    ):
        with pytest.raises(error, match=words):
            soft.harden(given_pairs)
        assert picture.differences() == []


def test_an_error_leaves_no_trace(monkeypatch):
    model = network()
    soft = tpe.SoftFilterPruner(model, convolutions(model), 0.5, every=1)
    model[3].weight.data[0, 0, 0, 0] = float("inf")
    picture = Snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        soft.step()
    assert picture.differences() == []
    assert soft.steps == 0
    model[3].weight.data[0, 0, 0, 0] = 1.0
    tpe.prune_to(convolutions(model), 0.2)
    picture = Snapshot(model)
    calls = []

    def interrupted(target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(soft_module, "renew", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soft.step()
    assert picture.differences() == []
    assert soft.steps == 0
