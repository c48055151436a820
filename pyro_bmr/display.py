"""What is shown: tables as plain text and HTML, and a progress bar."""

from __future__ import annotations

from html import escape
from io import StringIO

from rich.console import Console, RichCast
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def render(renderable: RichCast) -> str:
    """Render a table without colours, in lines of up to 100 characters."""
    text = StringIO()
    Console(file=text, width=100, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def render_html(renderable: RichCast) -> str:
    """Render a table for a notebook."""
    return f"<pre>{escape(render(renderable))}</pre>"


def progress_bar(unit: str, wanted: bool = True) -> Progress:
    """Make a progress bar that is gone when it is done; its tasks have a ``note``."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}  {{task.fields[note]}}"),
        TimeRemainingColumn(),
        transient=True,
    )
    bar.disable = not (wanted and (bar.console.is_terminal or bar.console.is_jupyter))
    return bar
