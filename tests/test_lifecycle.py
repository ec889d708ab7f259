"""Find, remove and undo: what happens to a pruned tensor afterwards."""

import contextlib
import itertools

import pytest
import torch
from cases import CASES
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

every_method = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
both = pytest.mark.parametrize("end", [tpe.remove, tpe.undo], ids=["remove", "undo"])
both_all = pytest.mark.parametrize("end", [tpe.remove_all, tpe.undo_all], ids=["remove_all", "undo_all"])


def by_us(module):
    tpe.nm_structured(module, "weight", 1, 2)


def by_native(module):
    prune.l1_unstructured(module, "weight", amount=0.4)


def by_both(module):
    prune.l1_unstructured(module, "weight", amount=0.2)
    tpe.nm_structured(module, "weight", 2, 4)
    prune.random_unstructured(module, "weight", amount=3)


def failed_on_native(module):
    """Leave what a native second call that fails leaves: a mask and no hook."""
    by_native(module)
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(module, "weight", amount=10**6)
    assert not prune.is_pruned(module)


def failed_on_us(module):
    """Do the same on top of one of our methods."""
    by_us(module)
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(module, "weight", amount=10**6)


def failed_in_a_container(module):
    """Do the same where there was a container."""
    by_both(module)
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(module, "weight", amount=10**6)


FAILED = (failed_on_native, failed_on_us, failed_in_a_container)
PASTS = (by_us, by_native, by_both, *FAILED)
every_past = pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)


def user_hook(module, args):
    """Stand for a hook of the user's."""


def train(module):
    """Change the original weights behind the attribute's back."""
    with torch.no_grad():
        module._parameters["weight_orig"].mul_(-2).add_(1)


def network():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)))
    tpe.kernel_ln(model[0], "weight", 0.3)
    prune.l1_unstructured(model[0], "bias", amount=2)
    tpe.every_other(model[2][0], "bias")
    prune.random_unstructured(model[2][1], "weight", amount=1)
    tpe.threshold(model[2][1], "weight", 0.5)
    return model


PRUNED = [("0", "weight"), ("0", "bias"), ("2.0", "bias"), ("2.1", "weight")]


# ------------------------------------------------------------------------------------------------- one tensor


@every_past
@both
def test_the_dense_module_is_back(past, end):
    module = nn.Linear(8, 6)
    module.register_forward_pre_hook(user_hook)
    weight, bias = module.weight, module.bias
    past(module)
    order = [name.removesuffix("_orig") for name in module._parameters]  # native puts the weight behind the bias
    train(module)
    weight.grad = torch.ones_like(weight)
    gradient, orig, mask = weight.grad, weight.detach().clone(), module.weight_mask.clone()
    assert end(module, "weight") is module
    assert module.weight is weight
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.is_leaf
    assert module.weight.grad is gradient
    assert list(module._parameters) == order
    assert order == ["weight", "bias"] or past not in (by_us, failed_on_us)
    assert module.bias is bias
    assert list(module._buffers) == []
    assert list(module._forward_pre_hooks.values()) == [user_hook]
    assert "weight" not in vars(module)
    assert not hasattr(module, "weight_orig")
    assert torch.equal(module.weight, orig * mask if end is tpe.remove else orig)
    module(torch.ones(2, 8)).sum().backward()
    by_us(module)  # and can be pruned anew
    assert [name.removesuffix("_orig") for name in module._parameters] == order


@every_method
@both
def test_every_method_can_be_ended(case, end):
    host = case.hosts[0]
    module = nn.Conv2d(8, 6, 3) if host != "linear" else nn.Linear(8, 6)
    weight, before = module.weight, module.weight.detach().clone()
    case.function(module, "weight", **case.arguments(module))
    mask = module.weight_mask.clone()
    half = case.function is tpe.bn_scaling and end is tpe.undo  # of a layer and its BatchNorm
    with pytest.warns(UserWarning, match="pruned as one") if half else contextlib.nullcontext():
        end(module, "weight")
    assert module.weight is weight
    assert torch.equal(weight, before * mask if end is tpe.remove else before)
    assert next(iter(module._parameters)) == "weight"


