"""The documentation's own code: the reference is complete, and a broken site is noticed."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = '<img src="sphx_glr_plot_a_001.png" srcset="sphx_glr_plot_a_001.png, sphx_glr_plot_a_001_2_00x.png 2.00x">'


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_site = load(DOCS / "check_site.py")


def listed():
    """Return the names in the blocks ``.. reference::`` of all pages."""
    text = "\n".join(file.read_text() for file in sorted(DOCS.glob("api/*.rst")))
    blocks = re.findall(r"^\.\. reference::\n\n((?:   .+\n?)+)", text, re.MULTILINE)
    return [name for block in blocks for name in block.split()]


def public(module):
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if callable(value) and (hasattr(module, "__all__") or value.__module__ == module.__name__)
    }


MODULES = [
    "",
    ".allocation",
    ".calibration",
    ".compensation",
    ".criteria",
    ".masks",
    ".methods",
    ".patterns",
    ".plots",
    ".selection",
]


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    entries = [pkgutil.resolve_name(f"torchprune_ext.{name}") for name in listed()]
    named = public(pkgutil.resolve_name(f"torchprune_ext{module}"))
    assert named
    assert [name for name, value in named.items() if value not in entries] == []


def test_the_reference_has_no_name_twice():
    assert [name for name, times in Counter(listed()).items() if times > 1] == []


def site(folder, **pages):
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{text}</body></html>")
    return check_site.problems_of(folder, Counter())


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ('<a href="c.html">', "a.html links to c.html, which is not there"),
        ('<a href="b.html#d">', "a.html links to b.html#d, which has no such anchor"),
        ('<a href="#d">', "a.html links to #d, which has no such anchor"),
        ('<img src="c.png">', "a.html loads c.png, which is not there"),
        ('<img src="a.html" srcset="a.html, c.png 2x">', "a.html loads c.png, which is not there"),
        ('<script src="https://cdn.org/x.js"></script>', "a.html loads https://cdn.org/x.js from outside"),
        ('<link rel="stylesheet" href="//cdn.org/x.css">', "a.html loads //cdn.org/x.css from outside"),
    ],
)
def test_what_is_broken_is_noticed(tmp_path, broken, complaint):
    assert site(tmp_path, a=broken, b="") == [complaint]


def test_what_is_there_is_not_complained_of(tmp_path):
    whole = (
        '<a href="b.html?q=1#c%20d"><a href="https://pytorch.org"><a href="#e"><b id="e"><img src="data:image/png;,">'
    )
    assert site(tmp_path, a=whole, b='<p id="c d">') == []


def test_styles_that_load_from_outside_are_noticed(tmp_path):
    (tmp_path / "x.css").write_text("@import url(https://fonts.org/f.css); p { background: url(data:image/png;,) }")
    assert site(tmp_path, a="") == ["x.css loads https://fonts.org/f.css from outside"]


def test_an_empty_site_is_noticed(tmp_path):
    assert check_site.problems_of(tmp_path, Counter()) == [f"{tmp_path} has no pages"]


def test_a_script_that_has_drawn_nothing_is_noticed(tmp_path):
    (tmp_path / "auto_gallery").mkdir()
    for name, text in {"plot_a": PICTURE, "plot_b": '<img src="sphx_glr_plot_b_thumb.png">'}.items():
        (tmp_path / f"auto_gallery/{name}.html").write_text(text)
    counts = Counter()
    found = check_site.problems_of_gallery(tmp_path, [Path(f"plot_{name}.py") for name in "abc"], counts)
    assert [line.split()[0] for line in found] == ["plot_b.py", "plot_c.py"]
    assert counts["figures drawn by them"] == 1


PROJECT = """
extensions = ["_extensions.mathml", "_extensions.public_names", "sphinx.ext.autosummary"]
html_math_renderer = "mathml"
nitpicky = True
"""


def build(folder, text):
    (folder / "conf.py").write_text(f"import sys\nsys.path.insert(0, {str(DOCS)!r})\n{PROJECT}")
    (folder / "index.rst").write_text(f"Title\n=====\n\n{text}\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(folder), str(folder / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return (folder / "out/index.html").read_text(), run.stderr


def test_formulas_are_mathml_and_names_are_those_that_users_write(tmp_path):
    text = r"""
:math:`|w|` and :func:`torchprune_ext.functional.nm_structured` and :func:`.nm_structured` and :func:`.nothing`

.. math:: \frac{a}{2}

.. math:: \nonsense{a}

.. reference::

   nm_structured
"""
    page, warnings = build(tmp_path, text)
    assert "<mi>w</mi>" in page
    assert "<mfrac>" in page
    assert "mathjax" not in page.lower()
    assert page.count('href="#torchprune_ext.nm_structured"') >= 4  # two links, the table, the entry's own
    assert "index.rst:9: WARNING: formula" in warnings
    assert "reference target not found: nothing" in warnings
    assert "reference target not found: torchprune_ext.functional.nm_structured" not in warnings
