"""What only looks pruned or prunable, and pruning in inference mode."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from globally import weights
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import torchprune_ext as tpe


class Masked(nn.Module):
    """A layer that masks its own weights, with the names of the host."""

    def __init__(self):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("weight_mask", (torch.rand(4, 8) > 0.5).float())

    def forward(self, x):
        return F.linear(x, self.weight_orig * self.weight_mask)


class Property(Masked):
    """The same with the product as a property."""

    @property
    def weight(self):
        return self.weight_orig * self.weight_mask

    def forward(self, x):
        return F.linear(x, self.weight)


class Cached(Masked):
    """The same with the product as an attribute, as the host has it."""

    def forward(self, x):
        self.weight = self.weight_orig * self.weight_mask
        return F.linear(x, self.weight)


def own_hook(module, args):
    module.weight = module.weight_orig * module.weight_mask


class OwnHook:
    """A hook of the user's that goes by name, as the host's does."""

    def __init__(self, name):
        self.name = name

    def __call__(self, module, args):
        product = getattr(module, self.name + "_orig") * getattr(module, self.name + "_mask")
        setattr(module, self.name, product)


def hooked(hook):
    layer = prune.l1_unstructured(nn.Linear(8, 4, bias=False), "weight", amount=0.5)
    layer._forward_pre_hooks.clear()
    layer.register_forward_pre_hook(hook)
    return layer


OWN = {
    "plain": Masked,
    "property": Property,
    "cached": Cached,
    "hook": lambda: hooked(own_hook),
    "named hook": lambda: hooked(OwnHook("weight")),
}
every_own = pytest.mark.parametrize("make", OWN.values(), ids=OWN)


@every_own
def test_a_layer_that_masks_itself_is_not_pruned(make):
    own, linear = make(), nn.Linear(4, 4)
    own(torch.ones(1, 8))
    model = nn.Sequential(own, linear)
    tpe.every_other(linear, "weight")
    before = Snapshot(own)
    assert [(path, name) for path, _, name in tpe.pruned_parameters(model)] == [("1", "weight")]
    for end in (tpe.remove, tpe.undo):
        with pytest.raises(ValueError, match="not pruned"):
            end(own, "weight")
    with pytest.raises(ValueError, match=r"mask of its own.*'weight_orig'"):
        tpe.vector_ln(own, "weight", 1)
    tpe.remove_all(model)
    assert before.differences() == []


def test_the_dense_values_of_a_layer_that_masks_itself_can_be_pruned():
    own = Masked()
    tpe.vector_ln(own, "weight_orig", 2, dim=1)
    assert [name for _, _, name in tpe.pruned_parameters(own)] == ["weight_orig"]
    assert int((own(torch.ones(1, 8)) != 0).sum()) <= 2
    tpe.remove_all(own)
    assert list(dict(own.named_parameters())) == ["weight_orig"]


def other_hook(module, args):
    """Stand for a hook that has nothing to do with pruning."""


@pytest.mark.parametrize("bad", [10**6, 2.0])
@pytest.mark.parametrize("end", [tpe.remove_all, tpe.undo_all])
def test_a_lost_hook_stays_repairable(bad, end):
    layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
    layer.register_forward_pre_hook(other_hook)
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(layer, "weight", amount=bad)
    end(nn.Sequential(layer))
    assert isinstance(layer.weight, nn.Parameter)


# ------------------------------------------------------------------------------------------------ scripted modules


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        return torch.jit.script(nn.Linear(4, 4))


def test_a_scripted_child_is_passed_over_and_refused_by_name():
    child, linear = scripted(), nn.Linear(4, 4)
    model = nn.Sequential(child, linear, nn.BatchNorm1d(4))
    assert tpe.bn_pairs(model, torch.ones(2, 4)) == [(linear, model[2])]
    assert tpe.prunable_parameters(model) == weights(linear)
    tpe.global_unstructured(weights(linear), amount=0.5)
    assert [path for path, *_ in tpe.pruned_parameters(model)] == ["1"]
    tpe.undo_all(model)
    tpe.every_other(linear, "weight")
    tpe.remove_all(model)
    for call in (
        lambda: tpe.every_other(child, "weight"),
        lambda: tpe.global_unstructured(weights(linear, child), amount=0.5),
        lambda: tpe.mask_zeros(weights(child)),
        lambda: tpe.history(child, "weight"),
    ):
        with pytest.raises(ValueError, match=r"scripted.*remove_all"):
            call()
    with pytest.raises(ValueError, match="not pruned"):
        tpe.remove(child, "weight")
    assert not prune.is_pruned(model)


# --------------------------------------------------------------------------------- tensors that a mask does not fit


def placeholder():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 0, torch.Size([4, 8])
    return parameter


def gathered():
    parameter = nn.Parameter(torch.randn(4, 8))
    parameter.ds_id, parameter.ds_shape = 0, torch.Size([4, 8])
    return parameter


def shard():
    parameter = nn.Parameter(torch.randn(16))
    parameter._fsdp_flattened = True
    return parameter


def in_inference_mode():
    with torch.inference_mode():
        return nn.Parameter(torch.randn(4, 8))


MISFITS = {
    "coo": (lambda: nn.Parameter(torch.eye(4, 8).to_sparse()), r"layout=torch\.sparse_coo.*to_dense"),
    "csr": (lambda: nn.Parameter(torch.eye(4, 8).to_sparse_csr()), r"layout=torch\.sparse_csr.*to_dense"),
    "zero3": (placeholder, r"ZeRO-3.*Prune first"),
    "zero3 gathered": (gathered, r"ZeRO-3.*Prune first"),
    "fsdp": (shard, r"FSDP.*Prune first"),
    "wrapper": (lambda: nn.Parameter(TwoTensor(torch.randn(4, 8), torch.randn(4, 8))), r"TwoTensor.*Prune first"),
    "inference": (in_inference_mode, r"inference_mode.*clone\(\)"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("make", "words"), MISFITS.values(), ids=MISFITS)
def test_a_tensor_that_a_mask_does_not_fit_is_refused(make, words):
    layer, other = nn.Linear(8, 4), nn.Linear(8, 4)
    layer._parameters["weight"] = make()
    parameter, before = layer.weight, Snapshot(other)
    for call in (
        lambda: tpe.vector_ln(layer, "weight", 1),
        lambda: tpe.threshold(layer, "weight", 0.1),
        lambda: tpe.global_unstructured(weights(other, layer), amount=0.5),
        lambda: tpe.mask_zeros(weights(other, layer)),
    ):
        with pytest.raises(ValueError, match=rf"Linear\.weight.*{words}"):
            call()
    assert layer.weight is parameter
    assert list(layer._parameters) == ["weight", "bias"]
    assert before.differences() == []


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no mkldnn")
def test_an_mkldnn_weight_is_refused():
    layer = nn.Linear(8, 4)
    layer._parameters["weight"] = nn.Parameter(torch.randn(4, 8).to_mkldnn(), requires_grad=False)
    with pytest.raises(ValueError, match=r"layout=torch\._mkldnn.*to_dense"):
        tpe.vector_ln(layer, "weight", 1)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_the_remedies_work():
    for kind in ("coo", "inference"):
        module = nn.Linear(8, 4)
        module._parameters["weight"] = MISFITS[kind][0]()
        with pytest.raises(ValueError, match="Linear") as caught:
            tpe.threshold(module, "weight", 0.1)
        remedy = str(caught.value).rpartition(": ")[2].removesuffix(".")
        exec(remedy, {"nn": nn, "module": module})
        tpe.threshold(module, "weight", 0.1)
        module(torch.ones(1, 8)).sum().backward()


# ------------------------------------------------------------------------------------------------- inference mode


def native_inside(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


IN_INFERENCE = {
    "entries": lambda layer: tpe.gradient_magnitude(layer, "weight", 0.5, grad=torch.rand(4, 8)),
    "groups": lambda layer: tpe.nm_structured(layer, "weight", 2, 4),
    "global": lambda layer: tpe.global_unstructured(weights(layer), amount=0.5),
    "global groups": lambda layer: tpe.global_nm_structured(weights(layer), amount=0.5, m=4),
    "zeros": lambda layer: tpe.mask_zeros(weights(layer)),
    "on top of native": lambda layer: (native_inside(layer), tpe.vector_ln(layer, "weight", 1)),
}


@pytest.mark.parametrize("end", [None, tpe.remove, tpe.undo], ids=["pruned", "remove", "undo"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("call", IN_INFERENCE.values(), ids=IN_INFERENCE)
def test_what_is_pruned_in_inference_mode_can_be_trained(call, end, inside):
    layer = nn.Linear(8, 4)
    layer.weight.data[0, 0] = 0
    with torch.inference_mode():
        call(layer)
        if end is not None and inside:
            end(layer, "weight")
        assert torch.is_inference_mode_enabled()
    if end is not None and not inside:
        end(layer, "weight")
    assert not any(tensor.is_inference() for tensor in (layer.weight, *layer.parameters(), *layer.buffers()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    layer(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("end", [tpe.remove, tpe.undo])
def test_native_pruning_in_inference_mode_is_ended_well(end):
    layer = nn.Linear(8, 4)
    with torch.inference_mode():
        native_inside(layer)
        end(layer, "weight")
    assert not layer.weight.is_inference()
    layer(torch.ones(2, 8)).sum().backward()


# --------------------------------------------------------------------------------------------------- lists of pairs


def test_what_pruned_parameters_yields_is_told_how_to_pass_on():
    model = nn.Sequential(tpe.every_other(nn.Linear(4, 4), "weight"))
    for params in (3, tpe.pruned_parameters(model)):
        with pytest.raises(TypeError, match="params") as caught:
            tpe.remove_all(model, params)
        start = str(caught.value).index("[(module, name) for")
        remedy = str(caught.value)[start:].rstrip(".")
        given = eval(remedy, {"pruned_parameters": tpe.pruned_parameters, "model": model})
        assert given == weights(model[0])
    tpe.remove_all(model, given)
