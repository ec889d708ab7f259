"""Lottery tickets: values rewound exactly, masks that only shrink, and the control experiment."""

import pickle

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.workflow import tickets

pytestmark = toys.unwarned


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).to(dtype)


def train(model, steps=3, optimizer=None):
    model.train()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 0.1, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 6, 6, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return optimizer


def dense(model):
    """Return all values by the names that the tensors have without pruning, masks left out."""
    state = model.state_dict()
    return {key.removesuffix("_orig"): value.clone() for key, value in state.items() if not key.endswith("_mask")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def masks(model):
    return [module.weight_mask.clone() for _, module, _ in tpe.pruned_parameters(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["dense", "pruned"])
def test_rounds_rewind_all_values_exactly_and_masks_only_shrink(dtype, before):
    model = network(dtype=dtype)
    if before:
        prune.l1_unstructured(model[4], "weight", 30)
    params = tpe.prunable_parameters(model)
    ticket = tpe.LotteryTicket(model, params)
    first, left, last = dense(model), 356 - 30 * before, None
    for _ in range(4):
        train(model)
        scores = [
            (m._parameters.get("weight_orig", m._parameters.get("weight")) * m._buffers.get("weight_mask", 1))
            .abs()
            .detach()
            for m, _ in params
        ]
        ticket.prune(0.2)
        left -= round(0.2 * left)
        now = masks(model)
        assert sum(int(mask.sum()) for mask in now) == left
        assert ticket.sparsity == (356 - left) / 356
        kept = torch.cat([s[m != 0] for s, m in zip(scores, now, strict=True)])
        gone = torch.cat([s[m == 0] for s, m in zip(scores, now, strict=True)])
        assert kept.min() >= gone.max()
        assert last is None or all(bool((a <= b).all()) for a, b in zip(now, last, strict=True))
        ticket.rewind()
        assert same(dense(model), first)
        assert all(torch.equal(a, b) for a, b in zip(masks(model), now, strict=True))
        for module, _ in params:
            assert torch.equal(module.weight, module.weight_orig * module.weight_mask)  # no stale product
        last = now
    train(model)
    tpe.remove_all(model)


def test_a_later_point_and_running_statistics():
    model = network()
    params = tpe.prunable_parameters(model)
    ticket = tpe.LotteryTicket(model, params)
    train(model, 2)
    later = dense(model)
    assert int(model[1].num_batches_tracked) == 2
    ticket.rewind_point()
    train(model)
    ticket.prune(0.5)
    ticket.rewind()
    assert same(dense(model), later)
    assert int(model[1].num_batches_tracked) == 2


def test_training_from_the_ticket_is_training_of_the_masked_beginning():
    model = network()
    params = tpe.prunable_parameters(model)
    beginning = network()
    ticket = tpe.LotteryTicket(model, params)
    optimizer = train(model)
    ticket.prune(0.5)
    ticket.rewind(optimizer)
    assert optimizer.state == {}
    assert all(parameter.grad is None for parameter in model.parameters())
    for (module, _), other in zip(params, (beginning[0], beginning[4]), strict=True):
        prune.custom_from_mask(other, "weight", module.weight_mask)
    for each in (model, beginning):
        torch.manual_seed(5)
        train(each, optimizer=optimizer if each is model else None)
    assert same(dense(model), dense(beginning))


def test_tied_weights_are_remembered_once_and_pruned_alike():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    ticket = tpe.LotteryTicket(model, [(a, "weight"), (b, "weight")])
    values = ticket.state_dict()
    assert values["0.weight"] is values["1.weight"]
    first = a.weight.detach().clone()
    a.weight.data.normal_()
    ticket.prune(0.5)
    ticket.rewind()
    assert a.weight_orig is b.weight_orig
    assert torch.equal(a.weight_orig, first)
    assert torch.equal(a.weight_mask, b.weight_mask)
    assert int(a.weight_mask.sum()) == 18
    ticket.reinitialize(seed=1)
    assert a.weight_orig is b.weight_orig
    assert not torch.equal(a.weight_orig, first)
    assert torch.equal(b.weight, b.weight_orig * b.weight_mask)


def test_units_scopes_and_criteria():
    model = network()
    params = tpe.prunable_parameters(model)
    ticket = tpe.LotteryTicket(model, params)
    ticket.prune(0.25, unit=tpe.Channel(0), scope={params[0]: 0.5})
    assert int(model[0].weight_mask.amax((1, 2, 3)).sum()) == 3
    assert not prune.is_pruned(model[4])
    ticket.prune(0.5, tpe.calibration.random(params), scope={params[1]: 0.9})
    assert int(model[4].weight_mask.sum()) == 160
    ticket.prune(0.0)
    assert int(model[4].weight_mask.sum()) == 160


@given(rate=st.floats(0, 0.9), sizes=st.lists(st.integers(2, 6), min_size=2, max_size=3), rounds=st.integers(1, 4))
def test_each_round_takes_its_fraction_of_what_is_left(rate, sizes, rounds):
    model = nn.Sequential(*(nn.Linear(size, 5) for size in sizes))
    params = tpe.prunable_parameters(model)
    ticket = tpe.LotteryTicket(model, params)
    left = 5 * sum(sizes)
    for _ in range(rounds):
        goes = round(rate * left)
        if left - goes < len(sizes):  # one entry of each tensor stays
            with pytest.raises(ValueError, match=f"amount={rate} of the {left} entries left: .*(floors|all of them)"):
                ticket.prune(rate)
            return
        ticket.prune(rate)
        left -= goes
        alive = [m._buffers.get("weight_mask", torch.ones(m.weight.shape)).sum() for m, _ in params]
        assert int(sum(alive)) == left


def test_reinitialized_values_are_those_of_a_new_model_under_the_same_masks():
    model = network()
    params = tpe.prunable_parameters(model)
    ticket = tpe.LotteryTicket(model, params)
    first = dense(model)
    train(model)
    ticket.prune(0.5)
    kept, state = masks(model), torch.get_rng_state()
    ticket.reinitialize(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    one = dense(model)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), kept, strict=True))
    assert torch.equal(model[4].weight, model[4].weight_orig * kept[1])
    train(model)
    ticket.reinitialize(seed=3)
    assert same(dense(model), one)
    ticket.reinitialize(seed=4)
    other = dense(model)
    assert not torch.equal(other["4.weight"], one["4.weight"])
    # as the constructors do: uniform within 1 / sqrt(fan in), BatchNorm with ones and zeros
    assert 0.1 < float(other["4.weight"].abs().max()) <= 1 / 8
    assert float(other["0.bias"].abs().max()) <= 1 / 3
    assert bool((other["1.weight"] == 1).all())
    assert int(other["1.num_batches_tracked"]) == 0
    ticket.rewind()
    assert same(dense(model), first)  # what is remembered stays


