"""Survivors get what a plain least squares gives them, layer after layer, and no error ever rises."""

import pytest
import torch
import torch.nn.functional as F
from compensating import (
    ALL,
    DEEP,
    MARKS,
    SINGLE,
    SPOILT,
    _without_a_row,
    best_row,
    build,
    close,
    compensate,
    data,
    deep,
    equal,
    in_both,
    magnitude,
    names,
    never_worse,
    pairs,
    prune_and_compensate,
    prune_in_rounds,
    pruned,
    rows,
    same_as_oracle,
    single,
    sparsegpt,
    spoilt,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._layers import Layer
from torchprune_ext.compensation import solvers
from torchprune_ext.compensation.fitting import _rounded as rounded

pytestmark = MARKS

# ------------------------------------------------------------------------------------------------ equals least squares


@single
def test_early_end_costs_no_more_than_a_percent(name, monkeypatch):
    after = []
    for tolerance in (solvers.TOLERANCE, 0.0):
        monkeypatch.setattr(solvers, "TOLERANCE", tolerance)
        model, params = pruned(name)
        after.append(compensate(model, data(ALL[name][1]), params)[params[0]].after)
    assert after[0] <= 1.01 * after[1] + 1e-9


@single
@pytest.mark.parametrize("ridge", [1e-3, 1e-12])
@pytest.mark.usefixtures("to_the_end")
def test_a_layer_gets_what_least_squares_gives(name, ridge, monkeypatch):
    monkeypatch.setattr(solvers, "RIDGE", ridge)
    model, params = pruned(name)
    batches = data(ALL[name][1])
    fits = compensate(model, batches, params)
    assert list(fits) == params
    same_as_oracle(name, model, batches, fits)


@deep
@pytest.mark.parametrize("amount", [0.3, 0.7])
@pytest.mark.usefixtures("to_the_end")
def test_layers_in_sequence_get_what_a_loop_over_them_gives(name, amount):
    name = f"deep {name}"
    model, params = pruned(name, amount)
    batches = data(ALL[name][1], (60,))
    same_as_oracle(name, model, batches, compensate(model, batches, params))


@pytest.mark.parametrize("name", ["linear, no bias", "conv2d, no bias", "grouped, no bias", "deep residual"])
@pytest.mark.usefixtures("to_the_end")
def test_a_bias_is_created_where_there_was_none(name):
    model, params = pruned(name)
    batches = data(ALL[name][1], (40,))
    fits = compensate(model, batches, params, create_bias=True)
    assert all(isinstance(module.bias, nn.Parameter) and module.bias.requires_grad for module, _ in params)
    same_as_oracle(name, model, batches, fits, create_bias=True)


@pytest.mark.parametrize("name", ["linear", "grouped", *(f"deep {name}" for name in DEEP)])
def test_errors_are_those_of_the_layers_that_come_out_for_their_inputs_in_both_models(name):
    batches = data(ALL[name][1], (40, 20))
    model, params = pruned(name)
    dense = build(ALL[name][0]).eval()
    fits = compensate(model, batches, params)
    for each, fit in zip(names(model), fits.values(), strict=True):
        _, *outputs = in_both(model.eval(), dense, each, batches)
        found, y = (rows(dense.get_submodule(each), output) for output in outputs)
        energy = (y - y.mean(1, keepdim=True)).square().sum()
        torch.testing.assert_close(fit.after, float((found - y).square().sum() / energy), rtol=1e-6, atol=1e-12)


def test_a_pruned_bias_stays_and_the_weights_are_fitted_to_it():
    model = build(lambda: nn.Linear(5, 3))
    prune.random_unstructured(model, "weight", amount=0.4)
    prune.random_unstructured(model, "bias", amount=1)
    bias, dense = model.bias_orig.detach().clone(), build(lambda: nn.Linear(5, 3))
    batches = data((5,))
    compensate(model, batches, [(model, "weight")])
    equal(model.bias_orig.detach(), bias)
    x, y = batches[0][0], dense(batches[0][0]).detach()
    for out in range(3):  # the dense model has the values under all masks, as undo would restore them
        start = dense.weight[out].detach() * model.weight_mask[out]
        fixed = (bias * model.bias_mask)[out]
        found, _ = best_row(x, y[:, out], start, model.weight_mask[out] != 0, fixed, solvers.RIDGE)
        close(model.weight[out].detach(), found)


# ------------------------------------------------------------------------------------------------- error never rises


METHODS = {
    "l1": lambda m: prune.l1_unstructured(m, "weight", amount=0.6),
    "random": lambda m: prune.random_unstructured(m, "weight", amount=0.6),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
    "ln_structured, inputs": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=1),
    "nm": lambda m: tpe.nm_structured(m, "weight", n=1, m=2, pad=True),
    "every other": lambda m: tpe.every_other(m, "weight", step=2, offset=0),
    "vector": lambda m: tpe.vector_ln(m, "weight", amount=0.5, n=2, dim=1),
    "all": lambda m: prune.random_unstructured(m, "weight", amount=1.0),
    "a row": lambda m: prune.custom_from_mask(m, "weight", _without_a_row(m)),
    "identity": lambda m: prune.identity(m, "weight"),
}


