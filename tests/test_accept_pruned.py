"""A model that takes the state dicts of pruned ones by its own load_state_dict, as trainers call it."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.deploy.checkpoint import accept_pruned


def made(seed, *amounts):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for layer, amount in zip((model[0], model[2]), amounts, strict=False):
        if amount:
            prune.random_unstructured(layer, "weight", amount)
    return model


@pytest.mark.parametrize("source", [(), (0.5,), (0, 0.5), (0.5, 0.5)])
@pytest.mark.parametrize("own", [(), (0.5,), (0.5, 0.5)])
@pytest.mark.parametrize("inside", [False, True])
def test_as_load_pruned_state_dict(source, own, inside):
    model, expected, state = made(1, *own), made(1, *own), made(2, *source).state_dict()
    parameters = list(model.parameters())
    before = []
    ended = accept_pruned(model, lambda: before.append(prune.is_pruned(model)))
    if inside:  # the hook gets keys with a prefix
        nn.ModuleDict({"net": model}).load_state_dict({f"net.{key}": value for key, value in state.items()})
    else:
        model.load_state_dict(state)
    tpe.load_pruned_state_dict(expected, state)
    assert before == [bool(own)]
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model[0].weight, expected[0].weight)  # without a forward
    ended.close()
    if source:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            made(1).load_state_dict(state)
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks


def test_a_mask_without_values_is_refused_before_anything_is_loaded():
    model, state = made(1), made(2, 0.5).state_dict()
    before = copy.deepcopy(model.state_dict())
    del state["0.weight_orig"]
    accept_pruned(model)
    with pytest.raises(ValueError, match=r"without its '0\.weight_orig'"):
        model.load_state_dict(state, strict=False)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_copies_take_masks_without_what_is_called_before():
    model, calls = made(1), []
    accept_pruned(model, lambda: calls.append(1))
    copy.deepcopy(model).load_state_dict(made(2, 0.5).state_dict())
    assert calls == []


def test_a_missing_package_is_named_with_its_extra():
    code = """
import importlib, sys
for name in ("lightning", "transformers"):
    sys.modules[name] = None
    try:
        importlib.import_module(f"torchprune_ext.integrations.{name}")
    except ImportError as error:
        assert f"pip install torchprune-ext[{name}]" in str(error), error
    else:
        raise SystemExit(f"imported {name}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