def test_attention_is_initialized_as_its_constructor_does():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    ticket = tpe.LotteryTicket(model, [(model.out_proj, "weight"), (model, "in_proj_weight")])
    ticket.prune(0.5)
    ticket.reinitialize(seed=0)
    torch.manual_seed(0)
    limit = (6 / (8 + 24)) ** 0.5
    assert 0.9 * limit < float(model.in_proj_weight_orig.detach().abs().max()) <= limit
    assert not model.in_proj_bias.any()
    assert not model.out_proj.bias.any()


def test_models_with_initializations_of_their_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))
            self.head = nn.Linear(3, 3)

    model = Own()
    ticket = tpe.LotteryTicket(model, [(model.head, "weight")])
    ticket.prune(0.5)
    picture = Snapshot(model)
    for call in (lambda: ticket.reinitialize(0), lambda: ticket.compare(lambda model: 0.0)):
        with pytest.raises(ValueError, match=r"a Own, has parameters and no reset_parameters\(\).*Pass initialize="):
            call()
        assert picture.differences() == []

    def initialize(model):
        nn.init.constant_(model.scale, 7)
        nn.init.constant_(model.head.weight, 3)
        model.head.bias = nn.Parameter(torch.ones(3))

    bias = model.head.bias
    ticket.reinitialize(initialize=initialize)
    assert model.head.bias is bias
    assert bool((model.scale == 7).all() and (model.head.weight_orig == 3).all() and (bias == 1).all())
    assert int((model.head.weight == 3).sum()) == 5
    parametrized = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    other = tpe.LotteryTicket(parametrized, [(parametrized[0].parametrizations.weight, "original1")])
    with pytest.raises(ValueError, match="no reset_parameters"):
        other.reinitialize()