@pytest.mark.parametrize("name", ["conv2d, no bias", "deep tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_error_never_rises(name, method):
    for how in SPOILT:
        model = build(ALL[name][0])
        for module, _ in pairs(model):
            METHODS[method](module)
        masks = [module.weight_mask.clone() for module, _ in pairs(model)]
        never_worse(compensate(model, spoilt(data(ALL[name][1], (17, 9)), how), pairs(model)))
        equal([module.weight_mask for module, _ in pairs(model)], masks)
        assert all(torch.isfinite(tensor).all() for both in weights(model) for tensor in both), how


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 30), st.sampled_from(sorted(ALL)))
@settings(max_examples=20)
def test_error_never_rises_whatever_the_mask(seed, amount, size, name):
    model = build(ALL[name][0])
    torch.manual_seed(seed)
    for module, tensor in pairs(model):
        prune.random_unstructured(module, tensor, amount=amount)
    never_worse(compensate(model, data(ALL[name][1], (size, 3), seed), pairs(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "(in, out)", "grouped", "deep mlp", "deep conv", "deep residual"])
def test_error_never_rises_in_any_precision(name, dtype):
    batches = data(ALL[name][1], (30, 10), dtype=dtype)
    try:
        build(ALL[name][0], dtype=dtype).eval()(batches[0][0])
    except RuntimeError as error:
        pytest.skip(str(error))
    calls = [
        lambda model: compensate(model, batches, pairs(model)),
        lambda model: prune_and_compensate(model, batches, pairs(model), target_sparsity=0.7),
        lambda model: sparsegpt(model, batches, pairs(model), target_sparsity=0.7),
    ]
    for number, call in enumerate(calls):
        model, params = pruned(name, 0.5, dtype=dtype, how=prune.l1_unstructured)
        fits = call(model)
        if number < 2:
            never_worse(fits)
        for module, _ in params:
            tensors = [module.weight_orig, module.weight_mask, module.weight, module.bias]
            assert {tensor.dtype for tensor in tensors if tensor is not None} == {dtype}
            assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("name", ["linear", "grouped", "circular", "(in, out)", "deep mlp", "deep residual"])
def test_nothing_pruned_nothing_changed(name):
    model, params = pruned(name, 0)
    before = weights(model)
    fits = compensate(model, data(ALL[name][1], (30,)), params)
    close(weights(model), before, rtol=1e-9, atol=1e-10)
    assert all(fit.before < 1e-15 and fit.after < 1e-15 for fit in fits.values())


def test_all_pruned_leaves_the_mean():
    model, params = pruned("linear", 1.0)
    dense, batches = build(SINGLE["linear"][0]), data((6,))
    fit = compensate(model, batches, params)[params[0]]
    close(model.bias.detach(), dense(batches[0][0]).mean(0).detach())
    assert fit.after == pytest.approx(1)


def test_unlisted_layers_stay():
    model, params = pruned("deep mlp")
    before = weights(model)
    compensate(model, data((6,)), params[1:2])
    after = weights(model)
    equal([after[0], after[2]], [before[0], before[2]])
    assert not torch.equal(after[1][0], before[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_rounding_that_costs_more_than_the_fit_gains_is_not_taken(dtype, bias):
    # What is pruned is next to nothing, so the fit gains less than rounding its new values to the dtype costs.
    torch.manual_seed(0)
    model = nn.Linear(32, 16, bias=bias).to(dtype)
    model.weight.data[:, ::4] *= 1e-4
    mask = torch.ones(16, 32, dtype=dtype)
    mask[:, ::4] = 0
    before = weights(model)
    prune.custom_from_mask(model, "weight", mask)
    fit = compensate(model, data((32,), (200,), dtype=dtype), [(model, "weight")])[model, "weight"]
    assert fit.after <= fit.before
    old, new = (w.detach().float() for w in (before[0][0], model.weight_orig))
    kept = (old == new).all(1)
    assert kept.any()  # rows that rounding would have made worse


@pytest.mark.parametrize("options", [{}, {"criterion": magnitude, "steps": 2}])
def test_the_bar_tells_sparsity_and_error(options, capsys, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread
    call = prune_in_rounds if options else prune_and_compensate
    model, params = pruned("deep mlp", 0)
    fits = call(model, data((6,)), params, target_sparsity=0.5, progress=True, **options)
    last = params if options else params[-1:]  # a step is a round over all layers, or a layer
    masks, told = torch.cat([module.weight_mask.flatten() for module, _ in last]), capsys.readouterr().err
    assert f"error={max(fits[key].after for key in last):.3g}, sparsity={1 - masks.mean():.1%}" in told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_count_what_rounding_the_bias_costs(dtype):
    torch.manual_seed(0)
    model = nn.Linear(16, 32).to(dtype)
    model.weight.data[:, ::4] *= 1e-3
    model.bias.data += 300  # where the dtype is coarse
    prune.custom_from_mask(model, "weight", (torch.arange(16) % 4 != 0).expand(32, 16).to(dtype))
    batches = data((16,), (300,), dtype=dtype)
    x, y = batches[0][0].double(), F.linear(batches[0][0], model.weight_orig, model.bias).detach().double()
    fit = compensate(model, batches, [(model, "weight")])[model, "weight"]
    error = (F.linear(x, model.weight.double(), model.bias.double()) - y).detach().square().sum()
    assert fit.after == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-3)
    assert fit.after <= fit.before


def test_a_row_that_would_get_worse_keeps_its_bias_too():
    module, x, moments = build(lambda: nn.Linear(4, 3)), data((4,))[0][0], solvers.Moments()
    moments.add(x[None], module(x).detach()[None])
    start = module.weight.detach()[None]
    worse = start + torch.tensor([0.0, 1.0, 0.0])[:, None]
    layer = Layer(module, "weight", "weight")
    weight, bias, before, after = rounded(layer, moments.problem(None), start, worse, True, True)
    equal(weight, start)
    equal(bias[0, 1], module.bias[1].detach())
    assert bool((after <= before).all())
