"""Pruning and re-fitting in one call: the pattern holds, and the dense model stays the reference."""

import warnings

import pytest
import torch
from compensating import (
    ALL,
    MARKS,
    SPOILT,
    Conv1D,
    best_row,
    build,
    data,
    equal,
    history,
    magnitude,
    matrix,
    mlp,
    never_worse,
    pairs,
    prune_and_compensate,
    prune_in_rounds,
    pruned,
    same_as_oracle,
    spoilt,
    weights,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.compensation.calls import _shrinking as shrinking

pytestmark = MARKS

NAMED = ["admm", "obs", "wanda", "magnitude"]


def by(criterion, steps):
    """Return the arguments of a criterion in so many steps, which the splitting does not have."""
    return {"criterion": criterion} | ({"steps": steps} if criterion != "admm" else {})


@pytest.mark.parametrize("criterion", NAMED)
@pytest.mark.parametrize("name", ["linear", "(in, out)", "grouped", "deep mlp", "deep conv"])
@pytest.mark.parametrize("steps", [1, 3])
def test_rows_keep_the_same_number(criterion, name, steps):
    model = build(ALL[name][0])
    options = {"target_sparsity": 0.6, **by(criterion, steps)}
    fits = prune_and_compensate(model, data(ALL[name][1], (40, 8)), pairs(model), **options)
    for module, _ in pairs(model):
        keep = matrix(module, module.weight_mask)
        assert set(keep.sum(-1).flatten().tolist()) == {max(1.0, round(keep.shape[-1] * (1 - 0.6)))}
    never_worse(fits)
    assert all("prune_and_compensate" in repr(tpe_hook(m)) for m, _ in pairs(model))


def tpe_hook(module):
    (hook,) = (h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod))
    return list(hook)[-1] if isinstance(hook, prune.PruningContainer) else hook


@pytest.mark.parametrize("criterion", NAMED)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "(in, out)", "conv2d", "grouped"])
def test_groups_keep_n_of_m(criterion, steps, kind):
    make, shape, dim = {
        "linear": (lambda: nn.Linear(12, 5), (12,), 1),
        "(in, out)": (lambda: Conv1D(12, 5), (12,), 0),
        "conv2d": (lambda: nn.Conv2d(8, 3, 2), (8, 4, 4), 1),
        "grouped": (lambda: nn.Conv2d(8, 4, 2, groups=2), (8, 4, 4), 1),
    }[kind]
    model = build(make)
    options = {"pattern": tpe.NM(2, 4, dim=dim), **by(criterion, steps)}
    fits = prune_and_compensate(model, data(shape), [(model, "weight")], **options)
    mask = model.weight_mask.movedim(dim, -1)
    assert set(mask.unflatten(-1, (-1, 4)).sum(-1).flatten().tolist()) == {2.0}
    never_worse(fits)


def by_rows_or_rounds(model, batches, params, criterion, **options):
    """Prune by a named criterion, or in rounds by a function."""
    if callable(criterion):
        return prune_in_rounds(model, batches, params, criterion, **options)
    return prune_and_compensate(model, batches, params, criterion=criterion, **options)


@pytest.mark.parametrize("criterion", [*NAMED, magnitude])
@pytest.mark.parametrize("name", ["linear", "(in, out)", "grouped"])
def test_the_dead_stay_dead(criterion, name):
    for amount in (0.3, 0.9) if criterion in NAMED else (0.3,):
        model, params = pruned(name, amount)
        masks = [module.weight_mask.clone() for module, _ in params]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            by_rows_or_rounds(model, data(ALL[name][1], (30,)), params, criterion, target_sparsity=0.5)
        assert all(bool((m.weight_mask <= mask).all()) for (m, _), mask in zip(params, masks, strict=True))
        assert all(isinstance(history(m), prune.PruningContainer) for m, _ in params)


def test_rounds_refuse_what_is_pruned_further_already():
    model, params = pruned("deep mlp", 0.9)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"target_sparsity=0\.5"):
        prune_in_rounds(model, data((6,)), params, magnitude, target_sparsity=0.5)
    assert not before.differences()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("criterion", NAMED)
