"""Sphinx configuration. Neither the build nor a reader needs a network: links into other projects are plain URLs."""

import doctest
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from mpl_toolkits.mplot3d import Axes3D
from sphinx.application import Sphinx

from torchprune_ext import __version__ as release  # noqa: F401
from torchprune_ext.plots import costs, curves, masks, steps, weights

sys.path.insert(0, str(Path(__file__).parent))  # for _extensions

project = "torchprune_ext"
author = "torchprune_ext contributors"
copyright = f"2026, {author}"

extensions = [
    "_extensions.mathml",
    "_extensions.public_names",
    "matplotlib.sphinxext.plot_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_extensions", "gallery"]  # the gallery's pages are made of its scripts, in auto_gallery
# What the annotations of plots mean, which imports matplotlib only when it draws.
for module in (costs, curves, masks, steps, weights):
    vars(module).update(Axes=Axes, Axes3D=Axes3D)

html_theme = "furo"
html_title = "torchprune_ext"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_math_renderer = "mathml"

# Every script is run by `make docs`, also if it has not changed: what it shows depends on the package.
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "FileNameSortKey",
    "run_stale_examples": True,
    "reset_modules": ("matplotlib", "_extensions.gallery.strict"),
    "reset_modules_order": "both",
    "capture_repr": ("_repr_html_",),
    "image_srcset": ["2x"],
    "backreferences_dir": "auto_gallery/backreferences",
    "doc_module": ("torchprune_ext",),
    "reference_url": {"torchprune_ext": None},
    "remove_config_comments": True,
    "show_signature": False,
    "write_computation_times": False,
    "download_all_examples": False,
}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

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
