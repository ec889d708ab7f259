"""What the README promises is there: files behind its links, calls behind its names, every method in its tables."""

import inspect
import re
from pathlib import Path

import torchprune_ext as tpe
from torchprune_ext import functional, global_pruning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = (tpe, tpe.allocation, tpe.calibration)


def table_below(title):
    """The first cells and the rest of the rows of the first table behind ``title``."""
    rows = re.search(r"\n((?:\|.*\n)+)", README[README.index(title) :]).group(1).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_links_into_the_repository_have_files_behind_them():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_method_is_in_the_table_of_methods():
    named = [name for row in table_below("## One tensor") for name in re.findall(r"`(\w+)`", row[0])]
    functions = [name for name in tpe.__all__ if inspect.isfunction(getattr(tpe, name))]
    own = [name for name in functions if getattr(tpe, name).__module__ == functional.__name__]
    assert sorted(named) == sorted(own)


def test_every_call_of_the_table_of_tasks_exists():
    rows = table_below("## A whole model")
    names = [name for row in rows for name in re.findall(r"`([a-zA-Z_.]+)`", row[1])]
    assert len(names) > 40
    for name in names:
        last = name.rsplit(".", 1)[-1]
        assert any(hasattr(part, last) for part in PARTS) or name.startswith(("integrations.", "torchprune_ext.")), name


def test_every_global_call_is_in_the_table_of_tasks():
    named = {name for row in table_below("## A whole model") for name in re.findall(r"`(global_\w+)`", row[1])}
    assert named == {name for name in global_pruning.__all__ if name.startswith("global_")}


def test_it_stays_short():
    assert len(README.splitlines()) <= 200


def test_the_figures_of_the_picture_are_those_of_the_documentation():
    script = (ROOT / "examples/readme_picture.py").read_text(encoding="utf-8")
    results = script[script.index("RESULTS") : script.index("\ndef ")]
    pages = "".join((ROOT / f"docs/{page}.rst").read_text(encoding="utf-8") for page in ("benchmarks", "compensation"))
    figures = [figure for figure in re.findall(r"\", ([\d.]+)\)", results) if figure != "100"]
    assert len(figures) == 7
    assert [figure for figure in figures if not re.search(rf"\b{re.escape(figure)} %", pages)] == []
