"""The reference: entries under the names that users write, ``torchprune_ext.nm_structured``, wherever the code is.

``.. reference::`` with such names below it, without ``torchprune_ext.`` and one a line, makes a table of them and then
their entries, from their docstrings. A link by any other path, as annotations make them, leads to the entry of the same
object.
"""

import inspect
import pkgutil
from functools import cache
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

PACKAGE = "torchprune_ext"


@cache
def located(name: str) -> Any:
    """Return what ``name`` is in Python, or None."""
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        return None


class Reference(SphinxDirective):
    """A table of names, and an entry for each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table and the entries."""
        names = [line.strip() for line in self.content if line.strip()]
        lines = [f".. currentmodule:: {PACKAGE}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        for name in names:
            if (found := located(f"{PACKAGE}.{name}")) is None:
                raise self.error(f"torchprune_ext has no {name}")
            kind = "class" if inspect.isclass(found) else "function" if callable(found) else "data"
            lines += ["", f".. auto{kind}:: {PACKAGE}.{name}"]
            if kind == "class":
                lines += ["   :members:"]
        return self.parse_content_to_nodes_of(lines)

    def parse_content_to_nodes_of(self, lines: list[str]) -> list[nodes.Node]:
        """Return what ``lines`` of reStructuredText are."""
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.get_source_info()[0]), self.content_offset, node)
        return node.children


def link_by_object(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """Return a link to the entry of the object that a link means, if its name is not an entry's."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"].lstrip("."), env.domains.python_domain
    meant = located(target)
    found = {}
    for name, entry in domain.objects.items():
        code = located(name)
        home = f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', '')}"
        same = callable(meant) and code is meant
        if same or f".{name}".endswith(f".{target}") or f".{home}".endswith(f".{target}"):
            found[entry.docname == node["refdoc"]] = name  # of two with this name, the one on the same page
    if not found:
        return None
    name = found.get(True) or found[False]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive, and look links up that nothing else resolves."""
    app.add_directive("reference", Reference)
    app.connect("missing-reference", link_by_object)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
