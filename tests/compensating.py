"""Models, data and the oracle that the tests of compensation share.

The oracle goes through the layers in a loop with two plain models side by side; what a row of a weight multiplies it
finds by letting the layer itself run with one weight at 1 and all others at 0.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.compensation import solvers

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)
equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
compensate = functools.partial(tpe.compensate, progress=False)
prune_and_compensate = functools.partial(tpe.prune_and_compensate, progress=False)
prune_in_rounds = functools.partial(tpe.prune_in_rounds, progress=False)
sparsegpt = functools.partial(tpe.sparsegpt, progress=False)
MARKS = [  # of every file of tests of compensation
    *toys.unwarned,
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:fewer rows of data than the layer has inputs"),
]


# ------------------------------------------------------------------------------------------------------ models, data


class Conv1D(nn.Module):
    """As transformers have it: the weight is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, images):
        stem = F.relu(self.first(self.stem(images)))
        return self.head(F.relu(self.second(self.conv(stem)) + self.down(stem)).mean((2, 3)))


class Tokens(nn.Module):
    """Layers that see (batch, tokens, features)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.shape[0] > 2 else x


class OtherOrder(Branching):
    def forward(self, x):
        return self.a(self.b(x)) if x.shape[0] > 2 else self.b(self.a(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.a(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.mix(tokens, tokens, tokens, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Breaks(nn.Module):
    """Raises on batches of two samples, between two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        if x.shape[0] == 2:
            raise ArithmeticError("on purpose")
        return self.b(x)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def convnet():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3))


SINGLE = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, tokens": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "(in, out)": (lambda: Conv1D(6, 4), (6,)),
    "(in, out), square": (lambda: Conv1D(5, 5), (3, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "grouped, no bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 5, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=(2, 1)), (2, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 3)), (2, 5, 5)),
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 5)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 9)),
    "conv1d, grouped": (lambda: nn.Conv1d(4, 4, 3, groups=2, dilation=2, padding=2, padding_mode="replicate"), (4, 9)),
}
DEEP = {
    "mlp": (mlp, (6,)),
    "conv": (convnet, (2, 6, 6)),
    "residual": (Residual, (2, 5, 5)),
    "tokens": (Tokens, (3, 4)),
    "(in, out)": (lambda: nn.Sequential(Conv1D(4, 6), nn.GELU(), Conv1D(6, 4)), (3, 4)),
}
ALL = {**SINGLE, **{f"deep {name}": row for name, row in DEEP.items()}}
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
single = pytest.mark.parametrize("name", SINGLE)
deep = pytest.mark.parametrize("name", DEEP)


