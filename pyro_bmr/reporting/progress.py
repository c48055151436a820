"""A progress bar, where somebody can see it."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


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
