"""Batches of every kind, and parameters that are tied, frozen or listed twice."""

import collections

import pytest
import torch
import torch.nn.functional as F
from calibrating import (
    CALLS,
    Own,
    build,
    calibration,
    close,
    compare,
    every_call,
    tanh_net,
    whole,
)
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tanh_net().double()

    def forward(self, left, right):
        return self.inner(left * right)


Named = collections.namedtuple("Named", ["left", "right"])


@every_call
def test_all_kinds_of_batches_say_the_same(call):
    inner, batches, params = build()
    torch.manual_seed(0)
    model = Two()
    model.inner = inner
    expected = call(inner, F.cross_entropy, batches, params)
    two = [(torch.full_like(x, 2.0), x / 2, t) for x, t in batches]
    loaders = {
        "tuples": ([((a, b), t) for a, b, t in two], F.cross_entropy, {}),
        "lists": ([[[a, b], t] for a, b, t in two], F.cross_entropy, {}),
        "named": ([(Named(a, b), t) for a, b, t in two], F.cross_entropy, {}),
        "prepared": (two, F.cross_entropy, {"prepare": lambda batch: (batch[:2], batch[2])}),
        "keywords": ([({"right": b, "left": a}, t) for a, b, t in two], F.cross_entropy, {}),
        "targets in a tree": (
            [((a, b), {"label": t, "name": "text", "no": None}) for a, b, t in two],
            lambda out, targets: F.cross_entropy(out, targets["label"]),
            {},
        ),
    }
    for loader, loss_fn, options in loaders.values():
        found = call(model, loss_fn, loader, params, **options)
        compare(found, params, list(expected.values()), atol=1e-12)
    wide = [*batches, (torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.long))]
    found = call(inner, F.cross_entropy, wide, params, max_batches=3)
    compare(found, params, list(expected.values()), rtol=0, atol=0)
    if call.func is not calibration.grasp:
        found = call(inner, F.cross_entropy, iter(wide), params, max_batches=3)
        compare(found, params, list(expected.values()), rtol=0, atol=0)
    data = torch.utils.data.TensorDataset(*whole(batches))
    found = call(inner, F.cross_entropy, torch.utils.data.DataLoader(data, batch_size=8), params)
    if call is not CALLS["taylor, batch"] and call is not CALLS["hutchinson"] and call is not CALLS["ggn, sampled"]:
        compare(found, params, list(expected.values()), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CALLS if "ggn" not in name])
def test_dictionary_batches(name):
    inner, batches, params = build()
    model = Own()
    model.inner = inner
    expected = CALLS[name](inner, F.cross_entropy, batches, params)
    loader = [{"x": x, "labels": t} for x, t in batches]
    found = CALLS[name](model, lambda out, batch: out["loss"], loader, params)
    compare(found, params, list(expected.values()), atol=1e-12)
    found = CALLS[name](model, lambda out, batch: F.cross_entropy(out["logits"], batch["labels"]), loader, params)
    compare(found, params, list(expected.values()), atol=1e-12)


@every_call
def test_targets_may_be_none(call):
    model, batches, params = build()
    expected = call(model, lambda out, _: out.square().mean(), batches, params)
    found = call(model, lambda out, _: out.square().mean(), [(x, None) for x, _ in batches], params)
    compare(found, params, list(expected.values()), rtol=1e-12)


def test_progress_bars_are_shown_and_silenced(capfd):
    pytest.importorskip("tqdm")
    model, batches, params = build()
    args = model, F.cross_entropy, batches, params
    calibration.gradients(*args, progress=False)
    assert capfd.readouterr() == ("", "")
    calibration.gradients(*args, progress=True, max_batches=2)
    assert "/2 [" in capfd.readouterr().err
    calibration.gradients(model, F.cross_entropy, iter(batches), params)
    assert "gradients" in capfd.readouterr().err


@every_call
def test_the_list_may_repeat_itself_and_be_an_iterator(call):
    model, batches, params = build()
    expected = call(model, F.cross_entropy, batches, params)
    found = call(model, F.cross_entropy, batches, iter([*params, *params]))
    compare(found, params, list(expected.values()), rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("hutchinson", "snip")])
def test_tied_parameters_have_one_statistic_under_both_names(name):
    model = Tied()
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    both = [(model.encoder, "weight"), (model.decoder, "weight")]
    alone = CALLS[name](model, F.cross_entropy, batches, both[:1])
    found = CALLS[name](model, F.cross_entropy, batches, both)
    for key in both:
        close(found[key], alone[both[0]])
    assert found[both[0]].any()


def test_tied_parameters_share_their_random_probes():
    model = Tied()
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    both = [(model.encoder, "weight"), (model.decoder, "weight")]
    options = {"method": "hutchinson", "samples": 5, "progress": False}
    alone = calibration.hessian_diagonal(model, F.cross_entropy, batches, both[:1], **options)
    found = calibration.hessian_diagonal(model, F.cross_entropy, batches, both, **options)
    for key in both:
        close(found[key], alone[both[0]])
        close(found.standard_error[key], alone.standard_error[both[0]])


def test_tied_parameters_stay_tied_while_pruned():
    model, twin = Tied(), Tied()
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    both = [(model.encoder, "weight"), (model.decoder, "weight")]
    tpe.global_unstructured(both, amount=0.5)
    with torch.no_grad():
        twin.encoder.weight.mul_(model.encoder.weight_mask)
    expected = calibration.gradients(twin, F.cross_entropy, batches, [(twin.encoder, "weight")], progress=False)
    before = Snapshot(model)
    found = calibration.gradients(model, F.cross_entropy, batches, both, progress=False)
    for key in both:
        close(found[key], expected[twin.encoder, "weight"])
    assert before.differences() == []


def test_tied_parameters_in_synflow_count_once():
    model = Tied()
    both = [(model.encoder, "weight"), (model.decoder, "weight")]
    scores = calibration.synflow(model, torch.zeros(1, 3), both, target_sparsity=0.4, steps=5)
    assert torch.equal(scores[both[0]], scores[both[1]])
    assert int((scores[both[0]] >= 5).sum()) == 9 - round(0.4 * 9)


@every_call
def test_frozen_parameters_have_statistics_and_stay_frozen(call):
    model, batches, params = build()
    expected = call(model, F.cross_entropy, batches, params)
    model.requires_grad_(False)
    before = Snapshot(model)
    with torch.no_grad():
        found = call(model, F.cross_entropy, batches, params)
        assert not torch.is_grad_enabled()
    compare(found, params, list(expected.values()), atol=1e-14)
    assert before.differences() == []
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in found.values())