@both
@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_what_it_was_last(end, requires_grad):
    module = nn.Linear(8, 6)
    by_us(module)
    module.weight_orig.requires_grad_(requires_grad)
    end(module, "weight")
    assert module.weight.requires_grad == requires_grad


@both
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_order_of_parameters_is_restored(end, name):
    module = nn.Linear(8, 6)
    tpe.every_other(module, "weight")
    prune.l1_unstructured(module, "bias", amount=2)
    end(module, name)
    names = {"weight": ["weight", "bias_orig"], "bias": ["weight_orig", "bias"]}
    assert sorted(module._parameters) == sorted(names[name])
    module = nn.Linear(8, 6)
    tpe.every_other(module, "weight")
    tpe.every_other(module, "bias")
    end(module, name)
    assert list(module._parameters) == names[name]
    assert prune.is_pruned(module)


@both
@pytest.mark.parametrize("name", ["weight", "bias", "nothing"])
def test_what_is_not_pruned_is_refused(end, name):
    module = nn.Linear(8, 6)
    before = Snapshot(module)
    with pytest.raises(ValueError, match=rf"{name}.*Linear.*not pruned|Linear\.{name}.*not pruned"):
        end(module, name)
    assert before.differences() == []
    by_us(module)
    before = Snapshot(module)
    with pytest.raises(ValueError, match=r"not|nothing"):
        end(module, "bias")
    assert before.differences() == []


@both
def test_what_is_no_module_is_refused(end):
    with pytest.raises(TypeError, match="module"):
        end("layer", "weight")


@both
def test_a_parameter_that_is_only_called_orig_is_not_pruned(end):
    module = nn.Module()
    module.weight_orig = nn.Parameter(torch.ones(2))
    before = Snapshot(module)
    with pytest.raises(ValueError, match="weight"):
        end(module, "weight")
    assert before.differences() == []


