"""Every method with the rest of torch: native global pruning, half precision, compile, export."""

import inspect
import warnings

import pytest
import torch
from cases import CASES, HOSTS, batch_norm_for, flat
from contracts import every_method, input_for, make, pruned_natively
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


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
@pytest.mark.parametrize("case", [case for case in CASES if case.pairs], ids=lambda c: c.id)
def test_any_order_of_norm_works(case, n):
    module = make(case.hosts[0]).double()
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
