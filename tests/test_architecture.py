"""The map of the package is a test."""

import ast
import pathlib
import subprocess
import sys

import pytest

import torchprune_ext

PACKAGE = pathlib.Path(torchprune_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "_checks", "patterns", "criteria", "_ranks", "_coroutines", "selection", "masks", "_solvers", "_host", "_passes",
    "_streams", "_fitting", "calibration", "penalties", "discovery", "scoring", "methods", "functional", "_budget",
    "global_pruning", "lifecycle", "checkpoint", "compensation", "allocation", "schedules", "deploy", "report",
    "plots", "integrations",
]  # fmt: skip
HEAVY = ["matplotlib", "torchvision", "sklearn", "numpy.testing", "hypothesis", "tqdm", "torch._dynamo"]


def unit(path):
    """Return the module or subpackage that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Return the units of our own that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or len(path.relative_to(PACKAGE).parts) > 1, f"{path.name}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "torchprune_ext" else {module}
    ours = [name.split(".") for name in found]
    return {parts[1] if len(parts) > 1 else "" for parts in ours if parts[0] == "torchprune_ext"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_from_earlier_modules(path):
    if path == PACKAGE / "__init__.py":
        return
    assert unit(path) in ORDER, "a new module needs a place in the map"
    earlier = ORDER[: ORDER.index(unit(path))]
    assert imported(path) - {unit(path)} <= set(earlier)
    assert unit(path) not in imported(path) or path.parent != PACKAGE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arguments_are_not_checked_by_assert(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


def test_the_package_is_a_table_of_contents():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    allowed = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign
    assert all(isinstance(node, allowed) for node in tree.body)
    assert len(set(torchprune_ext.__all__)) == len(torchprune_ext.__all__)
    for name in torchprune_ext.__all__:
        assert getattr(torchprune_ext, name).__doc__, name


def test_importing_has_no_side_effects():
    code = f"""
import sys, logging, warnings, torch
from torch.nn.utils import prune
before = set(sys.modules)
state = torch.get_rng_state(), list(warnings.filters), logging.root.handlers[:], torch.get_default_dtype()
native = {{k: v for k, v in vars(prune).items()}}, dict(vars(prune.BasePruningMethod)), dict(vars(torch.nn.Module))
import torchprune_ext
new = {{name for name in set(sys.modules) - before}}
assert not [n for n in new for heavy in {HEAVY!r} if n == heavy or n.startswith(heavy + ".")], sorted(new)
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (list(warnings.filters), logging.root.handlers[:], torch.get_default_dtype())
now = {{k: v for k, v in vars(prune).items()}}, dict(vars(prune.BasePruningMethod)), dict(vars(torch.nn.Module))
assert native == now
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_type_information_ships():
    assert (PACKAGE / "py.typed").is_file()
