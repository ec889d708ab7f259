"""Hooks stay in users' modules, so where their classes stand is a file format: what one version saved, later ones open.

A pickle names each class by the module it is defined in. To move one, leave its name in the old module, and add its new
path here.
"""

import importlib
import inspect
import pickle
import pickletools
import pkgutil
import zipfile

import pytest
import torch
import toys
from make_pruned import FILE, MANY, ONE, histories, make, outputs
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import functional, global_pruning
from torchprune_ext.methods import Method

pytestmark = toys.unwarned
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
    "torchprune_ext.patterns.Channel",  # arguments in the history of prune_and_compensate
    "torchprune_ext.patterns.NM",
}
OTHERS = {  # what pickles of pruned models hold beside methods
    "torchprune_ext._readers.PrunedOutProj",
    "torchprune_ext._readers.PrunedParameterDict",
    "torchprune_ext._readers.PrunedParameterList",
    "torchprune_ext.deploy.checkpoint.Loaded",
}
FILES = sorted(FILE.parent.glob("pruned_*.pt"))


def hook_classes():
    """Return the pruning methods that the package defines, the private ones left out."""
    classes = {tpe.Channel, tpe.NM}
    for module in pkgutil.walk_packages(tpe.__path__, "torchprune_ext."):
        members = vars(importlib.import_module(module.name)).values()
        found = {c for c in members if type(c) is type(Method) and issubclass(c, Method)}
        classes |= {c for c in found if not c.__name__.startswith("_")}
    return classes


def test_the_classes_of_hooks_stay_where_pickles_look_for_them():
    assert {f"{c.__module__}.{c.__qualname__}" for c in hook_classes()} <= PATHS
    for path in PATHS:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) in hook_classes()


def test_hooks_are_found_by_their_public_path_too():
    for cls in hook_classes() - {tpe.Channel, tpe.NM}:
        by_name = f"ctorchprune_ext.methods\n{cls.__name__}\n.".encode()  # as a pickle writes it
        assert pickle.loads(by_name) is cls


def paths_in(file):
    """Return the paths into the package that a saved model asks for."""
    with zipfile.ZipFile(file) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        asked = [str(arg) for op, arg, _ in pickletools.genops(archive.read(name)) if op.name == "GLOBAL"]
    return {path.replace(" ", ".") for path in asked if path.startswith("torchprune_ext")}


def test_models_ask_for_pinned_paths_only(tmp_path):
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.ParameterList([torch.ones(4)]), nn.Linear(4, 4)])
    model.append(nn.ParameterDict({"a": torch.ones(4)}))
    tpe.threshold(model[0].out_proj, "weight", 0.1)
    tpe.every_other(model[1], "0")
    tpe.every_other(model[3], "a")
    dense = nn.Linear(4, 4)
    tpe.threshold(model[2], "weight", 0.1)
    tpe.load_pruned_state_dict(dense, model[2].state_dict())
    torch.save(model.append(dense), tmp_path / "model.pt")
    assert paths_in(tmp_path / "model.pt") == {*OTHERS, "torchprune_ext.methods.entries.Threshold"} | {
        "torchprune_ext.methods.entries.EveryOther"
    }
    for file in FILES:
        assert paths_in(file) <= PATHS
    for path in OTHERS:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name)


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
