"""Copies of pruned models, and products that are up to date."""

import copy

import pytest
import releases
import torch
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import torchprune_ext as tpe


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def native(module, name):
    prune.l1_unstructured(module, name, amount=0.25)


def ours(module, name):
    tpe.threshold(module, name, 0.1)


def both(module, name):
    native(module, name)
    tpe.every_other(module, name)


every_maker = pytest.mark.parametrize("by", [native, ours, both], ids=lambda by: by.__name__)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.decode = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(self.embed(x))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.layer(x)


def linear():
    return nn.Linear(4, 4), lambda m: [(m, "weight"), (m, "bias")], torch.randn(3, 4)


def nested():
    inner = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    return inner, lambda m: [(m[0], "weight"), (m[1], "weight"), (m[2][1], "weight")], torch.randn(3, 2, 4, 4)


def recurrent():
    return nn.LSTM(4, 4, num_layers=2), lambda m: [(m, "weight_hh_l0"), (m, "weight_ih_l1")], torch.randn(5, 3, 4)


def tied():
    return Tied(), lambda m: [(m.embed, "weight"), (m.decode, "weight")], torch.tensor([[1, 2, 6]])


def parametrized():
    return Normed(), lambda m: [(m.layer.parametrizations.weight, "original1")], torch.randn(3, 4)


every_model = pytest.mark.parametrize("make", [linear, nested, recurrent, tied, parametrized], ids=lambda f: f.__name__)


def outputs(model, x):
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def tensors(model):
    found = [*model.parameters(), *model.buffers()]
    return found + [vars(t.module)[t.name] for t in tpe._host.pruned(model) if t.name in vars(t.module)]


def changes(before):
    return [line for line in before.differences() if "._flat_weight" not in line]  # an LSTM's lists of its tensors


def step(model, x):
    outputs(model, x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@every_maker
@every_model
@pytest.mark.parametrize("when", ["pruned", "run", "stepped"])
def test_a_copy_is_equal_and_shares_nothing(make, by, when):
    model, params, x = make()
    for module, name in params(model):
        by(module, name)
    if when != "pruned":
        (step if when == "stepped" else outputs)(model, x)
    before = Snapshot(model)
    clone = tpe.copy_pruned(model)
    assert changes(before) == []
    assert [n for n, _ in clone.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not {t.data_ptr() for t in tensors(clone)} & {t.data_ptr() for t in tensors(model)}
    for module, name in params(clone):  # at once, before any forward pass
        assert torch.equal(getattr(module, name), getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask"))
        assert getattr(module, name).requires_grad
    old, new = (
        [str(type(hook)) for m in each.modules() for hook in m._forward_pre_hooks.values()] for each in (model, clone)
    )
    assert old == new
    assert torch.equal(outputs(clone.eval(), x), outputs(model.eval(), x))
    untouched = [p.detach().clone() for p in model.parameters()]
    step(clone, x)
    step(clone, x)
    assert all(map(torch.equal, untouched, model.parameters()))


@every_maker
@every_model
def test_code_that_copies_by_itself(make, by):
    model, params, x = make()
    for module, name in params(model):
        by(module, name)
    outputs(model, x)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    before = Snapshot(model)
    with tpe.copyable(model) as same:
        average = AveragedModel(model)
    assert same is model
    assert changes(before) == []
    step(model, x)
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(outputs(average.eval(), x), outputs(average.module, x))
    for path, module, name in tpe.pruned_parameters(average.module):
        assert not bool(getattr(module, name)[getattr(module, f"{name}_mask") == 0].any()), path


def test_tied_tensors_are_tied_in_the_copy():
    model = tied()[0]
    tpe.global_unstructured(tpe.prunable_parameters(model), 0.5)
    clone = tpe.copy_pruned(model)
    assert clone.embed.weight_orig is clone.decode.weight_orig


def test_copyable_puts_back_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    native(model[0], "weight")
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), tpe.copyable(model):
        raise KeyboardInterrupt
    assert before.differences() == []


def test_what_is_done_inside_the_scope_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    native(model[0], "weight")
    native(model[1], "weight")
    with tpe.copyable(model):
        tpe.remove(model[0], "weight")
        model[1](torch.ones(4))
        newer = model[1].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[1].weight is newer


def test_a_copy_of_what_a_failed_native_call_left():
    layer = nn.Linear(4, 4)
    native(layer, "weight")
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(layer, "weight", amount=99)
    clone = tpe.copy_pruned(layer)
    assert torch.equal(clone.weight, layer.weight)
    assert isinstance(tpe.undo(clone, "weight").weight, nn.Parameter)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_leave_no_trace(mode):
    layer = nn.Linear(4, 4)
    native(layer, "weight")
    with mode():
        clone = tpe.copy_pruned(tpe.refresh(layer))
    for each in (layer, clone):
        assert not each.weight.is_inference()
        each.weight.sum().backward()
        assert torch.equal(each.weight_orig.grad, each.weight_mask)


@every_maker
@every_model
def test_refresh_shows_every_change_at_once(make, by):
    model, params, x = make()
    for module, name in params(model):
        by(module, name)
    order = [n for n, _ in model.named_parameters()]

    def check(dtype):
        for module, name in params(tpe.refresh(model)):
            want = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
            assert torch.equal(getattr(module, name), want)
            assert getattr(module, name).dtype == dtype

    step(model, x)
    check(torch.float32)
    for module, name in params(model):
        getattr(module, f"{name}_orig").data.mul_(2)
    check(torch.float32)
    model.load_state_dict({k: v * 0.5 if k.endswith("_orig") else v for k, v in model.state_dict().items()})
    check(torch.float32)
    model.to(torch.bfloat16)
    check(torch.bfloat16)
    if isinstance(model, nn.LSTM) and not releases.OLD:  # torch 2.4 has no such LSTM on some processors
        model(x.bfloat16())
    assert [n for n, _ in model.named_parameters()] == order


@pytest.mark.parametrize("call", [tpe.refresh, tpe.copy_pruned, lambda m: tpe.copyable(m).__enter__()])
def test_only_modules(call):
    with pytest.raises(TypeError, match=r"model=3 is a int. Pass a torch.nn.Module"):
        call(3)
