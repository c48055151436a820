"""Mathematics as MathML, which browsers render themselves: no script, no font, no network.

A formula that cannot be converted is a warning, and so an error of the build.
"""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def setup(app):
    """Register the renderer ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def visit_math(writer, node):
    """Write an inline formula."""
    writer.body.append(convert(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(writer, node):
    """Write a formula of its own line."""
    writer.body.append(f'<div class="math">{convert(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def convert(node, *, as_block):
    """Return MathML, or warn."""
    try:
        return tex2mathml(node.astext().strip(), as_block)
    except MathError as error:
        logger.warning("cannot render %s: %s", node.astext(), error, location=node)
        return ""
