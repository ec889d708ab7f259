"""What was seen to go wrong when the package was used in ways that no other test thought of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


class Rectified(nn.Linear):
    """Its weight does not multiply what it is called with."""

    def forward(self, x):
        return super().forward(x.relu())


class Standardized(nn.Conv2d):
    """Convolves with another tensor than its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Padding(nn.Conv2d):
    """Pads by itself, and does more behind the convolution."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1))) + 1


class Own(nn.Linear):
    """Multiplies as ``Linear`` does, in code of its own."""

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


class Cube(nn.Module):
    """A weight with three axes that is not that of a convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x):
        return torch.einsum("bi,oki->bok", x, self.weight)


class LazyBehind(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.lazy = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.lazy(self.norm(self.conv(x)))


def data_of(*shape):
    return torch.linspace(-3, 5, torch.Size(shape).numel()).sin().view(shape)


def test_training_under_native_masks_is_not_forgotten_when_one_of_ours_follows():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    dense, data, params = copy.deepcopy(model), data_of(64, 8), tpe.prunable_parameters(model)
    for module, name in params:
        prune.l1_unstructured(module, name, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(data).square().mean().backward()
    optimizer.step()
    model(data)
    tpe.global_unstructured(params, target_sparsity=0.6)  # now entries with a gradient are masked too
    with pytest.raises(ValueError, match="has changed since it was pruned"):
        tpe.compensate(model, [data], params, progress=False)
    tpe.compensate(model, [data], params, dense=dense, progress=False)


@pytest.mark.parametrize(
    ("layer", "shape"), [(Rectified(8, 4), (32, 8)), (Standardized(2, 4, 3), (4, 2, 5, 5))], ids=["linear", "conv"]
)
def test_activations_refuse_what_compensate_refuses(layer, shape):
    with pytest.raises(TypeError, match=f"whose module is a {type(layer).__name__}, which does not multiply"):
        tpe.calibration.activations(nn.Sequential(layer), [data_of(*shape)], [(layer, "weight")], progress=False)


@pytest.mark.parametrize(
    ("layer", "plain", "shape"),
    [(Own(8, 4), nn.Linear(8, 4), (32, 8)), (Padding(2, 4, 3), nn.Conv2d(2, 4, 3, padding=1), (4, 2, 5, 5))],
    ids=["linear", "conv"],
)
def test_activations_take_subclasses_with_a_forward_of_their_own(layer, plain, shape):
    plain.load_state_dict(layer.state_dict())
    found = [
        tpe.calibration.activations(nn.Sequential(each), [data_of(*shape)], [(each, "weight")], progress=False)
        for each in (layer, plain)
    ]
    assert torch.equal(found[0][layer, "weight"], found[1][plain, "weight"])


@pytest.mark.parametrize(
    "call",
    [
        tpe.calibration.activations,
        tpe.compensate,
        lambda *args, **kwargs: tpe.sparsegpt(*args, target_sparsity=0.5, **kwargs),
    ],
    ids=["activations", "compensate", "sparsegpt"],
)
def test_a_weight_of_three_axes_of_an_unknown_module_is_refused_by_name(call):
    model = nn.Sequential(Cube())
    with pytest.raises(TypeError, match=r"params holds 0\.weight, whose module is a Cube, which does not multiply"):
        call(model, [data_of(16, 4)], [(model[0], "weight")], progress=False)


def test_bn_pairs_refuses_lazy_layers_that_its_forward_would_make():
    model = LazyBehind()
    with pytest.raises(ValueError, match=r"model\.lazy, a LazyConv2d, has no shape yet"):
        tpe.bn_pairs(model, data_of(1, 1, 2, 2))
    assert type(model.lazy) is nn.LazyConv2d
    with pytest.raises(ValueError, match=r"model\.lazy, a LazyConv2d, has no shape yet"):
        tpe.dense_values(model, [(model.conv, "weight")])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        return x


def test_bn_pairs_leaves_buffers_that_a_forward_writes_as_they_were():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Counting())
    calls, last = model[2].calls, model[2].last
    assert tpe.bn_pairs(model, data_of(1, 1, 2, 2)) == [(model[0], model[1])]
    assert model[2].calls is calls
    assert int(calls) == 0
    assert model[2].last is last


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_dense_of_a_wrapped_model_tells_how_to_unwrap_it(prefix):
    model = nn.Sequential(nn.Linear(8, 4))
    state, params = copy.deepcopy(model.state_dict()), [(model[0], "weight")]
    wrapped = {prefix + name: value for name, value in state.items()}
    tpe.global_unstructured(params, target_sparsity=0.5)
    with pytest.raises(ValueError, match="wrapped") as caught:
        tpe.compensate(model, [data_of(32, 8)], params, dense=wrapped, progress=False)
    remedy = f"{{name.removeprefix({prefix!r}): value for name, value in dense.items()}}"
    assert remedy in str(caught.value)
    tpe.compensate(model, [data_of(32, 8)], params, dense=eval(remedy, {"dense": wrapped}), progress=False)


def test_dense_from_outside_of_the_wrapper_is_explained_too():
    model = nn.Sequential(nn.Linear(8, 4))
    params = [(model[0], "weight")]
    dense = copy.deepcopy(model)
    tpe.global_unstructured(params, target_sparsity=0.5)
    with pytest.raises(ValueError, match="wrapped"):
        tpe.compensate(nn.DataParallel(model), [data_of(32, 8)], params, dense=dense, progress=False)
