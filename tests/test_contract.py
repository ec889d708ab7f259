"""Every method x every promise."""

import copy
import inspect
import io
import itertools
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from cases import ABSENT, CASES, HOSTS, batch_norm_for, flat
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchprune_ext as tpe

every_method = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
EVERY_HOST = [pytest.param(case, host, id=f"{case.id}-{host}") for case in CASES for host in case.hosts]
EVERY_BAD = [
    pytest.param(case, bad, id=f"{case.id}-{i}-{'-'.join(bad.args)}")
    for case in CASES
    for i, bad in enumerate(case.bad)
]


def fresh(module):
    """Leave the module as it is."""


def pruned_natively(module):
    """Prune once, by a hook that is no container."""
    prune.custom_from_mask(module, "weight", (torch.arange(module.weight.numel()) % 5 > 0).view_as(module.weight))


def in_a_container(module):
    """Prune three times, the last time by us."""
    pruned_natively(module)
    prune.random_unstructured(module, "weight", amount=0)
    tpe.threshold(module, "weight", 0.01)


def pruned_by_us(module):
    """Prune once, by one of our own hooks."""
    tpe.every_other(module, "weight", step=7)


STATES = (fresh, pruned_natively, in_a_container, pruned_by_us)
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


def make(host, state=fresh):
    """Return a module with a gradient, hooks of the user's own and the given past."""
    module = HOSTS[host]()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.register_forward_pre_hook(first_hook)
    state(module)
    module.register_forward_pre_hook(last_hook)
    module.register_forward_hook(after_hook)
    return module


def first_hook(module, args):
    """Stand for a hook of the user's."""


def last_hook(module, args):
    """Stand for another hook of the user's."""


def after_hook(module, args, output):
    """Stand for a hook behind the forward pass."""


def ours(module, name="weight"):
    """Return the pruning hook of ``module.<name>``."""
    hooks = module._forward_pre_hooks.values()
    (hook,) = [h for h in hooks if isinstance(h, prune.BasePruningMethod) and h._tensor_name == name]
    return hook


def drop_gradient(module, args):
    """Make 'no gradient anywhere' true where a row wants it."""
    if "grad" in args and args["grad"] in (ABSENT, None):
        for parameter in module.parameters():
            parameter.grad = None


def modules_in(module, args):
    return [module, *(value for value in args.values() if isinstance(value, nn.Module))]


def input_for(module):
    """Return a batch that the module takes."""
    channels = getattr(module, "in_channels", None)
    if channels is None:
        return torch.linspace(-1, 1, 4 * module.in_features).reshape(4, -1)
    size = (2, channels, *[5] * (module.weight.dim() - 2))
    return torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size)


# ----------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize(("case", "bad"), EVERY_BAD)
@every_state
def test_bad_arguments_are_refused_by_name_and_change_nothing(case, bad, state):
    module = make(case.hosts[-1], state)
    drop_gradient(module, bad.args)
    args = case.arguments(module, **bad.args)
    where = f"{type(module).__name__}.weight of shape {tuple(module.weight.shape)}: "
    before = Snapshot(*modules_in(module, args))
    with pytest.raises(bad.error, match=bad.words) as caught:
        case.function(module, "weight", **args)
    assert str(caught.value).startswith(where)
    assert len(str(caught.value)) > len(where) + 20, "a reason and a remedy take some words"
    assert before.differences() == []
    assert case.function(module, "weight", **case.arguments(module)) is module


@pytest.mark.parametrize(("case", "bad"), EVERY_BAD)
def test_the_class_refuses_what_the_function_refuses(case, bad):
    module = make(case.hosts[0], pruned_natively)
    drop_gradient(module, bad.args)
    args = case.arguments(module, **bad.args)
    before = Snapshot(*modules_in(module, args))
    with pytest.raises(bad.error, match=bad.words):
        case.cls.apply(module, "weight", **args)
    assert before.differences() == []


class PlantedError(Exception):
    """An error that nobody expects."""


