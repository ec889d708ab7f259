"""What the tests of permutations share: outputs, what n:m keeps, and a small model."""

import copy

import torch
from torch import nn

from torchprune_ext._graph import evaluating, outputs_in


def outputs(model, inputs):
    """Return all outputs in float64."""
    model = copy.deepcopy(model).double()
    inputs = inputs if isinstance(inputs, (tuple, dict)) else (inputs,)

    def cast(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    with evaluating(model):
        if isinstance(inputs, dict):
            out = model(**{key: cast(each) for key, each in inputs.items()})
        else:
            out = model(*map(cast, inputs))
    return [tensor for _, tensor in outputs_in(out)]


def assert_same(model, before, inputs, dtype=torch.float64):
    """Check that outputs agree, up to the order of sums in the dtype that the model's code computes in."""
    for one, other in zip(before, outputs(model, inputs), strict=True):
        assert float((one - other).abs().max()) <= 1024 * torch.finfo(dtype).eps * float(one.abs().max())


def kept(weight, n=2, m=4):
    """Return the share of the sum of absolute weights that n:m keeps along axis 1, as a plain loop."""
    rows = weight.detach().abs().double().movedim(1, -1).flatten(0, -2)
    total = sum(
        sum(sorted(row[start : start + m], reverse=True)[:n])
        for row in rows.tolist()
        for start in range(0, len(row), m)
    )
    return total / float(rows.sum())


def chain(hidden=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 5))


def weights(model):
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