def test_none_and_all_of_a_row(sparsity, criterion):
    model = build(mlp)
    fits = prune_and_compensate(model, data((6,)), pairs(model), target_sparsity=sparsity, criterion=criterion)
    for module, _ in pairs(model):
        assert set(module.weight_mask.sum(1).tolist()) == {float(module.weight.shape[1]) if sparsity == 0 else 1.0}
    never_worse(fits)


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("criterion", ["admm", "obs"])
def test_pruning_copes_with_hard_inputs(how, criterion):
    for asked in ({"target_sparsity": 0.5}, {"pattern": tpe.NM(1, 2)}):
        model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        batches = spoilt(data((6,), (17, 9)), how)
        never_worse(prune_and_compensate(model, batches, pairs(model), criterion=criterion, **asked))
        assert all(torch.isfinite(tensor).all() for both in weights(model) for tensor in both)
        assert all(abs(float(m.weight_mask.mean()) - 0.5) < 0.13 for m, _ in pairs(model))


@pytest.mark.parametrize("asked", [{"target_sparsity": 0.5}, {"target_sparsity": 0.7}, {"pattern": tpe.NM(2, 4)}])
def test_splitting_beats_magnitude_on_correlated_inputs(asked):
    for seed in range(3):
        torch.manual_seed(seed)
        batches = [(torch.randn(200, 10).double() @ torch.randn(10, 32).double() + torch.randn(200, 32), None)]
        error = {}
        for criterion in NAMED:
            model = build(lambda: nn.Linear(32, 16), seed)
            fits = prune_and_compensate(model, batches, [(model, "weight")], criterion=criterion, **asked)
            error[criterion] = fits[model, "weight"].after
        assert error["admm"] <= error["magnitude"], error


def test_more_steps_of_obs_are_no_worse_on_correlated_inputs():
    torch.manual_seed(0)
    batches = [(torch.randn(300, 10).double() @ torch.randn(10, 32).double() + torch.randn(300, 32), None)]
    error = []
    for steps in (1, 10):
        model = build(lambda: nn.Linear(32, 16))
        options = {"criterion": "obs", "steps": steps, "target_sparsity": 0.7}
        error.append(prune_and_compensate(model, batches, [(model, "weight")], **options)[model, "weight"].after)
    assert error[1] <= error[0]


@pytest.mark.usefixtures("to_the_end")
def test_prune_equals_compensate_with_the_mask_it_found():
    for name in ("deep mlp", "deep conv", "(in, out)"):
        model, batches = build(ALL[name][0]), data(ALL[name][1], (30, 14))
        for criterion in ("admm", "magnitude"):
            model = build(ALL[name][0])
            fits = prune_and_compensate(model, batches, pairs(model), target_sparsity=0.5, criterion=criterion)
            # in a sequence unpruned layers lie behind, so the first differs in nothing but the order of events
            same_as_oracle(name, model, batches, fits)


@pytest.mark.parametrize(
    ("steps", "sparsity", "before"), [(1, 0.8, 0.0), (2, 0.37, 0.2), (7, 0.37, 0.0), (None, 0.8, 0.2)]
)
def test_rounds_prune_exactly_so_many(steps, sparsity, before):
    model, params = pruned("deep mlp", before) if before else ((m := build(mlp)), pairs(m))
    calls = []

    def criterion(model):
        calls.append(
            sum(float(m.weight_mask.sum()) if hasattr(m, "weight_mask") else m.weight.numel() for m, _ in pairs(model))
        )
        return magnitude(model)

    options = {} if steps is None else {"steps": steps}
    fits = prune_in_rounds(model, data((6,), (30, 9)), params, criterion, target_sparsity=sparsity, **options)
    total = sum(module.weight_mask.numel() for module, _ in params)
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in params) == round(sparsity * total)
    assert len(calls) == (steps or 10)
    share, done = calls[0] / total, [step / len(calls) for step in range(1, len(calls))]
    assert calls[1:] == [total - round((1 - share ** (1 - p) * (1 - sparsity) ** p) * total) for p in done]
    assert list(fits) == params
    for module, _ in params:
        hook = history(module)
        past = list(hook) if isinstance(hook, prune.PruningContainer) else [hook]
        assert len(past) == (steps or 10) + bool(before)
        assert all("global_unstructured" in repr(each) for each in past[bool(before) :])


@pytest.mark.parametrize("name", ["deep mlp", "deep conv", "deep residual"])
@pytest.mark.parametrize("create_bias", [False, True])
def test_the_dense_model_stays_the_reference_in_all_rounds(name, create_bias):
    batches, error = data(ALL[name][1], (60, 40)), {}
    dense = build(ALL[name][0]).eval()
    for steps in (1, 8):
        model = build(ALL[name][0])
        options = {"target_sparsity": 0.6, "steps": steps, "create_bias": create_bias}
        prune_in_rounds(model, batches, pairs(model), magnitude, **options)
        model.eval()
        error[steps] = sum(float((model(x) - dense(x)).detach().square().sum()) for x, _ in batches)
    assert error[8] <= 1.5 * error[1], error