def raise_at(monkeypatch, owner, name, number, error):
    """Make the ``number``-th call of ``owner.name`` raise; return a list that is non-empty once it has."""
    calls, raised, original = itertools.count(1), [], getattr(owner, name)

    def planted(*args, **kwargs):
        if next(calls) == number:
            raised.append(name)
            raise error("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, planted)
    return raised


PLANTS = [
    (nn.Module, "register_parameter"),
    (nn.Module, "register_buffer"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "__setattr__"),
    (nn.Module, "__delattr__"),
    (prune.BasePruningMethod, "apply_mask"),
    (prune.PruningContainer, "add_pruning_method"),
    (prune.PruningContainer, "compute_mask"),
]


@every_method
@every_state
@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
def test_an_error_planted_anywhere_inside_changes_nothing(case, state, error):
    reached = 0
    for owner, name in [*PLANTS, (case.cls, "compute_mask")]:
        for number in range(1, 30):
            module = make(case.hosts[0], state)
            args = case.arguments(module)
            before = Snapshot(*modules_in(module, args))
            with pytest.MonkeyPatch.context() as monkeypatch:
                raised = raise_at(monkeypatch, owner, name, number, error)
                try:
                    case.function(module, "weight", **args)
                except error:
                    pass
                else:
                    break
            assert before.differences() == [], f"call {number} of {owner.__name__}.{name}"
            assert raised
            reached += 1
    assert reached, "no plant was reached: name what the installation uses now in PLANTS"


@every_state
def test_a_warning_that_is_an_error_changes_nothing(state):
    module = make("linear", state)
    before = Snapshot(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"Linear\.weight"):
            tpe.threshold(module, "weight", 1e6)
    assert before.differences() == []


def test_nothing_left_is_a_warning_that_names_the_tensor():
    module = HOSTS["linear"]()
    with pytest.warns(UserWarning, match=r"Linear\.weight of shape \(6, 8\)"):
        tpe.threshold(module, "weight", 1e6)
    assert not module.weight_mask.any()


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("case", [case for case in CASES if case.ranks_weight], ids=lambda case: case.id)
@every_state
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_without_a_rank_are_refused(case, state, value):
    module = make(case.hosts[0], state)
    with torch.no_grad():
        module._parameters["weight" if state is fresh else "weight_orig"].view(-1)[1] = value
    args = case.arguments(module)
    before = Snapshot(module)
    with pytest.raises(ValueError, match=rf"{type(module).__name__}\.weight of shape .*(NaN|inf)"):
        case.function(module, "weight", **args)
    assert before.differences() == []


@every_method
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.int64, torch.bool])
def test_tensors_that_are_not_floating_point_are_refused(case, dtype):
    module = make(case.hosts[0])
    args = case.arguments(module)
    module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype), requires_grad=False)
    before = Snapshot(*modules_in(module, args))
    with pytest.raises(TypeError, match=rf"{type(module).__name__}\.weight of shape .*{dtype}"):
        case.function(module, "weight", **args)
    assert before.differences() == []


@every_method
def test_meta_tensors_are_refused(case):
    module = make(case.hosts[0])
    args = case.arguments(module)
    module = module.to("meta")
    before = Snapshot(*modules_in(module, args))
    with pytest.raises((TypeError, ValueError), match=rf"{type(module).__name__}\.weight of shape .*meta"):
        case.function(module, "weight", **args)
    assert before.differences() == []


@every_method
@pytest.mark.parametrize("name", ["nothing", "stride", "buffer", "none", "training", "weight_mask", ""])
def test_names_that_are_no_parameter_are_refused(case, name):
    module = make(case.hosts[0])
    module.register_buffer("buffer", torch.ones(2))
    module.register_parameter("none", None)
    args = case.arguments(module)
    before = Snapshot(*modules_in(module, args))
    with pytest.raises((TypeError, ValueError), match=rf"{type(module).__name__}.*{name}"):
        case.function(module, name, **args)
    assert before.differences() == []


@every_method
@pytest.mark.parametrize("name", [3, None, ("weight",)], ids=repr)
def test_names_that_are_no_names_are_refused(case, name):
    module = make(case.hosts[0])
    args = case.arguments(module)
    before = Snapshot(*modules_in(module, args))
    with pytest.raises(TypeError, match=r"name="):
        case.function(module, name, **args)
    assert before.differences() == []


@every_method
@pytest.mark.parametrize("module", [None, "conv", torch.ones(2, 2), nn.Linear], ids=["None", "str", "tensor", "class"])
def test_what_is_no_module_is_refused(case, module):
    args = case.arguments(make(case.hosts[0]))
    with pytest.raises(TypeError, match="module"):
        case.function(module, "weight", **args)


