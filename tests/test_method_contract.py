"""What every method keeps of the host: orders, identity, history, training, pickles."""

import copy
import inspect
import io
import pickle
import random

import numpy as np
import pytest
import torch
from cases import CASES, HOSTS, flat
from contracts import (
    EVERY_HOST,
    STATES,
    after_hook,
    every_method,
    every_state,
    first_hook,
    fresh,
    in_a_container,
    input_for,
    last_hook,
    make,
    modules_in,
    ours,
    pruned_natively,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


@pytest.mark.parametrize(("case", "host"), EVERY_HOST)
@every_state
def test_orders_identity_and_dtype_are_kept(case, host, state):
    module = make(host, state)
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    gradient, requires_grad = weight.grad, weight.requires_grad
    order = [name.removesuffix("_orig") for name in module._parameters]
    hooks = [type(h) if isinstance(h, prune.BasePruningMethod) else h for h in module._forward_pre_hooks.values()]
    args = case.arguments(module)
    assert case.function(module, "weight", **args) is module
    assert module.weight_orig is weight
    assert weight.grad is gradient
    assert weight.requires_grad == requires_grad
    assert [name.removesuffix("_orig") for name in module._parameters] == order
    assert order == ["weight", "bias"] or state in (pruned_natively, in_a_container)  # native itself changes it
    assert "weight_mask" in module._buffers
    assert prune.is_pruned(module)
    now = [h for h in module._forward_pre_hooks.values() if getattr(h, "_tensor_name", "weight") == "weight"]
    assert [h for h in now if not isinstance(h, prune.BasePruningMethod)] == [first_hook, last_hook]
    if state is not fresh:
        assert [h if h in (first_hook, last_hook) else "pruning" for h in now] == [first_hook, "pruning", last_hook]
        assert len(hooks) == len(now)
    assert list(module._forward_hooks.values()) == [after_hook]
    assert 0 < int(module.weight_mask.sum()) < weight.numel()


@every_method
@every_state
def test_the_history_is_one_hook_or_one_container(case, state):
    module = make(case.hosts[0])
    state(module)
    earlier = [] if state is fresh else [ours(module)]
    earlier = list(earlier[0]) if earlier and isinstance(earlier[0], prune.PruningContainer) else earlier
    case.function(module, "weight", **case.arguments(module))
    hook = ours(module)
    if state is fresh:
        assert type(hook) is case.cls
        return
    assert type(hook) is prune.PruningContainer
    assert list(hook)[:-1] == earlier
    assert type(hook[-1]) is case.cls
    assert {method._tensor_name for method in hook} == {"weight"}


@every_method
def test_a_frozen_weight_stays_frozen(case):
    module = make(case.hosts[0])
    module.weight.requires_grad_(False)
    case.function(module, "weight", **case.arguments(module))
    assert not module.weight_orig.requires_grad
    assert not module.weight.requires_grad
    assert isinstance(module.weight_orig, nn.Parameter)


@every_method
def test_state_dict_keys_are_those_of_native_pruning(case):
    module, native = make(case.hosts[0]), make(case.hosts[0])
    args = case.arguments(module)
    case.function(module, "weight", **args)
    for name in case.masks:
        prune.custom_from_mask(native, name, getattr(module, f"{name}_mask"))
    assert set(module.state_dict()) == set(native.state_dict())
    native.load_state_dict(module.state_dict())
    x = input_for(module)
    assert torch.equal(module(x), native(x))
    module.load_state_dict(native.state_dict())


@every_method
@every_state
def test_saved_and_pickled_models_work(case, state):
    module = make(case.hosts[0], state)
    case.function(module, "weight", **case.arguments(module))
    x = input_for(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    weights = torch.load(file, weights_only=True)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in weights.items())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(module))
    for twin in (loaded, again):
        assert torch.equal(twin(x), module(x))
        assert repr(ours(twin)) == repr(ours(module)) or isinstance(ours(twin), prune.PruningContainer)
        assert type(ours(twin)) is type(ours(module))
        case.function(twin, "weight", **case.arguments(twin))  # and can be pruned on


@every_method
@every_state
def test_training_goes_on(case, state):
    module = make(case.hosts[0], state)
    case.function(module, "weight", **case.arguments(module))
    mask = module.weight_mask.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    before = module.weight_orig.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        module(input_for(module)).square().sum().backward()
        assert torch.all(module.weight_orig.grad[mask == 0] == 0)
        assert torch.any(module.weight_orig.grad != 0)
        optimizer.step()
    assert torch.equal(module.weight_mask, mask)
    assert torch.equal(module.weight_orig[mask == 0], before[mask == 0])
    assert not torch.equal(module.weight_orig[mask == 1], before[mask == 1])
    module(input_for(module))
    assert torch.equal(module.weight, module.weight_orig * mask)


@every_method
def test_weights_are_scored_as_they_are_now(case):
    """After an optimizer step ``weight`` is the product of the forward pass before it; see the weight itself."""
    stale, current = (make(case.hosts[0], pruned_natively) for _ in range(2))
    for module in (stale, current):
        with torch.no_grad():
            module.weight_orig.copy_(module.weight_orig.flatten().flip(0).reshape(module.weight_orig.shape) * 3)
    args = case.arguments(stale)
    args = {key: value.flip(0) if torch.is_tensor(value) else value for key, value in args.items()}
    current(input_for(current))  # refreshes the attribute
    case.function(stale, "weight", **args)
    case.function(
        current,
        "weight",
        **{k: copy.deepcopy(v) for k, v in case.arguments(current).items()}
        | ({k: v for k, v in args.items() if torch.is_tensor(v)}),
    )
    assert torch.equal(stale.weight_mask, current.weight_mask)
    assert torch.equal(stale.weight, current.weight)


