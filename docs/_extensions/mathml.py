"""Formulas as MathML, which every current browser draws by itself: no script, no fonts, no network."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def formula(node: nodes.Node, *, as_block: bool) -> str:
    """Return the MathML of a formula; what docutils cannot read is a warning at its line."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except ValueError as error:
        logger.warning("formula %r: %s", node.astext().strip(), error, location=node)
        return ""


def visit_inline(translator: nodes.NodeVisitor, node: nodes.Node) -> None:
    """Write a formula in the text."""
    translator.body.append(formula(node, as_block=False))
    raise nodes.SkipNode


def visit_block(translator: nodes.NodeVisitor, node: nodes.Node) -> None:
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="formula">{formula(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; ``html_math_renderer`` in conf.py chooses it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
