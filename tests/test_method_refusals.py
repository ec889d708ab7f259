"""Every method is all or nothing, and refuses by name."""

import itertools
import warnings

import pytest
import torch
from cases import CASES, HOSTS, flat
from contracts import (
    EVERY_BAD,
    STATES,
    drop_gradient,
    every_method,
    every_state,
    fresh,
    make,
    modules_in,
    pruned_natively,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchprune_ext as tpe

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
@pytest.mark.parametrize(
    ("state", "error"),
    list(zip(STATES, itertools.cycle([KeyboardInterrupt, PlantedError]))),
    ids=lambda value: value.__name__,
)
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
@pytest.mark.parametrize("case", [case for case in CASES if case.pairs], ids=lambda c: c.id)
def test_norms_that_leave_single_precision_are_ranked_right_or_refused(case, n, large):
    shape, unit = case.pairs
    module = HOSTS[case.hosts[0]]()
    module.weight = nn.Parameter(torch.tensor([large, large, large, large * 1.5]).view(shape))
    before, refused = Snapshot(module), ""
    try:
        case.function(module, "weight", amount=1, n=n, **unit)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"{type(module).__name__}.weight of shape {shape}: ")
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


@every_method
def test_a_call_with_wrong_names_changes_nothing(case):
    module = make(case.hosts[0], pruned_natively)
    before = Snapshot(module)
    with pytest.raises(TypeError, match="unexpected keyword"):
        case.function(module, "weight", **case.arguments(module), nonsense=1)
    assert before.differences() == []
