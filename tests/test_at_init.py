"""SynFlow and random scores: what is known without data."""

import functools
import itertools

import pytest
import torch
from calibrating import (
    build,
    calibration,
    close,
    equal,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def bias_free(*widths, conv=False, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    if conv:
        layers = [nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, bias=False),
                  nn.Flatten(), *layers]  # fmt: skip
    return nn.Sequential(*layers), [(m, "weight") for m in layers if hasattr(m, "weight")]


def flow(weights):
    """Return the paths through each weight of a stack of linear layers, with all in absolute value."""
    weights = [w.abs() for w in weights]
    ahead, back = [torch.ones(weights[0].shape[1], dtype=torch.float64)], [torch.ones(len(weights[-1])).double()]
    for w in weights[:-1]:
        ahead.append(w @ ahead[-1])
    for w in weights[:0:-1]:
        back.insert(0, back[0] @ w)
    return [b[:, None] * w * a[None] for w, a, b in zip(weights, ahead, back, strict=True)]


def test_synaptic_flow_is_that_of_the_paths_and_is_conserved():
    model, params = bias_free(5, 4, 6, 3)
    scores = calibration.synflow(model, torch.zeros(1, 5), params, target_sparsity=0.0, steps=1)
    expected = flow([m.weight.detach().double() for m, _ in params])
    largest = max(float(e.max()) for e in expected)
    for key, wanted in zip(params, expected, strict=True):
        close((scores[key] - 1) * 2 * largest, wanted, rtol=1e-9)
    sums = [float((scores[key] - 1).sum()) for key in params]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    model, params = bias_free(4, 5, 2, conv=True)
    scores = calibration.synflow(model, torch.zeros(2, 1, 6, 6), params, target_sparsity=0.0, steps=1)
    sums = [float((scores[key] - 1).sum()) for key in params]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-12)


def synflow_by_hand(weights, target, steps):
    """Algorithm 1 for a stack of linear layers: sort all, keep the best, again."""
    masks = [torch.ones_like(w) for w in weights]
    total = sum(w.numel() for w in weights)
    for step in range(1, steps + 1):
        scores = torch.cat([s.reshape(-1) for s in flow([w * m for w, m in zip(weights, masks, strict=True)])])
        keep = round(total * (1 - target) ** (step / steps))
        best = torch.zeros(total, dtype=torch.float64)
        best[scores.argsort(descending=True, stable=True)[:keep]] = 1
        pieces = best.split([w.numel() for w in weights])
        masks = [p.view(w.shape) for p, w in zip(pieces, weights, strict=True)]
    return masks


@pytest.mark.parametrize(("target", "steps"), [(0.5, 1), (0.9, 7), (0.97, 100), (0.999, 100)])
def test_one_global_call_prunes_as_the_iteration_and_collapses_no_layer(target, steps):
    widths = (40, 60, 50, 40, 10)
    model, params = bias_free(*widths)
    expected = synflow_by_hand([m.weight.detach().double() for m, _ in params], target, steps)
    scores = calibration.synflow(model, torch.zeros(1, 40), params, target_sparsity=target, steps=steps)
    assert all(float(s.min()) >= 0 and float(s.max()) <= steps + 1 for s in scores.values())
    _, others = bias_free(*widths)
    tpe.global_unstructured(params, target_sparsity=target, importance_scores=scores, min_keep=0)
    native = dict(zip(others, scores.values(), strict=True))
    prune.global_unstructured(others, prune.L1Unstructured, importance_scores=native, amount=target)
    for (module, _), (other, _), mask in zip(params, others, expected, strict=True):
        equal(module.weight_mask.double(), mask)
        equal(other.weight_mask.double(), mask)
        if steps == 100:
            assert mask.any()
    if steps == 100:
        assert model(torch.ones(1, 40)).any()


def test_one_round_would_have_collapsed_a_layer():
    model, params = bias_free(40, 60, 50, 40, 10)
    scores = calibration.synflow(model, torch.zeros(1, 40), params, target_sparsity=0.999, steps=1)
    with pytest.warns(UserWarning, match="emptied"):
        tpe.global_unstructured(params, target_sparsity=0.999, importance_scores=scores, min_keep=0)
    assert not all(m.weight_mask.any() for m, _ in params)


