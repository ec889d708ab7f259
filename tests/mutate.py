"""Change the package in one place at a time and show which changes no test notices. Not a part of the suite.

    python tests/mutate.py torchprune_ext/compensation/fitting.py --tests tests/test_fitting.py --sample 20

prints each change that the tests survive, with its place. Such a change computes the same (or the same more slowly),
or shows code that nobody needs, or a test that is missing. Hypothesis draws few examples here, so look twice.
"""

import argparse
import ast
import contextlib
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "torchprune_ext"
OPERATORS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, Add Sub, Mult Div, Mod FloorDiv, And Or, BitAnd BitOr"
PAIRS = [pair.split() for pair in OPERATORS.split(", ")]
SWAPPED = {getattr(ast, a): getattr(ast, b) for pair in PAIRS for a, b in (pair, pair[::-1])}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}


def edits(node: ast.AST) -> Iterator[tuple[str, object, int]]:
    """Yield a field of ``node``, another value for it, and the line."""
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            if type(op) in SWAPPED:
                yield "ops", [*node.ops[:place], SWAPPED[type(op)](), *node.ops[place + 1 :]], line
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPPED:
        yield "op", SWAPPED[type(node.op)](), line
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield "operand", ast.UnaryOp(node.op, node.operand), line
    if isinstance(node, ast.If | ast.IfExp):
        yield from (("test", ast.Constant(value), line) for value in (True, False))
    if isinstance(node, ast.comprehension) and node.ifs:
        yield "ifs", [], node.ifs[0].lineno
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value, line
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1 if isinstance(node.value, int) else node.value * 1.01, line
    for field in ("id", "attr"):
        if getattr(node, field, None) in NAMES:
            yield field, NAMES[getattr(node, field)], line
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        for place, statement in enumerate(block if isinstance(block, list) else []):
            called = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if called or isinstance(statement, ast.Raise):
                yield field, [*block[:place], ast.Pass(), *block[place + 1 :]], statement.lineno


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield ``node`` and the nodes below it, but for types and the words of errors."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            words = isinstance(child, ast.JoinedStr) or isinstance(node, ast.Raise)
            if isinstance(child, ast.AST) and not words and field not in ("annotation", "returns"):
                yield from parts(child)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, change and source of all mutants."""
    tree = ast.parse(source)
    before = ast.unparse(tree)
    for node in parts(tree):
        for field, value, line in edits(node):
            old = getattr(node, field)
            setattr(node, field, value)
            after = ast.unparse(tree)
            setattr(node, field, old)
            diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
            yield line, "  ->  ".join(" ".join(text[1:].split()) for text in diff), after


def run(source: str, module: str, tests: list[str], limit: float, log: Path) -> tuple[str, float]:
    """Return what ``tests`` say of ``source`` as ``module``, and the seconds it took, in a process of its own."""
    began, status = time.monotonic(), None
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(ROOT / PACKAGE, Path(place, PACKAGE), ignore=shutil.ignore_patterns("__pycache__"))
        Path(place, module).write_text(source)
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.path.insert(0, place)
            os.environ["PYTHONPATH"] = place
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
        while status is None and time.monotonic() - began < limit:
            time.sleep(0.05)
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what the tests have started
        if status is None:
            os.waitpid(child, 0)
    return {None: "timed out", 0: "survived"}.get(status, "killed"), time.monotonic() - began


def main() -> None:
    """Read the arguments, try the mutants and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="a file of the package, relative to the repository")
    parser.add_argument("--tests", nargs="+", required=True, help="what to run, the likeliest to notice first")
    parser.add_argument("--sample", type=int, help="how many mutants; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="where the output of the last run goes")
    args = parser.parse_args()
    os.environ.update(HYPOTHESIS_PROFILE="quick", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    os.chdir(ROOT)
    import torch  # noqa: F401  # once, and not once in each run

    source = Path(args.module).read_text()
    found = list(mutants(source))
    chosen = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
    came, took = run(ast.unparse(ast.parse(source)), args.module, args.tests, 600, args.log)
    if came != "survived":
        sys.exit(f"The tests fail without a mutation, see --log: {args.log}")
    print(f"{len(chosen)} of {len(found)} mutants; {took:.0f} s without a mutation", flush=True)
    counts: Counter[str] = Counter()
    for line, change, mutant in sorted(chosen):
        came, _ = run(mutant, args.module, args.tests, 3 * took + 10, args.log)
        counts[came] += 1
        if came != "killed":
            print(f"{came}  {args.module}:{line}  {change}", flush=True)
    print(", ".join(f"{count} {came}" for came, count in counts.items()))


if __name__ == "__main__":
    main()
