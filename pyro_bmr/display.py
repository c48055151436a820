"""What is shown: tables at the prompt and in notebooks, a progress bar, warnings."""

from __future__ import annotations

import shutil
import sys
import warnings
from abc import ABC, abstractmethod
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console, RenderableType, RichCast
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import pandas as pd


class Tabular(ABC):
    """What shows its numbers as tables: at the prompt, in notebooks, and as a data frame."""

    @abstractmethod
    def summary(self) -> pd.DataFrame:
        """Return the numbers as a data frame."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Return the table that is printed."""

    @abstractmethod
    def _frames(self) -> dict[str, pd.DataFrame]:
        """By title, the tables that a notebook shows."""

    @property
    def _notes(self) -> tuple[str, ...]:
        """What a notebook shows below them."""
        return ()

    def __repr__(self) -> str:
        return _render(self)

    @property
    def _head(self) -> str:
        """HTML that a notebook shows above them."""
        return ""

    def _repr_html_(self) -> str:
        frames = self._frames()
        show = _fold if len(frames) > 1 else _entitle
        tables = [
            show(title, frame, not place) for place, (title, frame) in enumerate(frames.items())
        ]
        notes = [f"<p>{escape_lines(note)}</p>" for note in self._notes]
        return "".join([self._head, *tables, *notes])


def _fold(title: str, frame: pd.DataFrame, opened: bool) -> str:
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape_lines(title)}</summary>{_table(frame)}</details>"


def _entitle(title: str, frame: pd.DataFrame, _opened: bool) -> str:
    return f"<p>{escape_lines(title)}</p>{_table(frame)}"


def _table(frame: pd.DataFrame) -> str:
    if frame.index.nlevels == 1:  # its name in the row of the columns' names
        name, frame = frame.index.name, frame.rename_axis(None)
        frame.columns.name = name
    return f'<div style="overflow-x:auto">{frame.to_html(na_rep="")}</div>'


def _render(renderable: RichCast) -> str:
    """Render a table without colours, as wide as the terminal, in lines of up to 100 characters."""
    text = StringIO()
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    Console(file=text, width=width, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


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


def warn(message: str) -> None:
    """Warn at the line, outside of this package, torch and Pyro, that led here."""
    level, frame = 2, cast(Any, sys._getframe(1))
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_INSIDE = {__name__.partition(".")[0], "contextlib", "functools", "pyro", "torch"}


def escape_lines(text: str) -> str:
    """Escape text for HTML, where lines end as they do in it."""
    return escape(text).replace("\n", "<br>")