def test_one_call_compares_with_random_values():
    model = network()
    ticket = tpe.LotteryTicket(model, tpe.prunable_parameters(model))
    first = dense(model)
    train(model)
    ticket.prune(0.5)
    seen = []

    def run(model):
        seen.append(dense(model))
        train(model, 1)
        return torch.tensor(float(len(seen)))

    found = ticket.compare(run, seeds=(3, 4))
    assert (found.sparsity, found.ticket, found.reinitialized, found.gain) == (0.5, 1.0, (2.0, 3.0), -1.5)
    assert same(seen[0], first)
    for values, seed in zip(seen[1:], (3, 4), strict=True):
        ticket.reinitialize(seed)
        assert same(dense(model), values)
        ticket.rewind()
    assert same(dense(model), first)
    assert pickle.loads(pickle.dumps(found)) == found
    for bad, error, words in (
        (lambda model: "good", TypeError, r"run\(model\) gave a str"),
        (lambda model: float("nan"), ValueError, r"run\(model\) gave nan"),
    ):
        train(model, 1)
        with pytest.raises(error, match=words):
            ticket.compare(bad)
        assert same(dense(model), first)  # rewound, also after an error
    for bad, error, words in ((0, TypeError, "run=0"), (run, ValueError, r"seeds=\(\)")):
        with pytest.raises(error, match=words):
            ticket.compare(bad, seeds=())


def test_what_is_remembered_can_be_saved_and_lives_where_asked(tmp_path):
    model = network()
    ticket = tpe.LotteryTicket(model, tpe.prunable_parameters(model), device="cpu")
    first = dense(model)
    train(model)
    ticket.prune(0.5)
    torch.save({"model": model.state_dict(), "ticket": ticket.state_dict()}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    fresh = network(1)
    other = tpe.LotteryTicket(fresh, tpe.prunable_parameters(fresh))
    tpe.load_pruned_state_dict(fresh, saved["model"])
    other.load_state_dict(saved["ticket"])
    saved["ticket"]["0.weight"].fill_(9)  # a copy is remembered
    other.rewind()
    assert same(dense(fresh), first)
    assert all(torch.equal(a, b) for a, b in zip(masks(fresh), masks(model), strict=True))
    for bad, error, words in (
        (3, TypeError, "is a int"),
        ({"a": 1}, TypeError, "is a dict"),
        ({}, ValueError, "0.bias"),
        ({**first, "4.bias": torch.ones(6)}, ValueError, r"4.bias has the shape \(5,\), but \(6,\)"),
    ):
        with pytest.raises(error, match=words):
            other.load_state_dict(bad)
    other.rewind()
    assert same(dense(fresh), first)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda ticket: tpe.LotteryTicket("model", []), TypeError, "model='model'"),
        (lambda ticket: tpe.LotteryTicket(ticket.model, []), ValueError, r"params=\[\]"),
        (lambda ticket: tpe.LotteryTicket(ticket.model, [(nn.Linear(2, 2), "weight")]), ValueError, "not a part of"),
        (lambda ticket: tpe.LotteryTicket(nn.LazyLinear(2), []), ValueError, "has no shape yet"),
        (lambda ticket: ticket.prune(1.0), ValueError, r"amount=1.0 is not in \[0, 1\)"),
        (lambda ticket: ticket.prune(2), ValueError, "amount=2"),
        (lambda ticket: ticket.prune("0.2"), TypeError, "amount='0.2'"),
        (lambda ticket: ticket.prune(0.2, "gradient"), ValueError, "criterion='gradient'"),
        (lambda ticket: ticket.prune(0.2, unit=tpe.NM(2, 4)), TypeError, "fixes the sparsity itself"),
        (lambda ticket: ticket.prune(0.999), ValueError, "amount=0.999 of the 352 entries left: takes all"),
        (lambda ticket: ticket.rewind(torch.optim.SGD), TypeError, "optimizer is a type"),
        (lambda ticket: ticket.reinitialize(-1), ValueError, "seed=-1"),
        (lambda ticket: ticket.reinitialize(0, 3), TypeError, "initialize=3"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    model = network()
    prune.l1_unstructured(model[0], "weight", 4)
    ticket = tpe.LotteryTicket(model, tpe.prunable_parameters(model))
    picture = Snapshot(model)
    with pytest.raises(error, match=words):
        call(ticket)
    assert picture.differences() == []


def test_a_model_that_was_rebuilt_is_refused():
    model = network()
    ticket = tpe.LotteryTicket(model, tpe.prunable_parameters(model))
    model.add_module("5", nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"other tensors than at the rewind point: 5.bias, 5.weight"):
        ticket.rewind()
    ticket.rewind_point()
    ticket.rewind()


@pytest.mark.parametrize("call", ["rewind", "reinitialize"])
def test_ctrl_c_leaves_the_values_as_they_were(call, monkeypatch):
    model = network()
    ticket = tpe.LotteryTicket(model, tpe.prunable_parameters(model))
    train(model)
    ticket.prune(0.5)
    before, picture = dense(model), masks(model)
    real, calls = tickets.refresh, []

    def interrupted(model):
        calls.append(model)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(model)

    monkeypatch.setattr(tickets, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(ticket, call)()
    assert same(dense(model), before)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), picture, strict=True))
