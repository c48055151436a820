"""Rich renderables as plain text."""

from __future__ import annotations

from html import escape
from io import StringIO

from rich.console import Console, RichCast


def render(renderable: RichCast) -> str:
    """Render a table without colours.

    Parameters
    ----------
    renderable : RichCast
        Has a ``__rich__`` method.

    Returns
    -------
    str
        Lines of up to 100 characters.

    Examples
    --------
    >>> render("plain")
    'plain'
    """
    text = StringIO()
    Console(file=text, width=100, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def render_html(renderable: RichCast) -> str:
    """Render a table for a notebook.

    Parameters
    ----------
    renderable : RichCast
        Has a ``__rich__`` method.

    Returns
    -------
    str
        The lines of `render`, as they are.

    Examples
    --------
    >>> render_html("a < b")
    '<pre>a &lt; b</pre>'
    """
    return f"<pre>{escape(render(renderable))}</pre>"
