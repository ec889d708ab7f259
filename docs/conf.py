"""Sphinx configuration. The build needs no network: links into other projects are plain URLs."""

import doctest
import re
from typing import Any

from matplotlib.axes import Axes
from mpl_toolkits.mplot3d import Axes3D
from sphinx.application import Sphinx

from torchprune_ext import __version__ as release  # noqa: F401
from torchprune_ext.plots import costs, curves, masks, steps, weights

project = "torchprune_ext"
author = "torchprune_ext contributors"
copyright = f"2026, {author}"

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
# What the annotations of plots mean, which imports matplotlib only when it draws.
for module in (costs, curves, masks, steps, weights):
    vars(module).update(Axes=Axes, Axes3D=Axes3D)

html_theme = "furo"
html_title = "torchprune_ext"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

plot_formats = ["png"]
plot_html_show_formats = False
plot_html_show_source_link = False

# The pages' own examples are `.. doctest::` blocks; those in docstrings are run by pytest.
doctest_test_doctest_blocks = ""
# Unlike the default, these compare the messages of errors too.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.DONT_ACCEPT_TRUE_FOR_1

# Every reference must resolve, except into Python and PyTorch, whose inventories are not here, and private modules.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections\.abc|copy|matplotlib|mpl_toolkits|os|torch|typing_extensions|torchprune_ext\._\w+)\..*"),
    (r"py:class", r"torchprune_ext\.deploy\.\w+\.M"),  # a type variable
]


def label_as_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show the paragraphs ``Shapes: ...``, ``Units: ...`` and ``Source: ...`` as fields, like ``Returns``."""
    labelled = False
    for i, line in enumerate(lines):
        if start := re.match(r"(Shapes|Units|Source): ", line):
            lines[i] = f":{start[1]}: {line[start.end() :]}"
            labelled = True
        elif labelled := labelled and bool(line):
            lines[i] = f"    {line.lstrip()}"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", label_as_field)
