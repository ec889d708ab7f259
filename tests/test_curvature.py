"""Curvature is what its formulas say, and what other libraries say."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from calibrating import (
    CALLS,
    LOSSES,
    SIZES,
    SMALL,
    Own,
    build,
    calibration,
    compare,
    flat,
    gauss_newton,
    hessian,
    pairs,
    sample_gradients,
    second,
    split,
    squared,
    whole,
    worth,
)
from torch import nn

# ---------------------------------------------------------------------------------------- the formulas, one by one


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("net", SMALL)
def test_second_order_statistics(net, loss_fn):
    model, batches, params = build(net)
    full = hessian(model, loss_fn, batches)
    exact = CALLS["exact"](model, loss_fn, batches, params)
    compare(exact, params, split(model, full.diag()), atol=1e-13)
    assert exact.standard_error is None
    curvature = split(model, gauss_newton(model, loss_fn, batches).diag())
    ggn = CALLS["ggn"](model, loss_fn, batches, params)
    compare(ggn, params, curvature, atol=1e-13)
    if net == "relu":  # piecewise linear in each weight
        compare(ggn, params, split(model, full.diag()), atol=1e-13)
    else:
        assert worth(ggn.values(), exact.values()) > 1e-3
    gradient = torch.cat([g.mean(0).reshape(-1) for g in sample_gradients(model, loss_fn, batches)])
    vector, _ = flat(model)
    flow = vector * (full @ gradient)
    compare(CALLS["grasp"](model, loss_fn, batches, params), params, split(model, flow - flow.min()), atol=1e-13)


def test_gauss_newton_of_a_loss_that_is_not_convex_ignores_negative_curvature_only():
    model, batches, params = build()
    found = CALLS["ggn"](model, squared, batches, params)
    vector, run = flat(model)
    expected, least = torch.zeros_like(vector), 0.0
    for x, t in zip(*whole(batches), strict=True):
        jacobian = torch.func.jacrev(lambda v, x=x: run(v, x[None])[0])(vector)
        matrix = second(lambda z, t=t: squared(z[None], t[None]), run(vector, x[None])[0])
        values, vectors = torch.linalg.eigh(matrix)
        least = min(least, float(values.min()))
        positive = vectors @ values.clamp_min(0).diag() @ vectors.T
        expected += (jacobian.T @ positive @ jacobian).diag() / sum(SIZES)
    compare(found, params, split(model, expected), atol=1e-13)
    assert least < -1e-2  # else the test says nothing


def test_sampled_gauss_newton_is_unbiased_and_uses_the_samples():
    model, batches, params = build()
    exact = CALLS["ggn"](model, F.cross_entropy, batches, params)
    generator = torch.Generator().manual_seed(0)
    few = [
        calibration.hessian_diagonal(
            model, F.cross_entropy, batches, params, samples=2, generator=generator, progress=False
        )
        for _ in range(40)
    ]
    stacked = {key: torch.stack([f[key] for f in few]) for key in params}
    for key in params:
        error = stacked[key].std(0) / len(few) ** 0.5
        assert ((stacked[key].mean(0) - exact[key]).abs() <= 5 * error + 1e-12).all()
    many = calibration.hessian_diagonal(model, F.cross_entropy, batches, params, samples=200, progress=False)
    assert 0 < worth(many.values(), exact.values()) < 0.2 * worth(few[0].values(), exact.values()) + 0.05


@pytest.mark.parametrize("net", ["tanh", "attention"])
def test_hutchinson_is_unbiased_and_knows_its_error(net):
    model, batches, params = build(net)
    exact = torch.cat([t.reshape(-1) for t in CALLS["exact"](model, F.cross_entropy, batches, params).values()])
    call = functools.partial(
        calibration.hessian_diagonal, model, F.cross_entropy, batches, params, method="hutchinson", progress=False
    )
    generator = torch.Generator().manual_seed(1)
    runs = [call(samples=10, generator=generator) for _ in range(30)]
    values = torch.stack([torch.cat([t.reshape(-1) for t in run.values()]) for run in runs])
    errors = torch.stack([torch.cat([t.reshape(-1) for t in run.standard_error.values()]) for run in runs])
    noisy = values.std(0) > 1e-9
    assert noisy.any()
    assert ((values.mean(0) - exact).abs() <= 5 * values.std(0) / len(runs) ** 0.5 + 1e-12).all()
    ratio = errors.square().mean(0)[noisy] / values.var(0)[noisy]
    assert 0.75 < float(ratio.mean()) < 1.35  # the mean over many weights
    for run in runs[:1]:
        assert list(run.standard_error) == params
        assert all(error.shape == run[key].shape for key, error in run.standard_error.items())
    assert call(samples=1).standard_error is None
    first, second = call(), call()  # 100 probes from a fixed seed
    assert all(torch.equal(first[key], second[key]) for key in params)
    assert worth(first.values(), [exact]) < worth(runs[0].values(), [exact])


# -------------------------------------------------------------------------------------- other libraries as oracles


def optional(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize("net", ["relu", "tanh"])
def test_backpack_agrees(net):
    backpack, extensions = optional("backpack"), optional("backpack.extensions")
    model, batches, params = build(net)
    ggn, exact = (CALLS[name](model, F.cross_entropy, batches, params) for name in ("ggn", "exact"))
    twin, _, _ = build(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs, targets = whole(batches)
        extended, loss_fn = backpack.extend(twin), backpack.extend(nn.CrossEntropyLoss())
        with backpack.backpack(extensions.DiagHessian(), extensions.DiagGGNExact()):
            loss_fn(extended(inputs), targets).backward()
    compare(ggn, params, [p.diag_ggn_exact for p in twin.parameters()], atol=1e-13)
    compare(exact, params, [p.diag_h for p in twin.parameters()], atol=1e-13)


@pytest.mark.parametrize("net", ["relu", "tanh"])
def test_curvlinops_agrees(net):
    curvlinops = optional("curvlinops")
    model, batches, params = build(net)
    model.eval()
    args = model, nn.CrossEntropyLoss(), list(model.parameters()), batches
    for operator, name in (("GGNLinearOperator", "ggn"), ("HessianLinearOperator", "exact")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matrix = getattr(curvlinops, operator)(*args, progressbar=False)
            size = sum(p.numel() for p in model.parameters())
            diagonal = (matrix @ torch.eye(size, dtype=torch.float64)).diag()
        found = CALLS[name](model, F.cross_entropy, batches, params)
        compare(found, params, split(model, diagonal.detach()), atol=1e-13)


def test_curvature_of_the_loss_needs_rows_of_outputs():
    inner, batches, params = build()
    model = Own()
    model.inner = inner
    loader = [{"x": x, "labels": t} for x, t in batches]
    with pytest.raises(ValueError, match=r"output is one tensor, not a dict"):
        CALLS["ggn"](model, lambda out, batch: out["loss"], loader, params)
    layer = nn.Linear(4, 2049)
    with pytest.raises(ValueError, match=r"2049 outputs per sample"):
        CALLS["ggn"](layer, lambda out, t: out.square().mean(), [(torch.ones(2, 4), torch.ones(2))], pairs(layer))
    model = nn.Sequential(nn.Linear(4, 2), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"shape \(4,\) of 2 samples"):
        CALLS["ggn"](model, lambda out, t: out.square().mean(), [(torch.ones(2, 4), torch.ones(2))], pairs(model))
