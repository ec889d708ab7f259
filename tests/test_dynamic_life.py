"""The life of a model in dynamic sparse training: history, copies, checkpoints, interruptions, refusals."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import toys
from growing import Tied, alike, batches, masks, network, train
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.workflow import dynamic

pytestmark = toys.unwarned


# ------------------------------------------------------------------------------------------------ life with a mask


def trained(steps=5, every=1):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.75, every=every, optimizer=optimizer)
    train(model, dst, optimizer, batches(steps))
    return model, dst, optimizer


def test_the_host_and_the_history_know_it():
    model, _, _ = trained()
    assert all(prune.is_pruned(model[i]) for i in (0, 2, 4))
    told = "DynamicSparse(sparsity=0.75, growth='gradient', every=1, end=None, alpha=0.3, seed=0)"
    assert [tpe.history(model[i], "weight") for i in (0, 2, 4)] == [[told]] * 3
    effective = [(model[i].weight_orig * model[i].weight_mask).detach() for i in (0, 2, 4)]
    dense = [model[i].weight_orig.detach().clone() for i in (0, 2, 4)]
    clone = tpe.copy_pruned(model)
    prune.remove(model[0], "weight")
    tpe.remove(model[2], "weight")
    tpe.undo(model[4], "weight")
    assert torch.equal(model[0].weight, effective[0])
    assert torch.equal(model[2].weight, effective[1])
    assert torch.equal(model[4].weight, dense[2])
    tpe.undo_all(clone)
    assert all(torch.equal(clone[i].weight, d) for i, d in zip((0, 2, 4), dense, strict=True))


def test_it_stacks_on_others_and_others_on_it():
    model = network()
    tpe.nm_structured(model[0], "weight", 2, 4)
    dst = tpe.DynamicSparse(model, [(model[0], "weight")], 0.75, every=1)
    train(model, dst, torch.optim.SGD(model.parameters(), 0.01), batches(3))
    prune.l1_unstructured(model[0], "weight", 4)
    assert [call.partition("(")[0] for call in tpe.history(model[0], "weight")] == [
        "NMStructured",
        "DynamicSparse",
        "L1Unstructured",
    ]
    model(batches(1)[0]).sum().backward()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"params\[0\].*has 44 entries.*has left 48: another call.*Make a new"):
        dst.step()
    assert snapshot.differences() == []
    tpe.DynamicSparse(model, [(model[0], "weight")], 1 - 44 / 192, every=1)


def test_copies_and_pickles_of_a_model_that_is_listened_to():
    model, dst, optimizer = trained()
    [x] = batches(1, seed=5)
    hook = next(iter(model[0]._forward_pre_hooks.values()))
    assert "apply_mask" in vars(hook)
    with tpe.copyable(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(tpe.copy_pruned(copies[1]))
    copies.append(pickle.loads(pickle.dumps(copies[0])))
    for clone in copies:
        assert tpe.history(clone[0], "weight") == tpe.history(model[0], "weight")
        with torch.no_grad():
            clone[0].weight_orig.add_(1.0)
            assert not torch.equal(clone(x), model(x))
        clone(x).square().sum().backward()  # is not ours to count
        with torch.no_grad():
            assert torch.equal(clone[0].weight, clone[0].weight_orig * clone[0].weight_mask)
    with pytest.raises(RuntimeError, match="no gradient"):
        dst.step()
    train(model, dst, optimizer, [x])


def test_it_is_served_while_listened_to():
    model, dst, optimizer = trained()
    [x] = batches(1, seed=5)
    with tpe.frozen(model), torch.no_grad():
        served = model(x)
    assert torch.equal(served, tpe.remove_all(tpe.copy_pruned(model))(x))
    with tpe.frozen(model):
        assert train(model, dst, optimizer, [x, x]) == [True, True]


def test_empty_and_single_entries():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    model[0].weight = nn.Parameter(torch.empty(0, 3))
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.0, every=1, alpha=1.0)
    value = model[1].weight.item()
    for _ in range(2):
        (model[1](torch.ones(2, 1)).sum() + model[0](torch.ones(2, 3)).sum()).backward()
        assert dst.step()
    assert (model[1].weight_mask.item(), model[1].weight_orig.item()) == (1, value)


def test_state_dicts_go_into_other_models():
    model, _, _ = trained()
    fresh = tpe.load_pruned_state_dict(network(1), model.state_dict())
    assert alike(fresh.state_dict(), model.state_dict())
    other, _, _ = trained(2)
    tpe.load_pruned_state_dict(other, model.state_dict())
    assert alike(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize(
    "loader", [lambda m, s: m.load_state_dict(s), tpe.load_pruned_state_dict], ids=["torch", "tpe"]
)
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 14])
def test_resumed_it_is_bit_for_bit_the_uninterrupted_run(growth, loader, stop):
    def begin(seed):
        model = network(seed)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        params = tpe.prunable_parameters(model)
        return model, optimizer, tpe.DynamicSparse(model, params, 0.7, growth, every=3, end=14, optimizer=optimizer)

    data = batches(20)
    model, optimizer, dst = begin(0)
    train(model, dst, optimizer, data[:stop])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, dst)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, dst, optimizer, data[stop:])
    resumed, its_optimizer, its_dst = begin(0)
    train(resumed, its_dst, its_optimizer, batches(4, seed=9))  # whatever it did before
    loader(resumed, saved[0])
    its_optimizer.load_state_dict(saved[1])
    its_dst.load_state_dict(saved[2])
    train(resumed, its_dst, its_optimizer, data[stop:])
    assert alike(resumed.state_dict(), model.state_dict())
    ours, its = (o.state_dict()["state"] for o in (optimizer, its_optimizer))
    assert all(torch.equal(ours[i][k], its[i][k]) for i, k in itertools.product(ours, ours[0]))
    assert str(its_dst.state_dict()) == str(dst.state_dict())


def test_states_of_something_else_are_refused():
    _, dst, _ = trained()
    model = network()
    other = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.5, every=2)
    before = str(other.state_dict())
    with pytest.raises(ValueError, match=r"keep \[48, 32, 4\] entries, but these keep \[96, 64, 8\]"):
        other.load_state_dict(dst.state_dict())
    with pytest.raises(ValueError, match=r"state has the keys \['a'\], not \['generator'"):
        other.load_state_dict({"a": 1})
    with pytest.raises(TypeError, match="state is a list"):
        other.load_state_dict([1])
    assert str(other.state_dict()) == before


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_update_has_left_no_trace_and_can_be_repeated(growth, after, monkeypatch):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.7, growth, every=2, optimizer=optimizer)
    train(model, dst, optimizer, batches(1))
    model(batches(1)[0]).square().sum().backward()
    optimizer.step()
    twin, its_optimizer = network(), None
    calls = []

    def renew(target):
        calls.append(target)
        if len(calls) > after:
            raise KeyboardInterrupt

    snapshot, states, state = Snapshot(model), copy.deepcopy(optimizer.state_dict()), str(dst.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(dynamic, "renew", renew)
        with pytest.raises(KeyboardInterrupt):
            dst.step()
    assert snapshot.differences() == []
    assert str(optimizer.state_dict()) == str(states)
    assert str(dst.state_dict()) == state
    assert dst.step()
    its_optimizer = torch.optim.Adam(twin.parameters(), 0.01)
    its = tpe.DynamicSparse(twin, tpe.prunable_parameters(twin), 0.7, growth, every=2, optimizer=its_optimizer)
    train(twin, its, its_optimizer, [*batches(1), *batches(1)])
    assert alike(twin.state_dict(), model.state_dict())


def test_a_tensor_that_is_no_longer_pruned():
    model, dst, _ = trained()
    tpe.remove(model[2], "weight")
    model(batches(1)[0]).sum().backward()
    with pytest.raises(
        ValueError, match=r"params\[1\], Linear.weight of shape \(8, 16\): is no longer pruned.*new Dyn"
    ):
        dst.step()


def test_a_hook_that_was_replaced_puts_the_update_off():
    model, dst, optimizer = trained()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    mask = values["0.weight_mask"].flatten()
    values["0.weight_mask"] = mask[torch.randperm(len(mask))].view(16, 12)
    tpe.load_pruned_state_dict(model, values)  # makes a new hook, while the old one is listened to
    assert train(model, dst, optimizer, batches(3)) == [False, True, True]


def test_two_for_the_same_tensors():
    model, dst, optimizer = trained()
    newer = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.75, every=1, optimizer=optimizer)
    assert train(model, newer, optimizer, batches(2)) == [True, True]  # the older one is of no effect
    model(batches(1)[0]).sum().backward()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"Linear.weight of shape \(16, 12\) is trained by two DynamicSparse.*newer"):
        dst.step()
    assert snapshot.differences() == []
    assert newer.step()


def test_weights_that_are_not_finite():
    model, dst, _ = trained()
    model(batches(1)[0]).sum().backward()
    model[2].weight_orig.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"params\[1\].*weight has 1 NaN"):
        dst.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler asks for it
def test_compiled():
    drawn = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()[:2]
        dst = tpe.DynamicSparse(model, [(model[0], "weight")], 0.7, every=2)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        assert train(run, dst, optimizer, batches(5)) == [False, True, False, True, False]
        drawn.append(masks(model))
    assert alike(*drawn)


# ------------------------------------------------------------------------------------------------------- refusals


def tie(module, other):
    module.weight = other.weight


BAD = {
    "model": (lambda a: {**a, "model": [1]}, TypeError, r"model=\[1\] is a list"),
    "params": (lambda a: {**a, "params": a["model"]}, TypeError, "params is a Sequential"),
    "empty": (lambda a: {**a, "params": []}, ValueError, "params"),
    "pair": (lambda a: {**a, "params": [(a["model"][0], "gain")]}, ValueError, r"params\[0\].*gain"),
    "sparsity": (lambda a: {**a, "sparsity": 1.0}, ValueError, r"sparsity=1.0 is not in \[0, 1\)"),
    "sparsity type": (lambda a: {**a, "sparsity": "0.5"}, TypeError, "sparsity='0.5' is a str"),
    "nothing left": (lambda a: {**a, "sparsity": 0.9999}, ValueError, "sparsity=0.9999 takes 336 of 336"),
    "nothing left of one": (
        lambda a: {**a, "sparsity": {a["params"][2]: 0.99}},
        ValueError,
        r"params\[2\].*sparsity=0.99 leaves none of its 16 entries",
    ),
    "not listed": (lambda a: {**a, "sparsity": {(a["model"][0], "bias"): 0.5}}, ValueError, "does not list"),
    "growth": (lambda a: {**a, "growth": "up"}, ValueError, "growth='up' is unknown. Pass 'gradient'"),
    "every": (lambda a: {**a, "every": 0}, ValueError, "every=0 is too small"),
    "end": (lambda a: {**a, "every": 10, "end": 10}, ValueError, "end=10 comes before the first update"),
    "end type": (lambda a: {**a, "end": 0.75}, TypeError, "end=0.75 is a float"),
    "alpha": (lambda a: {**a, "alpha": 1.5}, ValueError, "alpha=1.5 is not a fraction"),
    "seed": (lambda a: {**a, "seed": -1}, ValueError, "seed=-1 is too small"),
    "optimizer": (lambda a: {**a, "optimizer": 1}, TypeError, "optimizer is a int. Pass the torch.optim.Optimizer"),
    "another's": (
        lambda a: {**a, "optimizer": torch.optim.SGD(network().parameters(), 0.1)},
        ValueError,
        "optimizer holds none of the 3 tensors",
    ),
    "not in the model": (
        lambda a: {**a, "params": [*a["params"], (nn.Linear(2, 2), "weight")]},
        ValueError,
        r"params\[3\].*is not a part of the model Sequential",
    ),
    "frozen": (
        lambda a: [a["model"][2].weight.requires_grad_(False), a][1],
        ValueError,
        r"params\[1\].*is frozen \(requires_grad=False\)",
    ),
    "more pruned": (
        lambda a: [prune.random_unstructured(a["model"][4], "weight", 0.9), a][1],
        ValueError,
        r"params\[2\].*sparsity=0.5 is 8 of its 16 entries, but 14 are pruned",
    ),
    "tied": (
        lambda a: [a["model"].add_module("head", nn.Linear(8, 2)), tie(a["model"].head, a["model"][4]), a][2],
        ValueError,
        r"params\[2\].*and head.weight are the same parameter \(tied\), but only the first is listed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_and_leave_no_trace(case):
    change, kind, message = BAD[case]
    model = network()
    arguments = {"model": model, "params": tpe.prunable_parameters(model), "sparsity": 0.5}
    arguments = change(arguments)
    snapshot = Snapshot(model)
    with pytest.raises(kind, match=message):
        tpe.DynamicSparse(**arguments)
    assert snapshot.differences() == []


def test_tied_at_both_places_with_two_amounts():
    model = Tied()
    params = [(model.a, "weight"), (model.b, "weight")]
    with pytest.raises(ValueError, match=r"params\[0\].*is tied, and its names have different amounts"):
        tpe.DynamicSparse(model, params, dict(zip(params, (0.5, 0.6), strict=True)))
    assert not prune.is_pruned(model)
