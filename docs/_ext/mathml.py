"""Mathematics as MathML, which browsers render themselves: no script, no font, no network.

A formula that cannot be converted is a warning, and so an error of the build.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# LaTeX takes one digit, the converter takes the number: it would make 12 / x of \tfrac12 x.
AMBIGUOUS = re.compile(r"(frac\s*\d|[\^_]\d\d)")

# Between a function and its argument, unless that stands in brackets.
APPLIED = re.compile(r"<mo>&ApplyFunction;</mo>(?!\s*<mo[^>]*>[(\[])")
SPACE = '<mspace width="0.167em"/>'


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
    formula = node.astext().strip()
    if AMBIGUOUS.search(formula):
        logger.warning("put braces around single digits in %s", formula, location=node)
    try:
        return APPLIED.sub(SPACE, tex2mathml(formula, as_block))
    except MathError as error:
        logger.warning("cannot render %s: %s", formula, error, location=node)
        return ""