@every_past
def test_optimizers_go_on_after_the_end(past):
    module = nn.Linear(8, 6)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    past(module)
    for end in (tpe.remove, tpe.undo):
        end(module, "weight")
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        module(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(module.weight, before)
        past(module)


@both
@pytest.mark.parametrize("past", FAILED, ids=lambda past: past.__name__)
def test_a_module_that_native_has_corrupted_is_found_and_rescued(past, end):
    model = nn.Sequential(nn.Linear(8, 6))
    past(model[0])
    assert [(path, name) for path, _, name in tpe.pruned_parameters(model)] == [("0", "weight")]
    {tpe.remove: tpe.remove_all, tpe.undo: tpe.undo_all}[end](model)
    assert sorted(dict(model.named_parameters())) == ["0.bias", "0.weight"]
    assert list(model.buffers()) == []


@pytest.mark.parametrize("past", FAILED, ids=lambda past: past.__name__)
@every_method
def test_a_module_that_native_has_corrupted_is_pruned_on_or_left_alone(past, case):
    module = nn.Linear(8, 6) if case.hosts[0] == "linear" else nn.Conv2d(8, 6, 3)
    past(module)
    args = case.arguments(module)
    earlier, before = module.weight_mask.clone(), Snapshot(module)
    refused = []
    try:
        case.function(module, "weight", **args)
    except ValueError as error:
        refused.append(str(error))
    if refused:
        assert "remove" in refused[0] or "undo" in refused[0]
        assert before.differences() == []
    else:
        assert torch.all(module.weight_mask <= earlier)
        assert prune.is_pruned(module)


# -------------------------------------------------------------------------------------------------- a whole model


def test_pruned_parameters_are_found_in_the_order_of_the_model():
    model = network()
    found = list(tpe.pruned_parameters(model))
    assert sorted((path, name) for path, _, name in found) == sorted(PRUNED)
    assert [path for path, _, _ in found] == ["0", "0", "2.0", "2.1"]
    assert all(model.get_submodule(path) is module for path, module, _ in found)
    assert list(tpe.pruned_parameters(nn.Linear(2, 2))) == []
    assert [row[::2] for row in tpe.pruned_parameters(model[2])] == [("0", "bias"), ("1", "weight")]
    assert [row[::2] for row in tpe.pruned_parameters(model[2][0])] == [("", "bias")]


def test_pruned_parameters_may_be_ended_while_they_are_listed():
    model = network()
    for _, module, name in tpe.pruned_parameters(model):
        tpe.remove(module, name)
    assert list(tpe.pruned_parameters(model)) == []


@both_all
@pytest.mark.parametrize("kind", ["all", "list", "generator", "iterator", "tuple"])
def test_all_are_ended(end, kind):
    model = network()
    origs = dict(model.named_parameters())
    dense = {path: p.detach().clone() for path, p in origs.items()}
    masks = dict(model.named_buffers())
    pairs = [(module, name) for _, module, name in tpe.pruned_parameters(model)]
    params = {
        "all": None,
        "list": pairs,
        "generator": (pair for pair in pairs),
        "iterator": iter(pairs),
        "tuple": tuple(pairs),
    }[kind]
    assert end(model, params) is model
    assert not any(path.endswith(("_orig", "_mask")) for path in model.state_dict())
    assert not prune.is_pruned(model)
    for path, name in PRUNED:
        module = model.get_submodule(path)
        now, key = getattr(module, name), f"{path}.{name}_orig"
        assert now is origs[key]
        assert torch.equal(now, dense[key] * masks[f"{path}.{name}_mask"] if end is tpe.remove_all else dense[key])
    assert sorted(model[0]._parameters) == ["bias", "weight"]


@both_all
def test_some_are_ended(end):
    model = network()
    end(model, [(model[2][0], "bias")])
    assert [(path, name) for path, _, name in tpe.pruned_parameters(model)] == [
        pair for pair in [(p, n) for p, _, n in tpe.pruned_parameters(model)] if pair != ("2.0", "bias")
    ]
    assert len(list(tpe.pruned_parameters(model))) == 3


@both_all
def test_nothing_pruned_is_an_error_that_says_so(end):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="prune"):
        end(model)
    with pytest.raises(ValueError, match=r"prune|weight"):
        end(model, [(model[0], "weight")])
    with pytest.raises(TypeError, match="model"):
        end("model")


@both_all
def test_a_pair_that_is_not_pruned_stops_everything(end):
    model = network()
    stranger = tpe.every_other(nn.Linear(2, 2), "weight")
    for bad in [(model[2][0], "weight"), (model[2][0], "nothing"), (stranger, "weight"), (model[1], "weight")]:
        before = Snapshot(model, stranger)
        with pytest.raises(ValueError, match=bad[1]):
            end(model, [(model[0], "weight"), bad])
        assert before.differences() == []


@both_all
@pytest.mark.parametrize("bad", [3, [3], ["weight"], [("0", "weight")]], ids=repr)
def test_what_are_no_pairs_is_refused(end, bad):
    model = network()
    before = Snapshot(model)
    with pytest.raises((TypeError, ValueError)):
        end(model, bad)
    assert before.differences() == []


@both_all
def test_an_iterable_that_breaks_changes_nothing(end):
    model = network()

    def broken():
        yield model[0], "weight"
        raise RuntimeError("planted")

    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="planted"):
        end(model, broken())
    assert before.differences() == []


class PlantedError(Exception):
    """An error that nobody expects."""