@every_method
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (parametrizations.weight_norm, r"original1|parametrizations"),
        (parametrizations.spectral_norm, r"original|parametrizations"),
        (nn.utils.weight_norm, r"weight_v"),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm"],
)
def test_parametrized_tensors_are_refused_with_the_tensor_to_prune_instead(case, wrap, words):
    module = make(case.hosts[0])
    args = case.arguments(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrap(module)
    before = Snapshot(module)
    with pytest.raises((TypeError, ValueError), match=words):
        case.function(module, "weight", **args)
    assert before.differences() == []


@every_method
def test_a_lazy_module_is_refused(case):
    args = case.arguments(make(case.hosts[0]))
    lazy = nn.LazyLinear(6)
    with pytest.raises((TypeError, ValueError), match=r"LazyLinear\.weight"):
        case.function(lazy, "weight", **args)
    assert list(lazy._parameters) == ["weight", "bias"]


@pytest.mark.parametrize(("n", "large"), [(2, 1e30), (3, 1e20), (-2, 1e-30), (1, 2e38)])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kernel_ln", "vector_ln")], ids=lambda c: c.id)
def test_norms_that_leave_single_precision_are_ranked_right_or_refused(case, n, large):
    module = nn.Conv1d(2, 1, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[[large, large], [large, large * 1.5]]]))
    before, refused = Snapshot(module), ""
    try:
        case.function(module, "weight", amount=1, n=n, **({"dim": 2} if case.id == "vector_ln" else {}))
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("Conv1d.weight of shape (1, 2, 2): ")
        assert before.differences() == []
    else:
        assert flat(module.weight_mask) == [0, 0, 1, 1], "the larger unit went"


@every_method
def test_masks_are_binary_after_one_that_was_not(case):
    module = make(case.hosts[0])
    prune.custom_from_mask(module, "weight", torch.linspace(0, 1, module.weight.numel()).view_as(module.weight))
    args = case.arguments(module)
    earlier, before, refused = module.weight_mask.clone(), Snapshot(*modules_in(module, args)), ""
    try:
        case.function(module, "weight", **args)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "mask" in refused
        assert before.differences() == []
    else:
        assert set(flat(module.weight_mask)) <= {0, 1}
        assert not module.weight_mask[earlier == 0].any()


def test_a_kernel_needs_spatial_axes():
    for name in ("weight", "bias"):
        module = HOSTS["linear"]()
        before = Snapshot(module)
        with pytest.raises(ValueError, match=r"Linear\.\w+ of shape .*(vector_ln|ln_structured|l1_unstructured)"):
            tpe.kernel_ln(module, name, amount=0.3)
        assert before.differences() == []


def test_m_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"^Linear\.weight of shape \(3, 6\): .*m=4.*1, 2, 3, 6.*pad=True"):
        tpe.nm_structured(nn.Linear(6, 3), "weight", n=2, m=4)


# ------------------------------------------------------------------------------------------ what the host keeps


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
    for name in ("weight", "bias") if case.id == "bn_scaling" else ("weight",):
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


# ---------------------------------------------------------------------------------------- with the rest of torch


@pytest.mark.parametrize("cls", [tpe.GradientMagnitude, tpe.OBDSaliency], ids=lambda cls: cls.__name__)
def test_native_global_pruning_takes_our_classes(cls):
    model = nn.Sequential(HOSTS["linear"](), nn.ReLU(), nn.Linear(6, 4))
    pairs = [(model[0], "weight"), (model[2], "weight"), (model[0], "bias")]
    scores = {(m, n): (torch.arange(getattr(m, n).numel()) * 7 % 97.0).view_as(getattr(m, n)) for m, n in pairs}
    prune.global_unstructured(pairs, pruning_method=cls, importance_scores=scores, amount=0.5)
    masks = torch.cat([getattr(m, f"{n}_mask").flatten() for m, n in pairs])
    everything = torch.cat([scores[pair].flatten() for pair in pairs])
    order = everything.argsort(stable=True, descending=True)
    expected = torch.zeros_like(everything).index_fill(0, order[: len(order) - round(0.5 * len(order))], 1)
    assert torch.equal(masks, expected)
    prune.global_unstructured(pairs, pruning_method=cls, importance_scores=scores, amount=0.5)
    assert sum(int(getattr(m, f"{n}_mask").sum()) for m, n in pairs) == len(order) - 39 - round(0.5 * 39)


@pytest.mark.parametrize("cls", [tpe.GradientMagnitude, tpe.OBDSaliency, tpe.BNScaling], ids=lambda c: c.__name__)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_that_come_through_the_host_are_checked_too(cls, value):
    scores = torch.ones(4, 4)
    scores[1, 1] = value
    with pytest.raises(ValueError, match=r"(?i)finite|negative|nan|inf|>= 0"):
        cls(0.5).compute_mask(scores, torch.ones(4, 4))


