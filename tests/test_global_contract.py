"""Global calls are all or nothing, and refuse by name."""

import inspect
import itertools
import math

import pytest
import torch
import toys
from globally import (
    FUNCTIONS,
    ROWS,
    PlantedError,
    every_function,
    owner,
    ready,
    weights,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = toys.unwarned


def no_module(args, i):
    listed = args.get("params", args.get("pairs"))
    listed[i] = ("conv1", listed[i][1])
    return TypeError


def no_pair(args, i):
    args.get("params", args.get("pairs"))[i] = 7
    return TypeError


def no_parameter(args, i):
    args.get("params", args.get("pairs"))[i] = (nn.ReLU(), args.get("params", args.get("pairs"))[i][1])
    return ValueError


def half_way(args, i):
    param = "params" if "params" in args else "pairs"

    def generator(pairs):
        for place, pair in enumerate(pairs):
            if place == i:
                raise PlantedError("half way")
            yield pair

    args[param] = generator(list(args[param]))
    return PlantedError


def nan_weight(args, i):
    owner(args["params"][i][0]).data.view(-1)[-1] = math.nan
    return ValueError


def nan_scale(args, i):
    args["pairs"][i][1].weight.data[-1] = math.nan
    return ValueError


def other_size(args, i):
    args["pairs"][i] = (args["pairs"][i][0], nn.BatchNorm2d(99))
    return ValueError


def no_batch_norm(args, i):
    args["pairs"][i] = (args["pairs"][i][0], nn.ReLU())
    return TypeError


def no_gradient(args, i):
    owner(args["params"][i][0]).grad = None
    return ValueError


def nan_gradient(args, i):
    owner(args["params"][i][0]).grad.view(-1)[0] = math.nan
    return ValueError


def tensors(param, how):
    def spoil(args, i):
        good = {pair: owner(pair[0]).detach().abs() + 1 for pair in args["params"]}
        pair = args["params"][i]
        if how == "missing":
            del good[pair]
        elif how == "shape":
            good[pair] = good[pair].flatten()
        elif how == "transposed":
            good[pair] = good[pair].transpose(0, 1) if good[pair].shape[0] != good[pair].shape[1] else good[pair][0]
        elif how == "list":
            good[pair] = good[pair].tolist()
        elif how == "integer":
            good[pair] = good[pair].long()
        else:
            good[pair].view(-1)[-1] = how
        args[param] = good
        return TypeError if how in ("list", "integer") else ValueError

    spoil.__name__ = f"{param}-{how}"
    return spoil


LISTS = [no_module, no_pair, no_parameter, half_way]
BAD = ["missing", "shape", "transposed", "list", "integer", math.nan, math.inf]
SCORES = [tensors("importance_scores", how) for how in [*BAD, -1.0]]
SPOILS = [
    *[(function, spoil) for function in FUNCTIONS for spoil in LISTS],
    *[(function, spoil) for function in FUNCTIONS if "importance_scores" in inspect.signature(function).parameters
      for spoil in [nan_weight, *SCORES]],
    *[(tpe.global_gradient_magnitude, s) for s in [no_gradient, nan_gradient, *(tensors("grad", b) for b in BAD)]],
    *[(tpe.global_obd_saliency, s) for s in [nan_weight, *(tensors("hessian_diag", b) for b in BAD)]],
    *[(tpe.global_bn_scaling, s) for s in [nan_scale, other_size, no_batch_norm]],
]  # fmt: skip


@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
@pytest.mark.parametrize(
    ("function", "spoil"), SPOILS, ids=[f"{function.__name__}-{spoil.__name__}" for function, spoil in SPOILS]
)
def test_an_error_at_any_place_of_the_list_changes_nothing(function, spoil, state):
    for i in range(4):
        model, args = ready(function, state)
        error = spoil(args, i)
        before = Snapshot(*model)
        with pytest.raises(error, match=r"half way" if spoil is half_way else rf"(params|pairs)\[{i}\]"):
            function(**args)
        assert before.differences() == [], f"place {i}"


def raise_at(monkeypatch, target, name, number, error):
    """Make the ``number``-th call of ``target.name`` raise; return a list that is non-empty once it has."""
    calls, raised, original = itertools.count(1), [], getattr(target, name)

    def planted(*args, **kwargs):
        if next(calls) == number:
            raised.append(name)
            raise error("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, planted)
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
    (torch, "empty_like"),
    (torch, "ones_like"),
]


@every_function
@pytest.mark.parametrize(
    ("state", "error"),
    [("fresh", PlantedError), ("native", KeyboardInterrupt), ("ours", PlantedError)],
)
def test_an_error_planted_anywhere_inside_changes_nothing(function, state, error):
    reached = set()
    for target, name in PLANTS:
        for number in itertools.count(1):
            model, args = ready(function, state)
            before = Snapshot(*model)
            with pytest.MonkeyPatch.context() as monkeypatch:
                raised = raise_at(monkeypatch, target, name, number, error)
                try:
                    function(**args)
                except error:
                    pass
                else:
                    break
            assert before.differences() == [], f"call {number} of {target.__name__}.{name}"
            assert raised
            reached.add(number)
    assert {1, 2, 3, 4} <= reached, "no plant was reached at every layer: name what the installation uses in PLANTS"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"amount": None}, TypeError, r"amount=None, target_sparsity=None"),
        ({"target_sparsity": 0.5}, TypeError, r"amount=0\.3, target_sparsity=0\.5"),
        ({"amount": -1}, ValueError, r"amount=-1\b"),
        ({"amount": 1.5}, ValueError, r"amount=1\.5"),
        ({"amount": math.nan}, ValueError, r"amount=nan"),
        ({"amount": 10**9}, ValueError, r"amount=1000000000\b"),
        ({"amount": "x"}, TypeError, r"amount='x'"),
        ({"amount": True}, TypeError, r"amount=True"),
        ({"amount": None, "target_sparsity": -0.1}, ValueError, r"target_sparsity=-0\.1"),
        ({"amount": None, "target_sparsity": 1.1}, ValueError, r"target_sparsity=1\.1"),
        ({"amount": None, "target_sparsity": 2}, ValueError, r"target_sparsity=2\b"),
        ({"amount": None, "target_sparsity": math.nan}, ValueError, r"target_sparsity=nan"),
        ({"amount": None, "target_sparsity": "x"}, TypeError, r"target_sparsity='x'"),
        ({"amount": None, "target_sparsity": True}, TypeError, r"target_sparsity=True"),
        ({"min_keep": -1}, ValueError, r"min_keep=-1\b"),
        ({"min_keep": 1.5}, ValueError, r"min_keep=1\.5"),
        ({"min_keep": math.nan}, ValueError, r"min_keep=nan"),
        ({"min_keep": "x"}, TypeError, r"min_keep='x'"),
        ({"min_keep": True}, TypeError, r"min_keep=True"),
        ({"min_keep": None}, TypeError, r"min_keep=None"),
    ],
)
@every_function
@pytest.mark.parametrize("state", ["fresh", "native"])
def test_a_wrong_budget_is_refused_by_name_and_changes_nothing(function, state, changes, error, words):
    model, args = ready(function, state)
    before = Snapshot(*model)
    with pytest.raises(error, match=words):
        function(**{**args, **changes})
    assert before.differences() == []


