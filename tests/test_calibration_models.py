"""Models that torch.func hates, low precision, any memory format."""

import pytest
import torch
import torch.nn.functional as F
from calibrating import (
    CALLS,
    SIZES,
    Reader,
    activations,
    build,
    close,
    compare,
    every_call,
    pairs,
    sample_gradients,
    split,
    whole,
    worth,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune


def test_recurrent_models_go_one_by_one_and_say_so():
    torch.manual_seed(0)
    model = Reader().double()
    batches = [(torch.randint(5, (size, 4)), torch.randint(3, (size,))) for size in SIZES]
    params = pairs(model)
    samples = sample_gradients(model, F.cross_entropy, batches)
    curvature = gauss_newton_by_autograd(model, batches)
    model.train()
    before = Snapshot(model)
    with pytest.warns(UserWarning, match="samples go one by one") as caught:
        found = CALLS["fisher"](model, F.cross_entropy, batches, params)
    assert len(caught) == 1
    compare(found, params, [g.square().mean(0) for g in samples])
    assert before.differences() == []
    compare(CALLS["gradients"](model, F.cross_entropy, batches, params), params, [g.mean(0).abs() for g in samples])
    with pytest.warns(UserWarning, match="samples go one by one"):
        ggn = CALLS["ggn"](model, F.cross_entropy, batches, params)
    compare(ggn, params, split(model, curvature), atol=1e-13)
    exact = CALLS["exact"](model, F.cross_entropy, batches, params)
    assert worth(ggn.values(), exact.values()) < 3
    assert before.differences() == []
    prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.5)
    before = Snapshot(model)
    with pytest.warns(UserWarning, match="samples go one by one"):
        found = CALLS["taylor"](model, F.cross_entropy, batches, [(model.lstm, "weight_hh_l0")])
    assert before.differences() == []
    assert torch.equal(found[model.lstm, "weight_hh_l0"] == 0, model.lstm.weight_hh_l0_mask == 0)


def gauss_newton_by_autograd(model, batches):
    """Return the diagonal of the Gauss-Newton matrix of cross-entropy, its Hessian written out."""
    model.eval()
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for x, _ in zip(*whole(batches), strict=True):
        output = model(x[None])[0]
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in output]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        p = output.detach().softmax(0)
        total += (jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian).diag()
    return total / sum(SIZES)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", CALLS)
def test_attention_with_a_pruned_out_proj(name):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3).double())
    twin = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True).double(), nn.Flatten(),
                         nn.Linear(12, 3).double())  # fmt: skip
    twin.load_state_dict(model.state_dict())
    prune.l1_unstructured(layer.self_attn.out_proj, "weight", 0.5)
    with torch.no_grad():
        twin[0].self_attn.out_proj.weight *= layer.self_attn.out_proj.weight_mask
    batches = [(torch.randn(size, 3, 4, dtype=torch.float64), torch.randint(3, (size,))) for size in SIZES]
    keys = [[(m[0].self_attn.out_proj, "weight"), (m[0].self_attn, "in_proj_weight"), (m[0].linear1, "weight")]
            for m in (model, twin)]  # fmt: skip
    before = Snapshot(model)
    found = CALLS[name](model, F.cross_entropy, batches, keys[0])
    assert before.differences() == []
    expected = CALLS[name](twin, F.cross_entropy, batches, keys[1])
    for scores, wanted in zip(found.values(), expected.values(), strict=True):
        close(scores, wanted, atol=1e-13)
        assert scores.any()
    if name == "exact":
        samples = torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])
        weight = twin[0].self_attn.out_proj.weight
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(twin.eval()(samples[0]), samples[1])
        [gradient] = torch.autograd.grad(loss, weight, create_graph=True)
        [row] = torch.autograd.grad(gradient[0, 1], weight)
        close(found[keys[0][0]][0, 1], row[0, 1], atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*(name for name in CALLS if name != "ggn, sampled"), "activations"])
@pytest.mark.parametrize("net", ["relu", "residual"])
def test_lower_precision(net, name, dtype):
    call = {**CALLS, "activations": activations}[name]
    model, batches, params = build(net)
    model.to(dtype).double()  # the same weights
    expected = call(model, F.cross_entropy, [(x.to(dtype).double(), t) for x, t in batches], params)
    found = call(model.to(dtype), F.cross_entropy, [(x.to(dtype), t) for x, t in batches], params)
    assert list(found) == list(expected)
    for scores in found.values():
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
    error = worth(found.values(), expected.values())
    assert 0 < error < (1e-4 if dtype == torch.float32 else 0.25)
    loss = F.cross_entropy(model.train()(batches[0][0].to(dtype)), batches[0][1])
    loss.backward()


def test_small_gradients_in_half_precision_do_not_vanish_when_squared():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    data = [(torch.full((2, 2), 1e-4, dtype=torch.float16), torch.zeros(2))]
    found = CALLS["fisher"](layer, lambda out, _: out.mean(), data, [(layer, "weight")])
    assert float(found[layer, "weight"].min()) == pytest.approx(1e-8, rel=0.01)


@every_call
def test_any_memory_format(call):
    model, batches, params = build("residual")
    expected = call(model, F.cross_entropy, batches, params)
    model.to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    found = call(model, F.cross_entropy, batches, params)
    compare(found, params, list(expected.values()), atol=1e-13)


@pytest.mark.parametrize("numbers", [1, 100, 300])
def test_samples_may_be_taken_in_portions(numbers, monkeypatch):
    model, batches, params = build("residual")
    expected = {name: CALLS[name](model, F.cross_entropy, batches, params) for name in ("taylor", "fisher", "ggn")}
    monkeypatch.setattr("torchprune_ext._runs.PER_SAMPLE", numbers)
    for name, wanted in expected.items():
        found = CALLS[name](model, F.cross_entropy, batches, params)
        compare(found, params, list(wanted.values()), atol=1e-14)
