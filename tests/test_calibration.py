"""Statistics are what their formulas say, for one sample after the other, and the model never notices.

The oracles go through the samples in a loop, or through the whole Hessian, in float64 and with plain autograd.
"""

import collections
import datetime
import functools
import itertools
import math
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from snapshots import Snapshot
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

import torchprune_ext as tpe

calibration = tpe.calibration
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-14)
equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------- models, data, losses


class Attention(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Residual(nn.Module):
    """What a ResNet consists of: convolutions without bias, BatchNorm, a shortcut with a stride, pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv, self.second = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(2, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        stem = F.relu(self.first(self.stem(images)))
        return self.head(F.relu(self.second(self.conv(stem)) + self.down(stem)).mean((2, 3)))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(5, 3), nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0][:, -1])


def relu_net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def tanh_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


NETS = {
    "relu": (relu_net, (1, 6, 6)),
    "tanh": (tanh_net, (4,)),
    "attention": (Attention, (3, 4)),
    "residual": (Residual, (1, 6, 6)),
}
SMALL = ["relu", "tanh", "attention"]
SIZES = (4, 3, 1)  # a mean of the batches' means would be wrong


def build(name="tanh", sizes=SIZES, dtype=torch.float64, classes=3):
    """Return model, batches and parameters; the same at every call."""
    make, shape = NETS[name]
    torch.manual_seed(3)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    batches = [(torch.randn(size, *shape, dtype=dtype), torch.randint(classes, (size,))) for size in sizes]
    return model, batches, pairs(model)


def pairs(model):
    """Return (module, name) for all parameters, in the order of ``model.parameters()``."""
    return [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]


def rows(target, output):
    """Return ``target`` as rows of 0 and 1; ``one_hot`` cannot be vectorized."""
    return (target[..., None] == torch.arange(3)).to(output.dtype)


def squared(output, target):
    """Mean over samples of a loss whose Hessian is neither constant nor diagonal."""
    return (rows(target, output) - (5 * output).softmax(1)).square().sum(1).mean()


def mse(output, target):
    return F.mse_loss(output, rows(target, output))


LOSSES = {"cross entropy": F.cross_entropy, "mse": mse}
CALLS = {
    "gradients": calibration.gradients,
    "taylor": calibration.taylor,
    "taylor, batch": functools.partial(calibration.taylor, per="batch"),
    "fisher": calibration.fisher,
    "ggn": calibration.hessian_diagonal,
    "ggn, sampled": functools.partial(calibration.hessian_diagonal, samples=3),
    "hutchinson": functools.partial(calibration.hessian_diagonal, method="hutchinson", samples=3),
    "exact": functools.partial(calibration.hessian_diagonal, method="exact"),
    "snip": calibration.snip,
    "grasp": calibration.grasp,
}
CALLS = {name: functools.partial(call, progress=False) for name, call in CALLS.items()}
SIGNED = ("hutchinson", "exact")
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def activations(model, loss_fn, loader, params, **options):
    """Run ``activations`` with the arguments of the others."""
    layers = [(m, n) for m, n in params if n == "weight" and isinstance(m, nn.Linear | nn.Conv2d)]
    layers = [(m, n) for m, n in layers if not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
    return calibration.activations(model, loader, layers, progress=False, **options)


# ------------------------------------------------------------------------------------------------------------ oracles


def sample_gradients(model, loss_fn, batches):
    """Return, for each parameter of ``model``, the gradients of the samples, one below the other."""
    model.eval()
    rows = []
    for inputs, targets in batches:
        for x, t in zip(inputs, targets, strict=True):
            rows.append(torch.autograd.grad(loss_fn(model(x[None]), t[None]), list(model.parameters())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def flat(model):
    """Return all parameters in one vector, and the function from such a vector and inputs to the output."""
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def run(vector, inputs):
        parts = [piece.reshape(p.shape) for piece, p in zip(vector.split(sizes), parameters.values(), strict=True)]
        return torch.func.functional_call(model, dict(zip(parameters, parts, strict=True)), (inputs,))

    return torch.cat([p.detach().reshape(-1) for p in parameters.values()]), run


def whole(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([t for _, t in batches])


def second(function, at):
    """Return the Hessian as torch.func has it; its ``hessian`` warns of parts of torch that are out of date."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jacrev(torch.func.jacrev(function))(at)


def hessian(model, loss_fn, batches):
    model.eval()
    vector, run = flat(model)
    inputs, targets = whole(batches)
    return second(lambda v: loss_fn(run(v, inputs), targets), vector)


def gauss_newton(model, loss_fn, batches):
    """Return the mean of J' H J over the samples, all matrices in full."""
    model.eval()
    vector, run = flat(model)
    total, count = torch.zeros(len(vector), len(vector), dtype=vector.dtype), 0
    for x, t in zip(*whole(batches), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.func.jacrev(lambda v, x=x: run(v, x[None])[0])(vector)
        output = run(vector, x[None])
        curvature = second(lambda z, t=t: loss_fn(z, t[None]), output)
        curvature = curvature.reshape(output.numel(), output.numel())
        total += jacobian.T @ curvature @ jacobian
        count += 1
    return total / count


def split(model, vector):
    """Return ``vector`` in the shapes of the parameters."""
    parameters = list(model.parameters())
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def compare(found, params, expected, **tolerance):
    assert list(found) == params
    for key, wanted in zip(params, expected, strict=True):
        close(found[key], wanted, **tolerance)


def worth(found, expected):
    """Return the relative error of all entries together."""
    a, b = (torch.cat([t.double().reshape(-1) for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------- the formulas, one by one


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


def activation_cases():
    torch.manual_seed(0)
    yield nn.Linear(4, 3), (4,)
    yield nn.Linear(4, 3), (5, 4)
    yield nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 6)
    yield nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)
    yield nn.Conv2d(2, 3, (1, 3), dilation=2), (2, 4, 7)
    yield nn.Conv1d(3, 2, 3, padding="same"), (3, 6)
    yield nn.Conv3d(2, 2, 2), (2, 3, 3, 3)
    yield nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 3, 3)
    yield nn.ConvTranspose1d(3, 2, 3), (3, 5)


@pytest.mark.parametrize(("layer", "shape"), list(activation_cases()), ids=str)
def test_activations_are_weights_times_the_norm_of_what_they_multiply(layer, shape):
    layer = layer.double()
    batches = [torch.randn(size, *shape, dtype=torch.float64) for size in (3, 1, 2)]
    key = (layer, "weight")
    found = calibration.activations(layer, [(x, None) for x in batches], [key], progress=False)[key]
    every = torch.cat(batches)
    channel = -1 if isinstance(layer, nn.Linear) else 1
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    expected = torch.zeros_like(weight)
    for o, i in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            j = o  # stored as (in, out / groups)
        else:
            j = o // (weight.shape[0] // groups) * weight.shape[1] + i
        norm = math.sqrt(sum(v * v for v in every.select(channel, j).flatten().tolist()))
        expected[o, i] = weight[o, i].abs() * norm
    close(found, expected)


def test_activations_find_which_inputs_a_group_reads():
    """Deleting an input channel that is zero everywhere must cost nothing, so its weights score 0, and no others."""
    for layer in (nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)):
        inputs = torch.rand(2, 4, 3, 3) + 1
        inputs[:, 3] = 0
        found = calibration.activations(layer, [(inputs, None)], [(layer, "weight")], progress=False)
        [scores] = found.values()
        layer.weight.data[scores > 0] = 0
        assert not layer(inputs).any()
        assert int((scores == 0).sum()) == 3


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.inner(input=x) + self.inner(2 * x)


def test_activations_of_layers_called_twice_and_by_keyword():
    model = ByKeyword()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    key = (model.inner, "weight")
    found = calibration.activations(model, [(inputs, None)], [key], progress=False)[key]
    close(found, model.inner.weight.detach().abs() * (5 * inputs.square().sum(0)).sqrt())


@pytest.mark.parametrize("norm_first", [True, False])
def test_activations_of_a_transformer_layer_come_past_the_fast_path(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64)
    keys = [(layer.linear1, "weight"), (layer.linear2, "weight")]
    before = torch.backends.mha.get_fastpath_enabled()
    found = calibration.activations(layer, [(tokens, None)], keys, progress=False)
    assert torch.backends.mha.get_fastpath_enabled() == before
    layer.eval()
    hidden = layer.norm2(tokens + layer._sa_block(layer.norm1(tokens), None, None)) if norm_first else None
    x = layer.norm1(tokens + layer._sa_block(tokens, None, None)) if hidden is None else hidden
    close(found[keys[0]], (layer.linear1.weight.abs() * x.flatten(0, 1).norm(dim=0)).detach())
    y = F.relu(layer.linear1(x)).flatten(0, 1)
    close(found[keys[1]], (layer.linear2.weight.abs() * y.norm(dim=0)).detach())
    with pytest.raises(ValueError, match=r"self_attn\.out_proj\.weight.*never called"):
        calibration.activations(layer, [(tokens, None)], [(layer.self_attn.out_proj, "weight")], progress=False)


def test_activations_refuse_what_has_no_inputs():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for key in ((model[0], "bias"), (model[1], "weight")):
        with pytest.raises(TypeError, match=r"only the weights of Linear layers and convolutions"):
            calibration.activations(model, [(torch.ones(2, 2), None)], [key], progress=False)


# ------------------------------------------------------------------------------------------------------------ synflow


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


# ------------------------------------------------------------------------------------------------------ kinds of data


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


class Own(nn.Module):
    """Takes its targets and computes its outputs and loss from them, as models of the transformers library do."""

    def __init__(self):
        super().__init__()
        self.inner = tanh_net().double()

    def forward(self, x, labels):
        return {"logits": (out := self.inner(x)), "loss": F.cross_entropy(out, labels)}


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


# ----------------------------------------------------------------------------------------------------------- refusals


class Half(nn.Module):
    """Uses only the first of its two layers."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.used(x)


class Detour(Half):
    """Has two outputs, of which the loss sees one."""

    def forward(self, x):
        return self.used(x), self.unused(x)


@every_call
def test_bad_data_and_losses_are_refused_by_name(call):
    model, batches, params = build()
    wrong = {
        "empty": ([], F.cross_entropy, ValueError, "loader gave no batch"),
        "no samples": ([(torch.ones(0, 4).double(), torch.ones(0))], F.cross_entropy, ValueError, "without samples"),
        "no pair": ([torch.ones(2, 4)], F.cross_entropy, TypeError, "prepare="),
        "shape": (batches, functools.partial(F.cross_entropy, reduction="none"), ValueError, "reduction='mean'"),
        "type": (batches, lambda out, t: 1.0, ValueError, "type float"),
        "nan": (batches, lambda out, t: F.cross_entropy(out, t) * math.nan, ValueError, "loss_fn gave nan"),
        "inf": (batches, lambda out, t: F.cross_entropy(out, t) + math.inf, ValueError, "loss_fn gave inf"),
        "nothing": (batches, lambda out, t: torch.tensor(1.0), ValueError, "depends on no parameter|not depend"),
        "detached": (batches, lambda out, t: out.detach().sum(), ValueError, "depends on no parameter|not depend"),
    }
    for loader, loss_fn, error, message in wrong.values():
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            call(model, loss_fn, loader, params)
        assert before.differences() == []
    late = [*batches, (torch.full((2, 4), torch.nan).double(), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="loss_fn gave nan"):
        call(model, F.cross_entropy, late, params)
    for half, loss_fn in ((Half(), F.cross_entropy), (Detour(), lambda out, t: F.cross_entropy(out[0], t))):
        if isinstance(half, Detour) and call.func is calibration.hessian_diagonal and "method" not in call.keywords:
            continue  # Gauss-Newton takes one output only
        with pytest.raises(ValueError, match=r"unused\.weight.*does not depend on"):
            call(half, loss_fn, batches, pairs(half))
        assert len(call(half, loss_fn, batches, pairs(half)[:2])) == 2


@pytest.mark.parametrize("call", [*CALLS.values(), activations], ids=[*CALLS, "activations"])
def test_bad_arguments_are_refused_by_name(call):
    model, batches, params = build()
    other = nn.Linear(4, 4).double()
    for arguments, options, error, message in (
        ((model, params), {"max_batches": 0}, ValueError, "max_batches=0"),
        ((model, params), {"batches": 2}, TypeError, "unknown arguments.*batches"),
        ((model, [(other, "weight")]), {}, ValueError, "no part of the model"),
        ((model, []), {}, ValueError, "lists no tensor"),
        (("model", params), {}, TypeError, "Pass a torch.nn.Module"),
    ):
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            call(arguments[0], F.cross_entropy, batches, arguments[1], **options)
        assert before.differences() == []
    if call is not activations:
        with pytest.raises(ValueError, match="'nope' is no parameter"):
            call(model, F.cross_entropy, batches, [(model[0], "nope")])


def test_bad_choices_are_refused_by_name(monkeypatch):
    model, batches, params = build()
    args = model, F.cross_entropy, batches, params
    with pytest.raises(ValueError, match="per='layer'"):
        calibration.taylor(*args, per="layer")
    with pytest.raises(ValueError, match="method='x' is unknown"):
        calibration.hessian_diagonal(*args, method="x")
    with pytest.raises(ValueError, match="samples=0"):
        calibration.hessian_diagonal(*args, samples=0)
    with pytest.raises(TypeError, match="samples="):
        calibration.hessian_diagonal(*args, samples=1.5)
    with pytest.raises(TypeError, match="grasp reads the data twice"):
        calibration.grasp(model, F.cross_entropy, iter(batches), params)
    monkeypatch.setattr("torchprune_ext.calibration.curvature.EXACT_LIMIT", 42)
    with pytest.raises(ValueError, match="43 weights of 42"):
        CALLS["exact"](*args)


# ----------------------------------------------------------------------------------------- the model does not notice


class Strange(nn.Module):
    """Renews a buffer, writes into another, uses random numbers and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        self.total.add_(1)
        return x + 0 * torch.rand_like(x)


def prepared(kind):
    """Return a model in a state that is easily spoilt."""
    model, batches, params = build("residual")
    if kind == "strange":
        model.head = nn.Sequential(model.head, Strange())
        params = pairs(model)
    elif kind != "dense":
        for module in (model.stem, model.conv, model.head):
            if kind == "native":
                prune.random_unstructured(module, "weight", 0.4)
                prune.l1_unstructured(module, "weight", 0.3)
            else:
                tpe.threshold(module, "weight", 0.1)
                tpe.every_other(module, "weight", 3)
        if kind == "ours":
            tpe.bn_scaling(model.conv, "weight", 0.5, model.second)
        params = [(m, n.removesuffix("_orig")) for m, n in params]
    model.train()
    model.down.eval()
    model.head.requires_grad_(False)
    model.conv.register_forward_hook(lambda module, inputs, output: None)
    model.stem.register_forward_pre_hook(lambda module, inputs: None)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    return model, batches, params


class PlantedError(Exception):
    pass


def broken_loader(batches):
    class Broken:
        def __iter__(self):
            yield batches[0]
            raise PlantedError

    return Broken()


@pytest.mark.parametrize("kind", ["dense", "native", "ours", "strange"])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorize")
@pytest.mark.parametrize("name", [*CALLS, "activations"])
def test_the_model_is_as_it_was(name, kind):
    call = {**CALLS, "activations": activations}[name]
    model, batches, params = prepared(kind)
    before = Snapshot(model)
    order = [(n, id(p)) for n, p in model.named_parameters()]
    state = torch.get_rng_state()
    found = call(model, F.cross_entropy, batches[:2], params, keep_rng=True)
    assert torch.equal(state, torch.get_rng_state())
    assert before.differences() == []
    for (module, tensor), scores in found.items():
        assert scores.shape == getattr(module, tensor).shape
        assert scores.isfinite().all()
        assert not scores.requires_grad
        assert name in SIGNED or scores.min() >= 0
    with pytest.raises(PlantedError):
        call(model, F.cross_entropy, broken_loader(batches), params, keep_rng=True)
    assert before.differences() == []
    count = itertools.count()

    def broken_loss(output, target):
        if next(count) == 1:
            raise PlantedError
        return F.cross_entropy(output, target)

    if name != "activations":
        with pytest.raises(PlantedError):
            call(model, broken_loss, batches, params, keep_rng=True)
    assert before.differences() == []
    assert torch.equal(state, torch.get_rng_state())
    assert order == [(n, id(p)) for n, p in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    model(batches[0][0]).sum().backward()  # it still trains


def test_a_graph_made_before_can_be_run_backward_after():
    model, batches, params = build("residual")
    model.eval()
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    for call in CALLS.values():
        call(model, F.cross_entropy, batches[:1], params)
    loss.backward()
    assert model.stem.weight.grad.any()


# ------------------------------------------------------------------------------------------------------ pruned models


@pytest.mark.parametrize("name", [*CALLS, "activations"])
@pytest.mark.parametrize("kind", ["native", "ours"])
def test_pruned_models_have_the_dense_statistics_of_their_effective_weights(name, kind):
    call = {**CALLS, "activations": activations}[name]
    model, batches, params = prepared(kind)
    with torch.no_grad():  # what an optimizer does to dead entries; the attribute `weight` is stale from now on
        for module in (model.stem, model.conv, model.head):
            module.weight_orig += 0.1
    dense, _, plain = build("residual")
    with torch.no_grad():
        twins = sorted_pairs(plain, dense)
        for (module, tensor), (twin, other) in zip(sorted_pairs(params, model), twins, strict=True):
            value = module._parameters.get(tensor)
            value = getattr(module, f"{tensor}_orig") * getattr(module, f"{tensor}_mask") if value is None else value
            getattr(twin, other).copy_(value)
        for module, twin in zip(model.modules(), dense.modules(), strict=True):
            if isinstance(module, nn.BatchNorm2d):
                twin.running_mean.copy_(module.running_mean)
                twin.running_var.copy_(module.running_var)
    args = F.cross_entropy, batches
    found = call(model, *args, sorted_pairs(params, model))
    expected = call(dense, *args, sorted_pairs(plain, dense))
    assert len(found) == len(expected)
    for scores, wanted in zip(found.values(), expected.values(), strict=True):
        close(scores, wanted, atol=1e-13)
    if name in ("gradients", "fisher", "ggn", "exact"):
        assert found[model.conv, "weight"][model.conv.weight_mask == 0].any()


def sorted_pairs(params, model):
    """Return the pairs in an order that does not depend on what is pruned."""
    places = {id(module): place for place, module in enumerate(model.modules())}
    return sorted(params, key=lambda pair: (places[id(pair[0])], pair[1]))


def test_scores_go_where_scores_are_taken():
    for name, call in CALLS.items():
        if name in SIGNED:
            continue
        model, batches, _ = build("relu")
        params = [(model[0], "weight"), (model[4], "weight")]
        scores = call(model, F.cross_entropy, batches, params)
        prune.global_unstructured(params, prune.L1Unstructured, importance_scores=scores, amount=0.5)
        twin, _, _ = build("relu")
        others = [(twin[0], "weight"), (twin[4], "weight")]
        given = dict(zip(others, scores.values(), strict=True))
        tpe.global_unstructured(others, amount=0.5, importance_scores=given, min_keep=0)
        for (module, _), (other, _) in zip(params, others, strict=True):
            if not (torch.cat([s.reshape(-1) for s in scores.values()]).unique().numel() < 42):  # else ties
                assert torch.equal(module.weight_mask, other.weight_mask)
        tpe.nm_structured(twin[4], "weight", 1, 4, importance_scores=scores[model[4], "weight"])
        assert twin[4].weight_mask.view(-1, 4).sum(1).max() == 1
    for method in ("ggn", "exact", "hutchinson"):
        model, batches, _ = build("relu")
        params = [(model[0], "weight"), (model[4], "weight")]
        h = calibration.hessian_diagonal(model, F.cross_entropy, batches, params, method=method, progress=False)
        tpe.global_obd_saliency(params, amount=0.5, hessian_diag=h)
        tpe.obd_saliency(model[4], "weight", 0.1, h[model[4], "weight"])
    assert int(sum(m.weight_mask.sum() for m, _ in params)) < 21


# ---------------------------------------------------------------------------------------- models that torch.func hates


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


# ------------------------------------------------------------------------------------------------------------ penalties


def test_bn_l1_penalty_is_the_sum_of_the_sizes_of_the_scales():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm1d(2), nn.BatchNorm2d(4, affine=False))
    model[1].weight.data = torch.tensor([1.0, -2.0, 0.0])
    model[2].weight.data = torch.tensor([0.5, -0.25])
    penalty = tpe.bn_l1_penalty(model, strength=0.1)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(0.375)
    (penalty + 0).backward()
    close(model[1].weight.grad, torch.tensor([0.1, -0.1, 0.0]))
    close(model[2].weight.grad, torch.tensor([0.1, -0.1]))
    assert all(p.grad is None for n, p in model.named_parameters() if n not in ("1.weight", "2.weight"))
    assert tpe.bn_l1_penalty(model).item() == pytest.approx(3.75e-4)
    assert tpe.bn_l1_penalty(model, 0).item() == 0


def test_bn_l1_penalty_of_pruned_scales():
    bn = nn.BatchNorm2d(4)
    bn.weight.data = torch.tensor([1.0, -2.0, 3.0, -4.0])
    prune.custom_from_mask(bn, "weight", torch.tensor([1.0, 0.0, 0.0, 1.0]))
    with torch.no_grad():
        bn.weight_orig += 1  # as an optimizer does; the attribute is stale now
    penalty = tpe.bn_l1_penalty(bn, strength=2)
    assert penalty.item() == 10
    penalty.backward()
    equal(bn.weight_orig.grad, torch.tensor([2.0, 0.0, 0.0, -2.0]))


def test_bn_l1_penalty_makes_small_scales():
    sums = []
    for strength in (0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            x = torch.randn(16, 2)
            loss = F.mse_loss(model(x)[:, 0], x[:, 0]) + tpe.bn_l1_penalty(model, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums.append(float(model[1].weight.detach().abs().sum()))
    assert sums[1] < 0.8 * sums[0]


def test_bn_l1_penalty_refuses():
    for model in (nn.Linear(2, 2), nn.BatchNorm2d(2, affine=False)):
        with pytest.raises(ValueError, match="no BatchNorm with scales"):
            tpe.bn_l1_penalty(model)
    for strength in (-1, math.nan):
        with pytest.raises(ValueError, match="strength="):
            tpe.bn_l1_penalty(nn.BatchNorm1d(2), strength)


# ---------------------------------------------------------------------------------------------------- several processes


def share(batches, rank):
    """Return the batches of a rank: 5 samples and 3, in several batches and in one."""
    return batches[:2] if rank else batches[2:]


def half_of_the_data_each_is_all_of_it(rank, group):
    for net in ("relu", "residual"):
        model, batches, params = build(net, sizes=(2, 1, 3, 2), dtype=torch.float32)
        for name, call in {**CALLS, "activations": activations}.items():
            if name in ("hutchinson", "ggn, sampled"):
                continue
            alone = call(model, F.cross_entropy, batches, params)
            before = Snapshot(model)
            found = call(model, F.cross_entropy, share(batches, rank), params, process_group=group)
            assert before.differences() == [], name
            for key in alone:
                size = float(alone[key].abs().max())
                torch.testing.assert_close(found[key], alone[key], rtol=1e-6, atol=2e-6 * size, msg=name)


def random_probes_of_all_ranks(rank, group):
    model, batches, params = build(sizes=(4, 4))
    exact = CALLS["exact"](model, F.cross_entropy, batches, params)
    found = calibration.hessian_diagonal(
        model, F.cross_entropy, batches[rank : rank + 1], params, method="hutchinson", samples=200, progress=False,
        process_group=group,
    )  # fmt: skip
    square = torch.cat([
        ((found[key] - exact[key]) / found.standard_error[key])[found.standard_error[key] > 1e-9].square().reshape(-1)
        for key in params
    ])  # fmt: skip
    assert 0.3 < float(square.mean()) < 2.5
    same = [torch.zeros_like(t) for t in found.values()]
    for mine, values in zip(same, found.values(), strict=True):
        mine.copy_(values)
        dist.broadcast(mine, 0, group=group)
        assert torch.equal(mine, values)


def an_error_on_one_rank_stops_all(rank, group):
    for bad, (name, call) in itertools.product((0, 1), {**CALLS, "activations": activations}.items()):
        model, batches, params = build()
        before = Snapshot(model)
        loader = broken_loader(batches) if rank == bad else batches
        with pytest.raises(PlantedError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, loader, params, process_group=group)
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, [] if rank == bad else batches, params, process_group=group)
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, batches, [] if rank == bad else params, process_group=group)
        wrong = [(nn.Linear(4, 4), "weight")]
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, batches, wrong if rank == bad else params, process_group=group)
        assert before.differences() == [], name


