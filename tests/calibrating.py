"""Models, data, losses and oracles that the tests of statistics share.

The oracles go through the samples in a loop, or through the whole Hessian, in float64 and with plain autograd.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


class Own(nn.Module):
    """Takes its targets and computes its outputs and loss from them, as models of the transformers library do."""

    def __init__(self):
        super().__init__()
        self.inner = tanh_net().double()

    def forward(self, x, labels):
        return {"logits": (out := self.inner(x)), "loss": F.cross_entropy(out, labels)}


class PlantedError(Exception):
    pass


def broken_loader(batches):
    class Broken:
        def __iter__(self):
            yield batches[0]
            raise PlantedError

    return Broken()
