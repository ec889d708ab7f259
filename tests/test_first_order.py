"""Gradients, Taylor and Fisher are what their formulas say, for one sample after the other."""

import pytest
import torch
import torch.nn.functional as F
from calibrating import (
    CALLS,
    LOSSES,
    NETS,
    SIZES,
    build,
    calibration,
    close,
    compare,
    hessian,
    sample_gradients,
    split,
)


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_first_order_statistics(net, loss_fn):
    model, batches, params = build(net)
    weights = [p.detach() for p in model.parameters()]
    samples = sample_gradients(model, loss_fn, batches)
    mean = [g.mean(0) for g in samples]
    args = model, loss_fn, batches, params
    compare(CALLS["gradients"](*args), params, [g.abs() for g in mean])
    compare(CALLS["taylor"](*args), params, [(g * w).abs().mean(0) for g, w in zip(samples, weights, strict=True)])
    compare(CALLS["fisher"](*args), params, [g.square().mean(0) for g in samples])
    sizes = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
    per_batch = [
        sum(s * (part.mean(0) * w).abs() for s, part in zip(sizes, g.split(SIZES), strict=True))
        for g, w in zip(samples, weights, strict=True)
    ]
    compare(CALLS["taylor, batch"](*args), params, per_batch)
    sensitivity = [(g * w).abs() for g, w in zip(mean, weights, strict=True)]
    total = sum(s.sum() for s in sensitivity)
    found = CALLS["snip"](*args)
    compare(found, params, [s / total for s in sensitivity])
    assert sum(float(s.sum()) for s in found.values()) == pytest.approx(1, rel=1e-12)


def test_only_the_listed_tensors_count():
    model, batches, params = build()
    full = split(model, hessian(model, F.cross_entropy, batches).diag())
    for method in ("exact", "ggn", "hutchinson"):
        found = calibration.hessian_diagonal(
            model, F.cross_entropy, batches, params[2:3], method=method, samples=10, progress=False
        )
        assert list(found) == params[2:3]
        assert found[params[2]].shape == (3, 5)
    found = calibration.hessian_diagonal(model, F.cross_entropy, batches, params[2:3], method="exact", progress=False)
    close(found[params[2]], full[2])
    snip = CALLS["snip"](model, F.cross_entropy, batches, params[:1])
    assert float(snip[params[0]].sum()) == pytest.approx(1)