def test_native_global_pruning_takes_thresholds_and_every_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pairs = [(layer, "weight") for layer in model]
    prune.global_unstructured(pairs, pruning_method=tpe.Threshold, threshold=0.2)
    for layer in model:
        assert torch.equal(layer.weight_mask, (layer.weight_orig.abs() >= 0.2).float())
    left = sum(int(layer.weight_mask.sum()) for layer in model)
    prune.global_unstructured(pairs, pruning_method=tpe.EveryOther, step=2)
    assert sum(int(layer.weight_mask.sum()) for layer in model) == left // 2


@every_method
def test_scores_of_half_precision_are_computed_in_single(case):
    module = HOSTS[case.hosts[0]]()
    shape = module.weight.shape
    tiny = (torch.arange(shape.numel()) * 37 % 211 + 1.0).reshape(shape) * 2.0**-14
    for factor in (1.0, 2.0**20):  # squares vanish, and overflow, in float16
        module, single = HOSTS[case.hosts[0]](), HOSTS[case.hosts[0]]()
        module.weight = nn.Parameter((tiny * factor).half())
        single.weight = nn.Parameter(module.weight.detach().float())
        args = case.arguments(single)
        args["threshold"] = 0.001 if "threshold" in args else None
        args = {key: value for key, value in args.items() if value is not None}
        case.function(single, "weight", **args)
        bn = {"bn": batch_norm_for(single)} if "bn" in args else {}
        case.function(module, "weight", **{**args, **bn})
        assert torch.equal(module.weight_mask, single.weight_mask.half())


SCORED = [case for case in CASES if "importance_scores" in inspect.signature(case.function).parameters]


@pytest.mark.parametrize("case", SCORED, ids=lambda case: case.id)
def test_importance_scores_decide_where_they_are_taken(case):
    module = make(case.hosts[0], pruned_natively)
    shape, before = tuple(module.weight.shape), flat(module.weight_mask)
    scores = (torch.arange(module.weight.numel()) * 37 % 101 / 100.0).reshape(shape)
    args = case.arguments(module, importance_scores=scores)
    expected = case.oracle(module, shape, None, before, {"dim": 1, "n": 2, **args})
    case.function(module, "weight", **args)
    assert flat(module.weight_mask) == expected


@pytest.mark.parametrize("n", [3, 0.5, 1.7, -1, -2.5])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kernel_ln", "vector_ln")], ids=lambda c: c.id)
def test_any_order_of_norm_works(case, n):
    module = make("conv2d").double()
    args = case.arguments(module, n=n)
    shape = tuple(module.weight.shape)
    expected = case.oracle(module, shape, flat(module.weight), [1] * module.weight.numel(), args)
    case.function(module, "weight", **args)
    assert flat(module.weight_mask) == expected


@every_method
def test_the_compiled_module_computes_the_same(case):
    """Slow-ish: the import of the compiler alone takes seconds."""
    module = HOSTS[case.hosts[0]]()
    case.function(module, "weight", **case.arguments(module))
    x = input_for(module)
    expected = module(x)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    compiled(x).square().sum().backward()
    assert torch.any(module.weight_orig.grad != 0)
    prune.l1_unstructured(module, "weight", amount=0.5)
    assert torch.equal(compiled(x), module(x))
    tpe.remove(module, "weight")
    assert torch.equal(compiled(x), module(x))


def test_the_exported_program_computes_the_same():
    model = nn.Sequential(HOSTS["conv2d"](), nn.BatchNorm2d(6)).eval()
    tpe.nm_structured(model[0], "weight", 2, 4)
    tpe.kernel_ln(model[0], "weight", 0.3)
    tpe.bn_scaling(model[0], "weight", 0.3, batch_norm_for(model[0]))
    x = input_for(model[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes .* were assigned during export")  # as native
        program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


@every_method
def test_native_remove_works(case):
    module = make(case.hosts[0])
    case.function(module, "weight", **case.arguments(module))
    expected = module.weight.detach().clone()
    prune.remove(module, "weight")
    assert torch.equal(module.weight, expected)
    assert isinstance(module.weight, nn.Parameter)


@every_method
def test_a_call_with_wrong_names_changes_nothing(case):
    module = make(case.hosts[0], pruned_natively)
    before = Snapshot(module)
    with pytest.raises(TypeError, match="unexpected keyword"):
        case.function(module, "weight", **case.arguments(module), nonsense=1)
    assert before.differences() == []
