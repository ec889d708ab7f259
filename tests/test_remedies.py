"""A tensor that a call cannot take is left out as the refusal says, and then the call goes through."""

import re
from functools import partial

import pytest
import torch
from torch import nn

import torchprune_ext as tpe
from torchprune_ext._checks import leave_out


class Block(nn.Module):
    """A layer that is called in its own way, and one that is called as usual."""

    def __init__(self):
        super().__init__()
        self.odd, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.plain(x)


class Twice(Block):
    def forward(self, x):
        return self.plain(self.odd(self.odd(x)))


class Routed(Block):
    def forward(self, x):
        return torch.cat([self.odd(x[x.sum(-1) > 0]), x[x.sum(-1) <= 0]]) + self.plain(x)


class Softmax(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Normed(nn.Linear):
    """Multiplies something else than it is called with."""

    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class OfNormed(Block):
    def __init__(self):
        super().__init__()
        self.odd = Normed(4, 4)

    def forward(self, x):
        return self.plain(x) + self.odd(x)


class Gated(Block):
    def __init__(self):
        super().__init__()
        self.odd = Softmax(4, 4)

    def forward(self, x):
        return self.plain(x * self.odd(x))


class Detached(Block):
    def forward(self, x):
        return self.plain(x) + self.odd(x).detach()


class Paired(Block):
    """Called with two tensors."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.plain(x) + self.odd(x, x)


class TwoWeights(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.other = nn.Parameter(torch.ones(outputs, inputs))


class Doubled(Block):
    def __init__(self):
        super().__init__()
        self.odd = TwoWeights(4, 4)

    def forward(self, x):
        return self.plain(x) + self.odd(x)


DATA = [torch.linspace(-1, 1, 64).reshape(16, 4).mul(5).sin() for _ in range(2)]
activations = partial(tpe.calibration.activations, loader=DATA, progress=False)
gradients = partial(
    tpe.calibration.gradients,
    loss_fn=lambda y, target: (y - target).square().mean(),
    loader=[(x, x.cos()) for x in DATA],
    progress=False,
)
compensate = partial(tpe.prune_and_compensate, loader=DATA, target_sparsity=0.5, progress=False)
CASES = [
    (compensate, Twice, "is called more than once"),
    (compensate, Block, "is never called on this data"),
    (compensate, Routed, "depends on the weights"),
    (compensate, Gated, "which does not multiply"),
    (compensate, Paired, "which does not multiply|is called with 2"),
    (compensate, Doubled, "is one of several tensors of its module"),
    (activations, Block, "which no data reached"),
    (activations, Gated, "which does not multiply"),
    (activations, OfNormed, "which does not multiply"),
    (gradients, Detached, "which the loss does not depend on"),
]


@pytest.mark.parametrize(("call", "block", "words"), CASES)
def test_the_tensor_is_left_out_as_the_refusal_says(call, block, words):
    torch.manual_seed(0)
    model = nn.Sequential(block(), nn.Sequential(block(), nn.ReLU()))
    params = tpe.prunable_parameters(model, types=(nn.Linear, nn.Bilinear))
    params += [(module, "other") for module, _ in params if hasattr(module, "other")]
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call(model=model, params=params)
    remedy = re.search(r"prunable_parameters\(model, .*?\)", str(caught.value))[0]
    rest = eval(remedy, {"prunable_parameters": tpe.prunable_parameters, "model": model})
    assert 1 <= len(rest) <= len(params) - 1
    if "0.odd" in remedy:  # the remedy names one layer; the other block's stands elsewhere
        rest = [(module, name) for module, name in rest if module is not model[1][0].odd]
    call(model=model, params=rest)


@pytest.mark.parametrize(
    ("tensor", "exclude"),
    [
        ("layers.0.mlp.gate.weight", "layers.*.mlp.gate"),
        ("a.0.experts.11.w1.weight", "a.*.experts.*.w1"),
        ("0.odd.weight", "*.odd"),
        ("conv2.3x.weight", "conv2.3x"),
        ("layers.3.weight", "layers.3"),
        ("3.weight", "3"),
    ],
)
def test_the_same_layer_is_left_out_of_every_block(tensor, exclude):
    assert leave_out(tensor) == f"Leave it out, e.g. by prunable_parameters(model, exclude={exclude!r})"


def test_a_tensor_of_the_model_itself_has_no_path():
    assert leave_out("weight") == "Leave it out"
