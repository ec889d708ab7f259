"""The map of the package is a test."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
from torch.utils._device import _device_constructors

import torchprune_ext

PACKAGE = pathlib.Path(torchprune_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "_checks",
    "_tables",
    "_ranks",
    "criteria",
    "patterns",
    "schedules",
    "_fingerprints",
    "selection",
    "masks",
    "_swaps",
    "_restoring",
    "_obstacles",
    "_readers",
    "_host",
    "_reduction",
    "_layers",
    "_statistics",
    "_loading",
    "_batches",
    "_rehearsal",
    "_runs",
    "_facts",
    "_rules",
    "_products",
    "_tracing",
    "_graph",
    "_rows",
    "_scoring",
    "discovery",
    "lifecycle",
    "deploy.timing",
    "deploy.counting",
    "deploy.compare",
    "deploy.copying",
    "deploy.sparse_layers",
    "deploy.conversion",
    "deploy.csr",
    "deploy.semi_structured",
    "deploy.checkpoint",
    "deploy.zeros",
    "deploy.freezing",
    "deploy.cutting",
    "deploy.checking",
    "deploy.compact",
    "penalties",
    "deploy.container",
    "deploy.encodings",
    "deploy.reading",
    "deploy.slots",
    "deploy.sparse_files",
    "deploy.compact_files",
    "deploy.inspection",
    "methods.base",
    "methods.entries",
    "methods.units",
    "functional",
    "calibration.first_order",
    "calibration.curvature",
    "calibration.forward_only",
    "calibration.at_init",
    "global_pruning.budget",
    "global_pruning.entries",
    "global_pruning.units",
    "global_pruning.channels",
    "global_pruning.nm",
    "global_pruning.zeros",
    "_reordering",
    "permutation",
    "compensation.coroutines",
    "compensation.attributes",
    "compensation.blocks",
    "compensation.batch_norm",
    "compensation.sources",
    "compensation.solvers",
    "compensation.scalings",
    "compensation.residuals",
    "compensation.splitting",
    "compensation.greedy",
    "compensation.streams",
    "compensation.reference",
    "compensation.fitting",
    "compensation.goals",
    "compensation.block_outputs",
    "compensation.by_output",
    "compensation.shares",
    "compensation.unit_budget",
    "compensation.calls",
    "compensation.baseline",
    "compensation.rounds",
    "compensation.descent",
    "compensation.survivors",
    "compensation.block_fitting",
    "compensation.refining",
    "workflow.apportion",
    "workflow.budgets",
    "workflow.targets",
    "workflow.writing",
    "workflow.gradual",
    "workflow.tickets",
    "workflow.soft",
    "workflow.fine_tune",
    "workflow.sensitivity",
    "workflow.least_drop",
    "workflow.allocation",
    "workflow.dense_gradients",
    "workflow.regrowth",
    "workflow.dynamic",
    "reporting.structure",
    "reporting.values",
    "reporting.reading",
    "plots.drawing",
    "plots.masks",
    "plots.weights",
    "plots.curves",
    "plots.costs",
    "plots.steps",
    "integrations.pruning",
    "integrations.lightning",
    "integrations.transformers",
    "__main__",
]  # the map of CONTRIBUTING.md, from the ground up; a package's __init__ stands behind its last module
# _host knows how a module stores masks; the others read the keys of state dicts and of files
KNOW_THE_HOST = {"_host", "_obstacles", "_readers", "compensation.reference", "deploy.checkpoint", "deploy.slots"}
HEAVY = [
    "matplotlib",
    "pandas",
    "torchvision",
    "sklearn",
    "numpy.testing",
    "hypothesis",
    "tqdm",
    "torch._dynamo",
    "lightning",
    "transformers",
]

FACTORIES = {function.__name__ for function in _device_constructors()}  # what follows the default device

MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def name_of(path):
    """Return the name of a module without the package's own, e.g. ``methods.base``; a package's is its folder's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def place(name):
    """Return how high a module stands; a package as high as its last module."""
    places = [place for place, known in enumerate(ORDER) if known == name or known.startswith(f"{name}.")]
    assert places, f"{name} needs a place in the map"
    return places[-1]


def imported(path):
    """Return the modules of our own that a file imports, wherever in the file it does."""
    names, known = set(), {name_of(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            # what is imported from a module is a module itself, or something in that module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("torchprune_ext.") for name in names if name.split(".")[0] == "torchprune_ext"}
    assert "torchprune_ext" not in ours, f"{path.name}: imports the whole package"
    return {name if name in known else name.rpartition(".")[0] for name in ours}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_import_only_from_earlier_modules(path):
    own = name_of(path)
    for other in imported(path):
        inside = path.name == "__init__.py" and other.startswith(f"{own}.")
        assert inside or place(other) < place(own), f"{own} imports {other}, which does not stand below it in the map"
        assert other.partition(".")[0] != own.partition(".")[0] or "." in other, f"{own} imports its own package"


def test_the_map_names_nothing_that_is_not_there():
    assert set(ORDER) == {name_of(path) for path in MODULES if path.name != "__init__.py"}


def test_the_table_for_contributors_is_the_map():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert named == list(dict.fromkeys(name.partition(".")[0] for name in ORDER))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arguments_are_not_checked_by_assert(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) not in KNOW_THE_HOST], ids=name_of)
def test_only_one_file_knows_how_the_host_stores_pruning(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant):  # parts of f-strings too
            assert node.value not in {"_mask", "_orig", "weight_mask", "weight_orig"}, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"_forward_pre_hooks", "_tensor_name", "weight_mask", "weight_orig"}, node.lineno


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_new_tensors_say_on_which_device_they_are(path):
    """Or they land on the user's default device; ``device=None`` says that this is meant."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {
        id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call) and any(k.arg == "device" for k in n.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and node.attr in FACTORIES:
            assert id(node) in told, f"line {node.lineno}: torch.{node.attr} without device="


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


def test_what_is_imported_is_declared():
    declared = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").split("[tool.")[0]
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "torchprune_ext", "mpl_toolkits"}  # the last comes with matplotlib
    assert found > {"torch"}
    for name in found:
        assert re.search(f'"{name.replace("_", "-")}[><=]', declared), f"{name} is imported and not declared"


def test_type_information_ships():
    assert (PACKAGE / "py.typed").is_file()
