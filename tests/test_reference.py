"""Pruning and re-fitting in turns: every round is about the reference model, or refused."""

import copy
import functools
import io
import itertools

import pytest
import torch
from compensating import MARKS, build, compensate, in_both, prune_and_compensate, prune_in_rounds, sparsegpt
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._fingerprints import Fingerprint

pytestmark = MARKS
LEVELS = (0.3, 0.5, 0.6, 0.7)


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def correlated(samples=512):
    made = torch.Generator().manual_seed(1)
    mixed = torch.randn(samples, 8, generator=made) @ torch.randn(8, 32, generator=made)
    return [(x, None) for x in (mixed + 0.3 * torch.randn(samples, 32, generator=made)).split(samples // 2)]


DATA = correlated()


def fresh():
    model = build(mlp, dtype=torch.float32)
    return model, tpe.prunable_parameters(model), copy.deepcopy(model)


def error(model, dense, data=DATA):
    with torch.no_grad():
        y, found = (torch.cat([net(x) for x, _ in data]) for net in (dense, model))
    return float((found - y).square().sum() / (y - y.mean(0)).square().sum())


def error_of(layer, model, dense):
    """Return by how much a layer is off the dense one, for its inputs in both models."""
    _, found, y = in_both(model, dense, layer, DATA)
    return float((found - y).square().sum() / (y - y.mean(0)).square().sum())


def train(model, steps=3, rate=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(DATA[0][0]).square().mean().backward()
        optimizer.step()


def global_then_fit(model, params, level, dense):
    tpe.global_unstructured(params, target_sparsity=level)
    return compensate(model, DATA, params, dense=dense)


def by_size(params):
    return lambda _: {(module, name): getattr(module, name).detach().abs() for module, name in params}


LOOPS = {
    "global and compensate": global_then_fit,
    "splitting": lambda m, p, level, dense: prune_and_compensate(m, DATA, p, target_sparsity=level, dense=dense),
    "units": lambda m, p, level, dense: prune_and_compensate(
        m, DATA, p, target_sparsity=level, unit=tpe.Channel(dim=1), dense=dense
    ),
    "rounds": lambda m, p, level, dense: prune_in_rounds(
        m,
        DATA,
        p,
        lambda _: {(n, k): n.weight.detach().abs() for n, k in p},
        target_sparsity=level,
        steps=2,
        dense=dense,
    ),
    "SparseGPT": lambda m, p, level, dense: sparsegpt(m, DATA, p, target_sparsity=level, dense=dense),
}
SOURCES = {
    "a copy": lambda model, params: copy.deepcopy(model),
    "a state dict": lambda model, params: {k: v.clone() for k, v in model.state_dict().items()},
    "dense_values": tpe.dense_values,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_with_a_reference_ends_near_one_go(loop, source):
    call = LOOPS[loop]
    once, params, dense = fresh()
    call(once, params, LEVELS[-1], dense)
    model, params, _ = fresh()
    reference = SOURCES[source](model, params)
    for level in LEVELS:
        fits = call(model, params, level, reference)
    assert error(model, dense) <= 2 * error(once, dense)
    if loop != "SparseGPT":  # which sees the pruned model's inputs alone
        assert fits[params[-1]].after == pytest.approx(error_of("4", model, dense), rel=1e-3)
    else:
        assert fits[params[-1]].after == pytest.approx(error(model, dense), rel=1e-3)  # the last layer's is the model's


@pytest.mark.parametrize("source", SOURCES)
def test_compensating_again_changes_next_to_nothing(source):
    model, params, dense = fresh()
    reference = SOURCES[source](model, params)
    tpe.global_unstructured(params, target_sparsity=0.7)
    compensate(model, DATA, params)
    first = error(model, dense)
    compensate(model, DATA, params, dense=reference)
    assert error(model, dense) <= 1.05 * first


def loaded(model, params):
    state = copy.deepcopy(model.state_dict())
    compensate(model, DATA, params)
    fitted = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    model.load_state_dict(fitted)


def one_entry(model, params):
    with torch.no_grad():
        place = tuple(model[2].weight_mask.nonzero()[5])
        model[2].weight_orig[place] += 0.01


CHANGES = {
    "re-fitted": lambda model, params: compensate(model, DATA, params),
    "pruned and re-fitted": lambda model, params: prune_and_compensate(model, DATA, params, target_sparsity=0.6),
    "trained": lambda model, params: train(model),
    "trained, and run": lambda model, params: (train(model), model.eval()(DATA[0][0])),
    "loaded": loaded,
    "one entry": one_entry,
    "by .data": lambda model, params: model[0].weight_orig.data.mul_(1.01),
    "another storage": lambda model, params: setattr(model[0].weight_orig, "data", model[0].weight_orig.data * 1.01),
}
FIRST = {
    "ours": lambda params: tpe.global_unstructured(params, target_sparsity=0.5),
    "ours, one by one": lambda params: [tpe.nm_structured(m, n, 2, 4) for m, n in params],
    "native below ours": lambda params: [
        (prune.l1_unstructured(m, n, 0.3), tpe.nm_structured(m, n, 2, 4)) for m, n in params
    ],
    "native above ours": lambda params: [
        (tpe.nm_structured(m, n, 2, 4), prune.l1_unstructured(m, n, 0.3)) for m, n in params
    ],
}


# every two of the three together: each change of each past is seen, and looked for by each call
@pytest.mark.parametrize(
    ("first", "change", "again"),
    [
        (first, change, again)
        for (i, first), (j, change), (k, again) in itertools.product(
            enumerate(FIRST), enumerate(CHANGES), enumerate(LOOPS)
        )
        if (i + j - k) % len(LOOPS) < 2
    ],
)
def test_survivors_that_have_changed_are_refused_without_a_reference(first, change, again):
    model, params, dense = fresh()
    FIRST[first](params)
    CHANGES[change](model, params)
    call = functools.partial(LOOPS[again], model, params, 0.8)
    if again == "global and compensate":
        tpe.global_unstructured(params, target_sparsity=0.75)
        call = functools.partial(compensate, model, DATA, params)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"has changed since it was pruned.*dense="):
        call(dense=None)
    assert not before.differences()
    call(dense=dense)  # the remedy works


NATIVE = {
    "re-fitted": CHANGES["re-fitted"],
    "trained": CHANGES["trained"],
    "trained, and run": CHANGES["trained, and run"],
    "trained, gradients dropped": lambda model, params: (train(model), model.zero_grad()),
    "by .data": CHANGES["by .data"],
}


@pytest.mark.parametrize("change", NATIVE)
def test_changes_under_native_masks_are_seen(change):
    model, params, dense = fresh()
    for module, name in params:
        prune.l1_unstructured(module, name, 0.5)
    NATIVE[change](model, params)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="has changed since it was pruned"):
        compensate(model, DATA, params)
    assert not before.differences()
    compensate(model, DATA, params, dense=dense)
    with pytest.raises(ValueError, match="has changed since it was pruned"):
        compensate(model, DATA, params)


@pytest.mark.parametrize("first", FIRST)
def test_what_has_not_changed_needs_no_reference(first):
    model, params, dense = fresh()
    FIRST[first](params)
    model(DATA[0][0]).sum().backward() if first.startswith("ours") else model(DATA[0][0])
    tpe.global_unstructured(params, target_sparsity=0.75)
    reloaded = torch.load(_saved(model), weights_only=False)
    for each in (model, reloaded):
        start = error(each, dense)
        compensate(each, DATA, [(each[i], "weight") for i in (0, 2, 4)])
        assert error(each, dense) < start


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_not_a_change(to):
    model, params, _ = fresh()
    tpe.global_unstructured(params, target_sparsity=0.5)
    model.to(to)
    compensate(model, [(x.to(to), None) for x, _ in DATA], params)


def test_a_pruned_bias_that_was_trained_is_refused():
    model, params, dense = fresh()
    bn = nn.BatchNorm1d(64)
    bn.weight.data = torch.linspace(0.1, 1, 64)
    tpe.bn_scaling(model[0], "weight", 0.5, bn)
    model[0].bias_orig.data += 0.1
    with pytest.raises(ValueError, match=r"Linear.bias .*has changed since it was pruned"):
        compensate(model, DATA, params)
    compensate(model, DATA, params, dense=dense)


class Trained(nn.Module):
    """Has what training changes beside the listed weights."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.lstm = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.LSTM(16, 16, batch_first=True)
        self.scale, self.b = nn.Parameter(torch.ones(16)), nn.Linear(16, 8)

    def forward(self, x):
        h = torch.relu(self.norm(self.a(x))) * self.scale
        return self.b(self.lstm(h.unsqueeze(1))[0].squeeze(1))


@pytest.mark.parametrize("source", ["a copy", "a state dict"])
def test_the_reference_is_the_whole_dense_model_after_training(source):
    model = build(Trained, dtype=torch.float32)
    params, dense = [(model.a, "weight"), (model.b, "weight")], copy.deepcopy(model).eval()
    values = tpe.dense_values(model, params)
    reference = SOURCES[source](model, params)
    tpe.global_unstructured(params, target_sparsity=0.6)
    train(model, steps=20)
    with pytest.raises(ValueError, match=r"norm\.\w+ has changed since dense_values|scale has changed"):
        compensate(model, DATA, params, dense=values)
    fits = compensate(model, DATA, params, dense=reference)
    model.eval()
    assert fits[model.b, "weight"].after == pytest.approx(error_of("b", model, dense), rel=1e-3)


BAD = {
    "None of these": (lambda model: 3, TypeError, "dense is a int"),
    "another model": (lambda model: nn.Linear(32, 8), ValueError, "dense does not fit"),
    "a part": (lambda model: {"0.weight": model[0].weight.detach()}, ValueError, "lacks .*0.bias"),
    "other shapes": (
        lambda model: {**model.state_dict(), "0.weight": torch.ones(3, 3)},
        ValueError,
        r"0\.weight of shape \(3, 3\)",
    ),
    "not a tensor": (lambda model: {**model.state_dict(), "0.weight": [1.0]}, ValueError, "0.weight of type list"),
    "prefixed": (
        lambda model: {f"module.{k}": v for k, v in model.state_dict().items()},
        ValueError,
        r"names begin with .module\.",
    ),
    "NaN": (
        lambda model: {**model.state_dict(), "0.weight": torch.full((64, 32), float("nan"))},
        ValueError,
        "NaN or infinity",
    ),
    "values of another model": (
        lambda model: tpe.dense_values(nn.Sequential(model[0]), [(model[0], "weight")]),
        ValueError,
        "another model",
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_reference_that_does_not_fit_is_refused(why):
    make, kind, words = BAD[why]
    model, params, _ = fresh()
    dense = make(model)
    tpe.global_unstructured(params, target_sparsity=0.5)
    before = Snapshot(model)
    with pytest.raises(kind, match=words):
        compensate(model, DATA, params, dense=dense)
    assert not before.differences()


def test_a_reference_that_is_pruned_is_refused():
    model, params, _ = fresh()
    tpe.global_unstructured(params, target_sparsity=0.5)
    for dense in (model, model.state_dict()):
        with pytest.raises(ValueError, match="before pruning"):
            compensate(model, DATA, params, dense=dense)
    removed = torch.load(_saved(model), weights_only=False)
    compensate(model, DATA, params, dense=tpe.remove_all(removed))  # as the error says


def test_dense_values_are_refused_where_they_are_lost():
    model, params, _ = fresh()
    tpe.global_unstructured(params, target_sparsity=0.5)
    tpe.dense_values(model, params)  # the values are still there
    train(model)
    with pytest.raises(ValueError, match="has changed since it was pruned"):
        tpe.dense_values(model, params)
    with pytest.raises(ValueError, match="not a part of the model"):
        tpe.dense_values(model[0], fresh()[1])


def test_what_is_not_listed_stays_pruned_in_the_reference_and_a_warning_says_so():
    model, params, dense = fresh()
    tpe.global_unstructured(params[:2], target_sparsity=0.9)
    with pytest.warns(UserWarning, match="nothing was off.*not listed.*dense="):
        compensate(model, DATA, params[2:])
    fits = compensate(model, DATA, params[2:], dense=dense)
    assert fits[params[2]].before > fits[params[2]].after > 0


# ---------------------------------------------------------------------------------------------------- the fingerprints


@settings(max_examples=40)
@given(
    size=st.integers(1, 70_000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_one_changed_entry_is_seen(size, dtype, seed, data):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    taken = Fingerprint.of(values)
    assert taken.matches(values.clone())
    place = data.draw(st.integers(0, size - 1))
    values[place] += 1
    assert not taken.matches(values)


def test_fingerprints_do_not_depend_on_memory():
    values = torch.randn(300, 200)
    taken = Fingerprint.of(values)
    assert taken.matches(values.t().contiguous().t())
    assert not taken.matches(values.t())
    assert taken.matches(values.double())
    assert taken.matches(values.half())
    assert not Fingerprint.of(values[:1]).matches(values[1:2])
    assert Fingerprint.of(torch.zeros(0)).matches(torch.zeros(0))


@pytest.mark.parametrize("loop", LOOPS)
def test_undo_after_a_fit_says_that_it_does_not_bring_the_dense_model_back(loop):
    model, params, _ = fresh()
    LOOPS[loop](model, params, 0.6, None)
    clone = torch.load(_saved(model), weights_only=False)
    with pytest.warns(UserWarning, match=r"re-fitted.*from before pruning"):
        tpe.undo_all(clone)
    with pytest.warns(UserWarning, match="re-fitted"):
        tpe.undo(model[0], "weight")


def test_undo_without_a_fit_is_silent():
    model, params, dense = fresh()
    tpe.global_unstructured(params, target_sparsity=0.6)
    tpe.undo_all(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
