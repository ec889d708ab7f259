"""Parents that read a child's weight without calling it."""

import copy
import io

import pytest
import releases
import torch
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.uniform_(self.mha.out_proj.bias, -1, 1)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]

    def params(self):
        return [(self.mha.out_proj, "weight"), (self.mha.out_proj, "bias"), (self.mha, "in_proj_weight")]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)

    def params(self):
        layers = self.encoder.layers
        return [
            *((layer.self_attn.out_proj, "weight") for layer in layers),
            *((layer.self_attn, "in_proj_weight") for layer in layers),
            *((layer.linear1, "weight") for layer in layers),
        ]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(8, 8), torch.randn(8)])

    def forward(self, x):
        return x @ self.listed[0] + self.listed[-1] + sum(p.sum() for p in self.listed)

    def params(self):
        return [(self.listed, "0"), (self.listed, "1")]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.named = nn.ParameterDict({"w": torch.randn(8, 8), "b": torch.randn(8)})

    def forward(self, x):
        return x @ self.named["w"] + self.named.b + sum(p.sum() for p in self.named.values())

    def params(self):
        return [(self.named, "w")]


MODELS = pytest.mark.parametrize("make", [Attention, Encoder, Listed, Named], ids=lambda make: make.__name__)


def ours(model):
    for module, name in model.params():
        tpe.threshold(module, name, 0.2)


def native(model):
    for module, name in model.params():
        prune.l1_unstructured(module, name, amount=0.4)
    tpe.refresh(model)  # what a natively pruned model needs, once


def stacked(model):
    for module, name in model.params():
        tpe.threshold(module, name, 0.2)
        prune.l1_unstructured(module, name, amount=0.4)


BY = pytest.mark.parametrize("by", [ours, native, stacked], ids=lambda by: by.__name__)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def reference(model):
    """Return a dense model with the effective weights, by plain means."""
    torch.manual_seed(0)
    dense = type(model)()
    values = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_orig"):
            tensor = tensor * model.state_dict()[f"{name.removesuffix('_orig')}_mask"]
        if not name.endswith("_mask"):
            values[name.removesuffix("_orig")] = tensor
    dense.load_state_dict(values)
    return dense.train(model.training)


def check(model):
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(model)(X))  # perhaps by the fast path of attention
    torch.testing.assert_close(model(X), reference(model)(X))


@BY
@MODELS
def test_from_pruning_to_remove(make, by):
    if make is Encoder and releases.OLD:
        pytest.skip(releases.fast_path.kwargs["reason"])
    torch.manual_seed(0)
    model = make()
    order = [name for name, _ in model.named_parameters()]
    types = [type(module) for module in model.modules()]
    by(model)
    check(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        twin = reference(model)
        twin(X).square().mean().backward()
        optimizer.zero_grad()
        model(X).square().mean().backward()
        for name, parameter in model.named_parameters():
            grad = twin.get_parameter(name.removesuffix("_orig")).grad
            if name.endswith("_orig"):
                grad = grad * model.get_buffer(f"{name.removesuffix('_orig')}_mask")
            torch.testing.assert_close(parameter.grad, grad)
        optimizer.step()
        check(model)
    check(model.eval())
    saved = {k: v * 0.5 if k.endswith("_orig") else v for k, v in model.state_dict().items()}
    model.load_state_dict(saved)
    check(model)
    for module, name in model.params():
        getattr(module, f"{name}_orig").data.add_(0.1)
    check(model)
    clone = tpe.copy_pruned(model)
    check(clone)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    check(torch.load(file, weights_only=False))
    fresh = make().eval()
    check(tpe.load_pruned_state_dict(fresh, model.state_dict()))
    dense = tpe.dense_state_dict(model)
    want = model(X)
    tpe.remove_all(model)
    assert torch.equal(model(X), want)
    assert all(map(torch.equal, model.state_dict().values(), dense.values()))
    if by is ours:
        assert [name for name, _ in model.named_parameters()] == order
    assert [type(module) for module in model.modules()] == types


@BY
@MODELS
@pytest.mark.parametrize("end", [prune.remove, tpe.remove, tpe.undo], ids=["native", "remove", "undo"])
def test_one_by_one(make, by, end):
    model = make()
    by(model)
    for module, name in model.params():
        end(module, name)
        assert isinstance(getattr(module, name), nn.Parameter)
        check(model)
    by(model)
    check(model)


@MODELS
def test_copies_and_errors(make):
    model = make()
    before, types = Snapshot(model), [type(module) for module in model.modules()]
    [*_, (module, name)] = model.params()
    with pytest.raises(ValueError, match="amount"):
        tpe.gradient_magnitude(module, name, 10**6, grad=torch.ones_like(getattr(module, name)))
    assert before.differences() == []
    assert [type(module) for module in model.modules()] == types
    ours(model)
    with tpe.copyable(model):
        check(copy.deepcopy(model))
    check(model)


@releases.compiled_property
@pytest.mark.parametrize("make", [Attention, Listed], ids=lambda make: make.__name__)
def test_compiled(make):
    model = make()
    ours(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), reference(model)(X))
        compiled(X).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(X), reference(model)(X))
    tpe.undo_all(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), reference(model)(X))


def test_what_is_read_in_a_way_that_nobody_sees_is_refused():
    class Mine(nn.ParameterList):
        pass

    mine = Mine([torch.randn(3)])
    before = Snapshot(mine)
    with pytest.raises(ValueError, match=r"Mine is never called itself.*Use a plain nn.ParameterList"):
        tpe.every_other(mine, "0")
    assert before.differences() == []


def test_a_parent_of_your_own_can_refresh_before_it_runs():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return nn.functional.linear(x, self.child.weight)

    def renew(module, inputs):
        tpe.refresh(module)

    model = Parent()
    prune.l1_unstructured(model.child, "weight", amount=0.5)
    model.register_forward_pre_hook(renew)
    for _ in range(3):
        model(X).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(model(X), X @ (model.child.weight_orig * model.child.weight_mask).T)
    with torch.no_grad():
        assert torch.equal(model.eval()(X), X @ (model.child.weight_orig * model.child.weight_mask).T)