@every_function
@pytest.mark.parametrize(
    ("listed", "error"),
    [([], ValueError), ((), ValueError), (7, TypeError), (None, TypeError), (nn.Linear(2, 2), TypeError)],
)
def test_what_is_no_list_is_refused(function, listed, error):
    _, args = ready(function)
    args["pairs" if "pairs" in args else "params"] = listed
    with pytest.raises(error, match=r"params|pairs"):
        function(**args)


@pytest.mark.parametrize(
    ("function", "changes", "error", "words"),
    [
        (tpe.global_kernel_ln, {"normalize": "l2"}, ValueError, r"normalize='l2'"),
        (tpe.global_vector_ln, {"normalize": 1}, ValueError, r"normalize=1"),
        (tpe.global_kernel_ln, {"n": "fro"}, TypeError, r"n='fro'"),
        (tpe.global_kernel_ln, {"n": math.nan}, ValueError, r"n=nan"),
        (tpe.global_vector_ln, {"dim": 7}, ValueError, r"params\[0\].*dim=7"),
        (tpe.global_vector_ln, {"dim": 0.5}, TypeError, r"dim=0\.5"),
        (tpe.global_ln_structured, {"dim": -6}, ValueError, r"params\[0\].*dim=-6"),
        (tpe.global_unstructured, {"reduce": "mean"}, ValueError, r"reduce='mean'.*process_group"),
        (tpe.global_unstructured, {"importance_scores": torch.ones(3)}, TypeError, r"importance_scores is a Tensor"),
        (tpe.global_gradient_magnitude, {"grad": [torch.ones(3)]}, TypeError, r"grad is a list"),
        (tpe.global_nm_structured, {"m": 0}, ValueError, r"m=0"),
        (tpe.global_nm_structured, {"m": 2.0}, TypeError, r"m=2\.0"),
        (tpe.global_nm_structured, {"m": 7}, ValueError, r"params\[0\].*m=7.*pad=True"),
        (tpe.global_nm_structured, {"dim": 9}, ValueError, r"params\[0\].*dim=9"),
        (tpe.global_nm_structured, {"choices": []}, ValueError, r"choices=\[\]"),
        (tpe.global_nm_structured, {"choices": [5]}, ValueError, r"choices=\[5\]"),
        (tpe.global_nm_structured, {"choices": [-1], "min_keep": 0}, ValueError, r"choices=\[-1\]"),
        (tpe.global_nm_structured, {"choices": ["x"]}, (TypeError, ValueError), r"choices="),
        (tpe.global_nm_structured, {"choices": [1.5]}, (TypeError, ValueError), r"choices="),
        (tpe.global_nm_structured, {"choices": 1}, TypeError, r"choices=1"),
        (tpe.global_nm_structured, {"min_keep": 0.5}, (TypeError, ValueError), r"min_keep=0\.5"),
        (tpe.global_nm_structured, {"min_keep": 5}, ValueError, r"min_keep=5"),
        (tpe.global_nm_structured, {"amount": 0.9}, ValueError, r"amount=0\.9.*1 of 4"),
        (tpe.global_nm_structured, {"choices": [4], "amount": 0.1}, ValueError, r"4 of 4.*choices="),
        *[(row.function, *bad) for row in ROWS for bad in row.bad],
    ],
)
def test_other_arguments_are_refused_by_name(function, changes, error, words):
    model, args = ready(function)
    before = Snapshot(*model)
    with pytest.raises(error, match=words):
        function(**{**args, **changes})
    assert before.differences() == []


def test_kernels_need_convolutions_and_the_message_says_which_is_none():
    layers = [nn.Conv2d(2, 2, 3), nn.Linear(4, 4)]
    before = Snapshot(*layers)
    with pytest.raises(ValueError, match=r"params\[1\], Linear\.weight of shape \(4, 4\): .*kernels"):
        tpe.global_kernel_ln(weights(*layers), amount=0.5)
    assert before.differences() == []


def test_the_norm_of_a_tiny_order_is_refused_by_name():
    layer = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match=r"n=0\.001"):
        tpe.global_kernel_ln(weights(layer), amount=1, n=0.001)
