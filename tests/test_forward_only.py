"""Activations are weights times the norm of what they multiply."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from calibrating import calibration, close
from torch import nn


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