@both_all
@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
def test_an_error_planted_at_any_step_changes_nothing(end, error):
    reached = 0
    plants = [
        (nn.Module, "__setattr__"),
        (nn.Module, "__delattr__"),
        (nn.Module, "register_parameter"),
        (prune.BasePruningMethod, "remove"),
        (prune.BasePruningMethod, "apply_mask"),
        (torch.Tensor, "mul_"),
        (torch.Tensor, "mul"),
        (torch.Tensor, "__mul__"),
        (torch.Tensor, "copy_"),
        (torch.Tensor, "masked_fill_"),
    ]
    for owner, name in plants:
        for number in range(1, 30):
            model = network()
            before = Snapshot(model)
            calls, original = itertools.count(1), getattr(owner, name)

            def planted(*args, calls=calls, number=number, original=original, **kwargs):
                if next(calls) == number:
                    raise error("planted")
                return original(*args, **kwargs)

            with pytest.MonkeyPatch.context() as monkeypatch, contextlib.suppress(error):
                monkeypatch.setattr(owner, name, planted)
                end(model)
                break
            assert before.differences() == [], f"call {number} of {owner.__name__}.{name}"
            reached += 1
    assert reached, "no plant was reached: name what removing uses now"


# --------------------------------------------------------------------------------------------- special models


@both
@pytest.mark.parametrize("past", [by_us, by_native], ids=lambda past: past.__name__)
def test_an_lstm_sees_the_masks_and_the_end_of_them(past, end):
    lstm, x = nn.LSTM(4, 4, num_layers=2), torch.linspace(-1, 1, 24).reshape(3, 2, 4)
    weight, dense = lstm.weight_hh_l0, lstm(x)[0].detach()
    order = list(lstm._parameters)
    if past is by_us:
        tpe.nm_structured(lstm, "weight_hh_l0", 1, 2)
    else:
        prune.l1_unstructured(lstm, "weight_hh_l0", amount=0.5)
    twin = nn.LSTM(4, 4, num_layers=2)
    twin.load_state_dict({key: getattr(lstm, key) for key in order})
    assert torch.equal(lstm(x)[0], twin(x)[0])
    assert not torch.equal(lstm(x)[0], dense)
    lstm(x)[0].sum().backward()
    assert torch.any(lstm.weight_hh_l0_orig.grad != 0)
    assert torch.all(lstm.weight_hh_l0_orig.grad[lstm.weight_hh_l0_mask == 0] == 0)
    end(lstm, "weight_hh_l0")
    assert lstm.weight_hh_l0 is weight
    assert any(w is weight for w in lstm._flat_weights)
    assert torch.equal(lstm(x)[0], dense if end is tpe.undo else twin(x)[0])
    if past is by_us:
        assert list(lstm._parameters) == order


def test_a_rejected_call_leaves_an_lstm_alone():
    lstm = nn.LSTM(4, 4)
    before = Snapshot(lstm)
    with pytest.raises(ValueError, match=r"LSTM\.weight_hh_l0 of shape \(16, 4\)"):
        tpe.nm_structured(lstm, "weight_hh_l0", 2, 3)
    assert before.differences() == []
    tpe.nm_structured(lstm, "weight_hh_l0", 2, 4)
    before = Snapshot(lstm)
    with pytest.raises(ValueError, match="amount"):
        tpe.vector_ln(lstm, "weight_hh_l0", amount=100)
    assert before.differences() == []


@both_all
def test_a_module_that_is_used_twice_counts_once(end):
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer, "other": nn.Linear(4, 4)})
    tpe.every_other(layer, "weight")
    assert [(path, name) for path, _, name in tpe.pruned_parameters(model)] == [("first", "weight")]
    end(model, [(model["second"], "weight")])
    assert not prune.is_pruned(model)


def test_half_and_channels_last_come_back_as_they_were():
    conv = nn.Conv2d(4, 6, 3).half().to(memory_format=torch.channels_last)
    before = conv.weight.detach().clone()
    for end in (tpe.undo, tpe.remove):
        tpe.kernel_ln(conv, "weight", 0.5)
        mask = conv.weight_mask
        assert mask.is_contiguous(memory_format=torch.channels_last)
        end(conv, "weight")
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert conv.weight.dtype == torch.float16
    assert torch.equal(conv.weight, before * mask)
