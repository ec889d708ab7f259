"""What global calls leave in the modules: one hook, no tensor, and native pruning goes on from there."""

import gc
import types

import pytest
import torch
from globally import NM_ROW, ROWS, dense_mask, every_function, owner, ready
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def reachable(root):
    """Return the bytes of every storage that can be reached from ``root``, through hooks and closures too."""
    todo, seen, storages = [root], [], {}
    known = set()
    while todo:
        thing = todo.pop()
        if id(thing) in known or isinstance(thing, type | types.ModuleType | types.CodeType | str | int | float):
            continue
        known.add(id(thing))
        seen.append(thing)  # keeps it alive, so that no id is used twice
        if torch.is_tensor(thing):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            todo += [thing.grad] if thing.is_leaf else []
        if isinstance(thing, types.FunctionType):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
            todo += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        else:
            todo += gc.get_referents(thing)
    return storages


HISTORY = {row.id: row.history for row in (*ROWS, NM_ROW)}


@every_function
@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
def test_the_history_is_readable_and_holds_no_tensor(function, state):
    model, args = ready(function, state)
    for number in (1, 2):
        function(**args)
        for layer in model[:4]:
            [hook] = [hook for hook in layer._forward_pre_hooks.values() if hook._tensor_name == "weight"]
            methods = [*hook] if isinstance(hook, prune.PruningContainer) else [hook]
            assert len(methods) == number + {"fresh": 0, "native": 1, "ours": 2}[state]
            said = repr(methods[-1])
            assert said in [HISTORY[function.__name__].replace("?", str(n)) for n in range(5)]
            assert reachable(layer._forward_pre_hooks) == {}
    assert prune.is_pruned(model)


@every_function
def test_five_rounds_leave_what_one_leaves(function):
    model, args = ready(function)
    args["amount"] = 0.1
    function(**args)
    one = sorted(reachable(model).values())
    for _ in range(4):
        function(**args)
    assert sorted(reachable(model).values()) == one
    assert len(next(iter(model[0]._forward_pre_hooks.values()))) == 5


def test_five_rounds_on_a_larger_model_hold_dense_mask_and_product():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    for _ in range(5):
        tpe.global_unstructured(tpe.prunable_parameters(model), amount=0.2)
    assert sum(reachable(model).values()) == 3 * 4 * 64 * (64 + 32)


@every_function
def test_native_pruning_goes_on_from_there(function):
    model, args = ready(function)
    function(**args)
    before = [layer.weight_mask.clone() for layer in model[:4]]
    for layer in model[:4]:
        prune.l1_unstructured(layer, "weight", amount=1)
    for layer, mask in zip(model[:4], before, strict=True):
        assert int(mask.sum()) - int(layer.weight_mask.sum()) == 1
        assert torch.all(layer.weight_mask <= mask)
    tpe.remove_all(model)
    assert not prune.is_pruned(model)


@every_function
@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
def test_amount_zero_changes_no_value(function, state):
    model, args = ready(function, state)
    before = [
        owner(layer).detach() * torch.tensor(dense_mask(layer)).reshape(layer.weight.shape) for layer in model[:4]
    ]
    function(**{**args, "amount": 0})
    for layer, weight in zip(model[:4], before, strict=True):
        assert torch.equal(layer.weight, weight)