@pytest.mark.parametrize("create_bias", [False, True])
def test_the_last_round_is_fitted_to_the_outputs_of_the_first_model(create_bias):
    make = lambda: nn.Linear(8, 4, bias=not create_bias)  # noqa: E731
    model, batches = build(make), data((8,), (60,))
    y = model(batches[0][0]).detach()
    options = {"target_sparsity": 0.6, "steps": 6, "create_bias": create_bias}
    fit = prune_in_rounds(model, batches, [(model, "weight")], magnitude, **options)[model, "weight"]
    error = (model(batches[0][0]).detach() - y).square().sum() / (y - y.mean(0)).square().sum()
    assert fit.after == pytest.approx(float(error), rel=1e-9)
    x, best = batches[0][0], []
    for out in range(4):
        row = y[:, out], model.weight[out].detach(), model.weight_mask[out] != 0
        weight, bias = best_row(x, *row, None, 0.0)
        best.append((x @ weight + bias - y[:, out]).square().sum())
    energy = (y - y.mean(0)).square().sum()
    assert fit.after == pytest.approx(float(sum(best) / energy), rel=0.05)


@pytest.mark.parametrize("steps", [1, 4])
def test_rounds_with_a_threshold_for_each_tensor(steps):
    model = build(ALL["deep mlp"][0])
    goals = dict(zip(pairs(model), (0.2, 0.9, 0.55, 0.0), strict=False))
    calls = []

    def criterion(model):
        calls.append([float((getattr(m, "weight_mask", m.weight) == 0).double().mean()) for m, _ in pairs(model)])
        return magnitude(model)

    prune_in_rounds(model, data((6,), (30,)), pairs(model), criterion, target_sparsity=goals, steps=steps)
    for (module, _), goal in goals.items():
        assert int((module.weight_mask == 0).sum()) == round(goal * module.weight.numel())
    if steps > 1:
        for (_, goal), reached in zip(goals.items(), calls[2], strict=True):
            assert reached == pytest.approx(1 - (1 - goal) ** 0.5, abs=0.05)


@pytest.mark.parametrize("criterion", NAMED)
def test_rows_of_each_tensor_keep_their_own_number(criterion):
    model = build(ALL["deep mlp"][0])
    goals = dict(zip(pairs(model), (0.5, 0.75, 0.25, 0.0), strict=False))
    prune_and_compensate(model, data((6,), (30,)), pairs(model), target_sparsity=goals, criterion=criterion)
    for (module, _), goal in goals.items():
        assert set(module.weight_mask.sum(1).tolist()) == {float(round((1 - goal) * module.weight.shape[1]))}
        assert f"target_sparsity={goal}" in repr(history(module))


@pytest.mark.parametrize("criterion", ["admm", magnitude])
def test_a_sparsity_for_each_tensor_must_be_one_for_each(criterion):
    model = build(ALL["deep mlp"][0])
    first, *others = pairs(model)
    for goals, params, error in (
        ({first: 0.5}, [first, *others], "no entry"),
        (dict.fromkeys([first, *others], 0.5), others, "entries"),
        ({first: 1.5}, [first], "1.5"),
        ({first: "half"}, [first], "half"),
    ):
        before = Snapshot(model)
        with pytest.raises((ValueError, TypeError), match=error):
            by_rows_or_rounds(model, data((6,), (30,)), params, criterion, target_sparsity=goals)
        assert not before.differences()


def test_rounds_with_nothing_left():
    model, params = pruned("deep mlp", 1.0)
    before = weights(model)
    try:
        prune_in_rounds(model, data((6,)), params, magnitude, target_sparsity=1.0, steps=3)
    except ValueError:
        return
    equal([w for w, _ in weights(model)], [w for w, _ in before])


def test_what_the_steps_of_a_layer_keep_falls_geometrically():
    assert shrinking(100, 0.75, None, 4) == [71, 50, 35, 25]
    assert shrinking(10, 1.0, None, 2) == [3, 1]
    assert shrinking(8, None, tpe.NM(1, 4), 2) == [tpe.NM(2, 4), tpe.NM(1, 4)]
    assert shrinking(8, None, tpe.NM(3, 4), 5) == [tpe.NM(4, 4), tpe.NM(3, 4)]