def an_argument_that_is_wrong_on_one_rank_stops_all(rank, group):
    model, batches, params = build()
    before = Snapshot(model)
    for bad, (function, wrong, error) in itertools.product(
        (0, 1),
        (
            (calibration.taylor, {"per": "weight"}, ValueError),
            (calibration.hessian_diagonal, {"method": "gnn"}, ValueError),
            (calibration.hessian_diagonal, {"samples": 0}, ValueError),
            (calibration.fisher, {"max_batches": 0}, ValueError),
        ),
    ):
        with pytest.raises(error if rank == bad else RuntimeError):
            function(
                model, F.cross_entropy, batches, params, progress=False, process_group=group,
                **(wrong if rank == bad else {}),
            )  # fmt: skip
        loader = iter(batches) if rank == bad else batches
        with pytest.raises(TypeError if rank == bad else RuntimeError, match=r"iterator|ranks"):
            calibration.grasp(model, F.cross_entropy, loader, params, progress=False, process_group=group)
    assert before.differences() == []


def run(rank, init):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=patience)
    for scenario in (
        half_of_the_data_each_is_all_of_it,
        random_probes_of_all_ranks,
        an_error_on_one_rank_stops_all,
        an_argument_that_is_wrong_on_one_rank_stops_all,
    ):
        try:
            scenario(rank, dist.group.WORLD)
        except BaseException as error:
            raise AssertionError(f"{scenario.__name__} failed on rank {rank}: {error!r}") from error
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
def test_two_processes_get_what_one_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(run, (f"file://{tmp_path}/init",), nprocs=2)