def test_the_gradient_is_read_from_the_parameter_that_owns_it():
    for state in STATES:
        module = make("linear", state)
        given = make("linear", state)
        parameter = module._parameters.get("weight", module._parameters.get("weight_orig"))
        parameter.grad = ((torch.arange(48) * 31 % 47) - 20.0).reshape(6, 8)
        tpe.gradient_magnitude(module, "weight", amount=0.5)
        tpe.gradient_magnitude(given, "weight", amount=0.5, grad=parameter.grad)
        assert torch.equal(module.weight_mask, given.weight_mask)
    once = nn.Linear(8, 6)
    tpe.every_other(once, "weight")
    once(torch.randn(4, 8)).square().sum().backward()
    tpe.gradient_magnitude(once, "weight", amount=0.5)
    assert int(once.weight_mask.sum()) == 12


@every_method
def test_a_bias_is_pruned_where_the_unit_makes_sense(case):
    module = HOSTS["linear"]()
    if case.bias is None:
        before = Snapshot(module)
        args = {**case.arguments(HOSTS[case.hosts[0]]())}
        with pytest.raises((TypeError, ValueError), match=r"Linear\.bias of shape \(6,\): "):
            case.function(module, "bias", **args)
        assert before.differences() == []
        return
    args = case.arguments(module, "bias")
    expected = case.oracle(module, (6,), flat(module.bias), [1] * 6, {"dim": -1, "n": 2, **args})
    case.function(module, "bias", **args)
    assert flat(module.bias_mask) == expected
    assert list(module._parameters) == ["weight", "bias_orig"]
    module(input_for(module)).sum().backward()


@pytest.mark.parametrize("case", [case for case in CASES if case.bias is not None], ids=lambda case: case.id)
def test_weight_and_bias_have_hooks_of_their_own(case):
    module = HOSTS["linear"]()
    case.function(module, "weight", **case.arguments(module))
    case.function(module, "bias", **case.arguments(module, "bias"))
    assert ours(module, "weight") is not ours(module, "bias")
    assert list(module._parameters) == ["weight_orig", "bias_orig"]
    module(input_for(module))


@every_method
@every_state
def test_random_states_are_untouched(case, state):
    module = make(case.hosts[0], state)
    args = case.arguments(module)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    case.function(module, "weight", **args)
    now = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], now[0])
    assert before[1:] == now[1:]


@every_method
@every_state
def test_arguments_are_left_alone_and_not_held(case, state):
    module = make(case.hosts[0], state)
    args = case.arguments(module)
    tensors = {key: value.clone() for key, value in args.items() if torch.is_tensor(value)}
    case.function(module, "weight", **args)
    assert all(torch.equal(args[key], value) for key, value in tensors.items())
    hooks = [h for m in modules_in(module, args) for h in m._forward_pre_hooks.values()]
    hooks += [method for h in hooks if isinstance(h, prune.PruningContainer) for method in h]
    mine = [h for h in hooks if type(h).__module__.startswith("torchprune_ext")]
    assert any(type(h) is case.cls for h in mine)
    for hook in mine:
        assert b"torch._utils" not in pickle.dumps(hook), f"{hook!r} holds a tensor"


@pytest.mark.parametrize(("case", "host"), EVERY_HOST)
@every_state
def test_class_and_function_do_the_same(case, host, state):
    by_function, by_class = make(host, state), make(host, state)
    assert case.function(by_function, "weight", **case.arguments(by_function)) is by_function
    method = case.cls.apply(by_class, "weight", **case.arguments(by_class))
    assert method is ours(by_class)
    assert torch.equal(by_function.weight_mask, by_class.weight_mask)
    assert list(by_function.state_dict()) == list(by_class.state_dict())


@every_method
def test_class_and_function_take_the_same_arguments(case):
    module = make(case.hosts[0])
    bound = inspect.signature(case.function).bind(module, "weight", **case.arguments(module))
    bound.apply_defaults()  # every parameter, at its place or by its name
    method = case.cls.apply(*bound.args, **bound.kwargs)
    assert repr(method) == case.repr
    parameters = list(inspect.signature(case.function).parameters.values())
    by_name = inspect.signature(case.function).bind(make(case.hosts[0]), "weight", **case.arguments(module))
    by_name.apply_defaults()
    assert repr(case.cls.apply(**by_name.arguments)) == case.repr
    assert [p.name for p in parameters[:2]] == ["module", "name"]


@every_method
def test_the_class_says_what_it_is(case):
    assert issubclass(case.cls, prune.BasePruningMethod)
    assert case.pruning_type == case.cls.PRUNING_TYPE
    assert case.cls.__doc__
    assert case.function.__doc__
    module = make(case.hosts[0])
    case.function(module, "weight", **case.arguments(module))
    assert repr(ours(module)) == case.repr


@every_method
def test_positional_arguments_work_as_in_the_readme(case):
    module = make(case.hosts[0])
    args = case.arguments(module)
    order = [p.name for p in inspect.signature(case.function).parameters.values()][2:]
    kinds = {p.name: p.kind for p in inspect.signature(case.function).parameters.values()}
    positional = [args.pop(n) for n in order if n in args and kinds[n] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    case.function(module, "weight", *positional, **args)
    assert prune.is_pruned(module)