def build(make, seed=0, dtype=torch.float64):
    """Return a model, the same at every call."""
    torch.manual_seed(seed)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def data(shape, sizes=(24,), seed=1, dtype=torch.float64):
    """Return batches of correlated inputs that are not about 0."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), *shape, generator=made, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, 1) + 0.5 * torch.randn(sum(sizes), *[1] * len(shape), generator=made) + 0.3
    return [(part.to(dtype), None) for part in x.split(sizes)]


def pairs(model):
    return [(module, "weight") for module in model.modules() if isinstance(module, LINEAR)]


def names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LINEAR)]


def pruned(name, amount=0.5, seed=0, dtype=torch.float64, how=prune.random_unstructured):
    """Return a pruned model and its parameters."""
    model = build(ALL[name][0], seed, dtype)
    for module, tensor in pairs(model):
        how(module, tensor, amount=amount)
    return model, pairs(model)


# ---------------------------------------------------------------------------------------------------------- the oracle


def columns(layer, x):
    """Return what the rows of the weight of a plain layer multiply: (groups, samples, inputs)."""
    probe, groups = copy.deepcopy(layer), getattr(layer, "groups", 1)
    if probe.bias is not None:
        probe.bias.data.zero_()
    flat, found = probe.weight.data.clone(), []
    by_input = flat if isinstance(layer, Conv1D) else flat.flatten(1).t()
    for k in range(len(by_input)):
        row = torch.zeros_like(by_input)
        row[k] = 1
        probe.weight.data = row if isinstance(layer, Conv1D) else row.t().reshape(flat.shape)
        found.append(rows(layer, probe(x))[:, :, 0])
    assert len(found[0]) == groups
    return torch.stack(found, -1).detach()


def rows(layer, y):
    """Return outputs as (groups, samples, outputs)."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        y = y.flatten(2).mT  # (batch, places, channels)
    return y.reshape(-1, getattr(layer, "groups", 1), y.shape[-1] // getattr(layer, "groups", 1)).movedim(1, 0)


def matrix(layer, weight):
    """Return a weight or mask as (groups, outputs, inputs)."""
    weight = weight.t() if isinstance(layer, Conv1D) else weight.flatten(1)
    return weight.reshape(getattr(layer, "groups", 1), -1, weight.shape[1])


def best_row(x, y, start, keep, fixed, ridge):
    """Return weights and bias of one output by least squares on what is kept; ``fixed`` is a bias, or None."""
    about_x, about_y = (x.mean(0), y.mean()) if fixed is None else (torch.zeros_like(x[0]), fixed)
    centred, weight = x - about_x, torch.zeros_like(start)
    pull = (ridge * centred.square().sum(0).mean()).sqrt()
    left = torch.cat([centred[:, keep], pull * torch.eye(int(keep.sum()), dtype=x.dtype)])
    right = torch.cat([y - about_y, pull * start[keep]])
    weight[keep] = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
    return weight, y.mean() - x.mean(0) @ weight if fixed is None else fixed


def watch(model, layer, batches):
    """Return all inputs of a layer and all its outputs."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    for x, _ in batches:
        model(*x) if isinstance(x, tuple) else model(x)
    handle.remove()
    return [torch.cat(part).detach() for part in zip(*seen, strict=True)]


def in_both(model, dense, name, batches):
    """Return a layer's inputs, in the model and in the dense one, and what it gives and should give for them."""
    layer = model.get_submodule(name)
    (x, y), (dense_x, wanted) = (watch(net, net.get_submodule(name), batches) for net in (model, dense))
    return torch.cat([x, dense_x]), torch.cat([y, layer(dense_x).detach()]), torch.cat([wanted, wanted])


def oracle(name, masks, batches, ridge=None, create_bias=False):
    """Return a plain model that was fitted layer by layer, and the errors before and after."""
    ridge = solvers.RIDGE if ridge is None else ridge
    dense, model, fits = build(ALL[name][0]).eval(), build(ALL[name][0]).eval(), []
    for layer, mask in zip(names(model), masks, strict=True):
        model.get_submodule(layer).weight.data *= mask
    for each, mask in zip(names(model), masks, strict=True):
        layer = model.get_submodule(each)
        free = create_bias or layer.bias is not None
        x, before, y = in_both(model, dense, each, batches)
        x, y = columns(layer, x), rows(layer, y)
        keep, weight = matrix(layer, mask) != 0, matrix(layer, layer.weight.data).clone()
        bias = torch.zeros(weight.shape[:2], dtype=x.dtype)
        for group in range(weight.shape[0]):
            for out in range(weight.shape[1]):
                arguments = x[group], y[group, :, out], weight[group, out], keep[group, out]
                fixed = None if free else torch.zeros((), dtype=x.dtype)
                weight[group, out], bias[group, out] = best_row(*arguments, fixed, ridge)
        after = x @ weight.mT + bias[:, None]
        energy = (y - y.mean(1, keepdim=True)).square().sum()
        fits.append([float((e - y).square().sum() / energy) for e in (rows(layer, before), after)])
        flat = weight.flatten(0, 1)
        layer.weight.data = (flat.t() if isinstance(layer, Conv1D) else flat).reshape(layer.weight.shape).contiguous()
        if free:
            layer.bias = nn.Parameter(bias.flatten())
    return model, fits


def same_as_oracle(name, model, batches, fits, **options):
    masks = [module.weight_mask for module, _ in pairs(model)]
    expected, errors = oracle(name, masks, batches, **options)
    for each, fit, error in zip(names(model), fits.values(), errors, strict=True):
        found, wanted = model.get_submodule(each), expected.get_submodule(each)
        close(found.weight.detach(), wanted.weight.detach(), msg=lambda text, each=each: f"{each}: {text}")
        if wanted.bias is not None:
            close(found.bias.detach(), wanted.bias.detach(), msg=lambda text, each=each: f"bias of {each}: {text}")
        torch.testing.assert_close([fit.before, fit.after], error, rtol=1e-4, atol=1e-8)


def weights(model):
    found = [[m.weight.detach().clone(), m.bias.detach().clone()] for m, _ in pairs(model) if m.bias is not None]
    return found + [[m.weight.detach().clone()] for m, _ in pairs(model) if m.bias is None]


def _without_a_row(module):
    mask = torch.ones_like(module.weight)
    mask[0] = 0
    return mask


def spoilt(batches, how):
    """Return inputs with what makes least squares hard."""
    batches = [(x.clone(), y) for x, y in batches]
    for x, _ in batches:
        if how == "dead":
            x[:, 0] = 0
        elif how == "constant":
            x[:, 1] = 2.5
        elif how == "zero":
            x.zero_()
        elif how == "equal":
            x[:, 1] = x[:, 0]
        elif how == "far":
            x += 1e4
        elif how == "huge":
            x *= 1e8
        elif how == "tiny":
            x *= 1e-12
    return [(x[:2], y) for x, y in batches[:1]] if how == "few" else batches


SPOILT = ["plain", "dead", "constant", "zero", "equal", "far", "huge", "tiny", "few"]


def never_worse(fits):
    for (module, _), fit in fits.items():
        assert torch.isfinite(torch.tensor([fit.before, fit.after])).all(), (module, fit)
        assert fit.after <= fit.before * (1 + 1e-9) + 1e-15, (module, fit)


def magnitude(model):
    return {(module, name): getattr(module, name).detach().abs() for module, name in pairs(model)}


def two():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


class Table(nn.Module):
    """Multiplies a table that has nothing to do with the samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return self.a(x) @ self.b(self.table).t()


class Remembering(Branching):
    def forward(self, x, memory):
        return self.b(F.gelu(self.a(x) @ memory.t() @ memory / 8))


def with_memory(size):
    memory = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [((x, memory), None) for x, _ in data((4,), (size,))]


class Positions(Branching):
    def forward(self, x, position):
        return self.b(self.a(x) + position[:, None])


def with_positions(size):
    return [((x, torch.arange(3.0).double()), None) for x, _ in data((3, 4), (size,))]


def history(module):
    (hook,) = module._forward_pre_hooks.values()
    return hook
