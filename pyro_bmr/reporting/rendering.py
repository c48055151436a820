"""Rich renderables as plain text."""

from __future__ import annotations

from html import escape
from io import StringIO

from rich.console import Console, RichCast


def render(renderable: RichCast) -> str:
    """Render a table without colours, in lines of up to 100 characters."""
    text = StringIO()
    Console(file=text, width=100, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def render_html(renderable: RichCast) -> str:
    """Render a table for a notebook."""
    return f"<pre>{escape(render(renderable))}</pre>"
