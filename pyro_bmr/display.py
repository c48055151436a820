"""What is shown: tables as plain text and HTML, and a progress bar."""

from __future__ import annotations

from html import escape
from io import StringIO

from rich.console import Console, RichCast
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


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


def progress_bar(unit: str, wanted: bool = True) -> Progress:
    """Make a progress bar that is gone when it is done.

    Parameters
    ----------
    unit : str
        What is counted, in the plural.
    wanted : bool
        Whether to show it; without a terminal or a notebook it is never shown.

    Returns
    -------
    Progress
        A context; its tasks have a ``note``.

    Examples
    --------
    >>> with progress_bar("draws") as bar:
    ...     bar.advance(bar.add_task("measuring", total=1, note=""))
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}  {{task.fields[note]}}"),
        TimeRemainingColumn(),
        transient=True,
    )
    bar.disable = not (wanted and (bar.console.is_terminal or bar.console.is_jupyter))
    return bar