@pytest.mark.parametrize("total", [5, 7, 10, 30])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_synflow_rounds_as_the_global_call(total, target):
    """The last round and the call agree on the number, so the survivors of the last round are the survivors."""
    torch.manual_seed(0)
    layer = nn.Linear(total, 1, bias=False)
    scores = calibration.synflow(layer, torch.zeros(1, total), [(layer, "weight")], target_sparsity=target, steps=3)
    survived = scores[layer, "weight"] >= 3
    tpe.global_unstructured([(layer, "weight")], target_sparsity=target, importance_scores=scores, min_keep=0)
    assert torch.equal(survived, layer.weight_mask.bool())


def test_synflow_continues_from_what_is_pruned_and_leaves_the_model_alone():
    widths = (8, 9, 7, 4)
    model, params = bias_free(*widths)
    for module, name in params:
        prune.random_unstructured(module, name, 0.3)
    before = Snapshot(model)
    scores = calibration.synflow(model, torch.zeros(1, 8), params, target_sparsity=0.8)
    assert before.differences() == []
    for module, name in params:
        assert not scores[module, name][module.weight_mask == 0].any()
    tpe.global_unstructured(params, target_sparsity=0.8, importance_scores=scores, min_keep=0)
    assert sum(int(m.weight_mask.sum()) for m, _ in params) == 163 - round(0.8 * 163)
    assert all(m.weight_mask.any() for m, _ in params)


def test_synflow_takes_batch_norm_tuples_and_token_numbers():
    model, _, params = build("residual")
    before = Snapshot(model)
    assert calibration.synflow(model, torch.zeros(1, 1, 6, 6), params, target_sparsity=0.5, steps=4)
    assert before.differences() == []
    model = nn.Bilinear(3, 4, 2)
    found = calibration.synflow(
        model, (torch.zeros(1, 3), torch.zeros(1, 4)), [(model, "weight")], target_sparsity=0.5, steps=2
    )
    order = [values.detach().flatten().argsort() for values in (found[model, "weight"], model.weight.abs())]
    assert torch.equal(*order)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    found = calibration.synflow(model, torch.tensor([[2, 2]]), [(model[0], "weight")], target_sparsity=0.5, steps=1)
    assert (found[model[0], "weight"].sum(1) > 3).tolist() == [False, False, True, False]


def test_synflow_refuses():
    model, params = bias_free(3, 2)
    call = functools.partial(calibration.synflow, model, torch.zeros(1, 3))
    for args, error in (
        ({"target_sparsity": 1.5}, ValueError),
        ({"target_sparsity": "x"}, TypeError),
        ({"target_sparsity": 0.5, "steps": 0}, ValueError),
    ):
        with pytest.raises(error, match=r"target_sparsity=|steps="):
            call(params, **args)
    model.add_module("unused", nn.Module())
    model.unused.lost = nn.Linear(2, 2)
    model.unused.forward = lambda x: x
    with pytest.raises(ValueError, match=r"unused\.lost\.weight.*does not depend"):
        call([*params, (model.unused.lost, "weight")], target_sparsity=0.5)


def test_random_scores_follow_the_generator():
    layer, half = nn.Linear(50, 40), nn.Linear(3, 2, dtype=torch.bfloat16)
    params = [(layer, "weight"), (half, "weight")]
    state = torch.get_rng_state()
    first, second = (calibration.random(params, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for key in params:
        assert torch.equal(first[key], second[key])
        assert first[key].shape == key[0].weight.shape
        assert first[key].dtype == torch.float32
        assert 0 <= first[key].min() <= first[key].max() < 1
    assert float(first[layer, "weight"].mean()) == pytest.approx(0.5, abs=0.03)  # five standard deviations
    torch.manual_seed(0)
    third = calibration.random(params)
    torch.manual_seed(0)
    assert torch.equal(third[layer, "weight"], torch.rand(40, 50))
