"""Hooks stay in users' modules, so where their classes stand is a file format: what one version saved, later ones open.

A pickle names each class by the module it is defined in. To move one, leave its name in the old module, and add its new
path here.
"""

import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
from make_pruned import FILE, MANY, ONE, histories, make, outputs
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import functional, global_pruning
from torchprune_ext.methods import Method

PATHS = {
    "torchprune_ext.methods.base.GlobalPruning",
    "torchprune_ext.methods.base.Method",
    "torchprune_ext.methods.entries.EveryOther",
    "torchprune_ext.methods.entries.GradientMagnitude",
    "torchprune_ext.methods.entries.OBDSaliency",
    "torchprune_ext.methods.entries.Threshold",
    "torchprune_ext.methods.units.BNScaling",
    "torchprune_ext.methods.units.BlockLn",
    "torchprune_ext.methods.units.KernelLn",
    "torchprune_ext.methods.units.NMStructured",
    "torchprune_ext.methods.units.VectorLn",
    "torchprune_ext.patterns.NM",  # an argument in the history of prune_and_compensate
}
FILES = sorted(FILE.parent.glob("pruned_*.pt"))


def hook_classes():
    """Return the pruning methods that the package defines, the private ones left out."""
    classes = {tpe.NM}
    for module in pkgutil.walk_packages(tpe.__path__, "torchprune_ext."):
        members = vars(importlib.import_module(module.name)).values()
        classes |= {
            c for c in members if inspect.isclass(c) and issubclass(c, Method) and not c.__name__.startswith("_")
        }
    return classes


def test_the_classes_of_hooks_stay_where_pickles_look_for_them():
    assert {f"{c.__module__}.{c.__qualname__}" for c in hook_classes()} <= PATHS
    for path in PATHS:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) in hook_classes()


def test_hooks_are_found_by_their_public_path_too():
    for cls in hook_classes() - {tpe.NM}:
        by_name = f"ctorchprune_ext.methods\n{cls.__name__}\n.".encode()  # as a pickle writes it
        assert pickle.loads(by_name) is cls


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_models_that_a_version_has_saved_open(file):
    saved = torch.load(file, weights_only=False)
    model = saved["model"]
    assert histories(model) == saved["histories"]
    assert len(saved["outputs"]) == 2 * len(model)
    for path, output in outputs(model).items():
        torch.testing.assert_close(output, saved["outputs"][path])
    for path, module, name in list(tpe.pruned_parameters(model)):  # and can be pruned further, natively and by us
        before = getattr(module, f"{name}_mask").clone()
        prune.random_unstructured(module, name, amount=0)
        tpe.every_other(module, name, step=2)
        assert torch.all(getattr(module, f"{name}_mask") <= before), path
    tpe.remove_all(model)
    assert not prune.is_pruned(model)


def test_the_file_of_this_version_has_every_method_and_every_global_call():
    assert FILE in FILES, "run tests/make_pruned.py"
    calls = {name for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"}
    calls -= {"wraps"}
    assert set(ONE) == calls
    assert set(MANY) >= set(global_pruning.__all__)
    assert set(torch.load(FILE, weights_only=False)["histories"]) == set(histories(make()))
