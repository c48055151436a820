"""What is shown: tables at the prompt and in notebooks, a progress bar, warnings."""

from __future__ import annotations

import shutil
import sys
import warnings
from abc import ABC, abstractmethod
from html import escape
from io import StringIO
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from rich import get_console
from rich.console import Console, RenderableType, RichCast
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd


def a_or_an(value: object) -> str:
    """Return the name of its type, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOaeio" else f"a {name}"


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
    words = [column for column in frame if column in _WORDS]
    marked = frame.rename(columns={column: _MARK + column for column in words})
    texts: Any = {_MARK + column: _MARK.__add__ for column in words}
    html = marked.to_html(na_rep="", formatters=texts)
    for cell in ("td", "th"):
        html = html.replace(f"<{cell}>{_MARK}", f'<{cell} style="text-align:left">')
    return f'<div style="overflow-x:auto">{html}</div>'


_WORDS = {"conclusion", "kind", "note", "verdict"}
_MARK = "\x02"  # of a cell that starts at the left


def _render(renderable: RichCast) -> str:
    """Render a table without colours, as wide as the terminal, in lines of up to 100 characters."""
    text = StringIO()
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    Console(file=text, width=width, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def progress_bar(unit: str, wanted: bool = True) -> Progress:
    """Make a progress bar that is gone when it is done; its tasks have a ``note``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}  {{task.fields[note]}}"),
        TimeRemainingColumn(),
    )
    console = get_console()
    kind = _CellProgress if console.is_jupyter else Progress
    shown = wanted and (console.is_terminal or console.is_jupyter)
    # Before rich 14.3 also a bar that is disabled ends a line.
    console = console if shown else Console(quiet=True)
    return kind(*columns, console=console, transient=True, disable=not shown)


class _CellProgress(Progress):
    """A bar of HTML below a cell; rich's own needs ipywidgets, in the kernel and in the server."""

    def start(self) -> None:
        from IPython.display import display

        if not self.disable:
            self._drawn = monotonic()
            self._place = display(_BLANK, raw=True, display_id=True)

    def refresh(self) -> None:
        if not self.disable:
            self._drawn = monotonic()
            self._place.update(_draw_bars(self), raw=True)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._refresh_at_times()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._refresh_at_times()

    def stop(self) -> None:
        if not self.disable:
            self._place.update(_BLANK, raw=True)

    def _refresh_at_times(self) -> None:
        if not self.disable and monotonic() - self._drawn >= _REFRESH:
            self.refresh()


_BLANK = {"text/html": "", "text/plain": ""}
_REFRESH = 0.1  # seconds


def _draw_bars(bars: Progress) -> dict[str, str]:
    lines, html = [], []
    for task in bars.tasks:
        drawn = [column(task) for column in cast(tuple[ProgressColumn, ...], bars.columns)]
        texts = [str(part) for part in drawn if isinstance(part, Text)]
        lines.append(" ".join(texts))
        bar = f'<progress max="{task.total}" value="{task.completed}"></progress>'
        first, *others = map(escape, texts)
        html.append(f"<div>{first} {bar} {' '.join(others)}</div>")
    return {"text/html": "".join(html), "text/plain": "\n".join(lines)}


def warn(message: str) -> None:
    """Warn at the line, outside of this package, torch and Pyro, that led here."""
    level, frame = 2, cast(Any, sys._getframe(1))
    while frame is not None and _is_inside(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def hide_frames(error: BaseException | None) -> None:
    """Let IPython pass over frames inside of this package, torch and Pyro, but for the last."""
    if "IPython" not in sys.modules:
        return
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            if _is_inside(traceback.tb_frame):
                traceback.tb_frame.f_locals["__tracebackhide__"] = True
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__


def _is_inside(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE


_INSIDE = {__name__.partition(".")[0], "contextlib", "functools", "pyro", "torch"}


def escape_lines(text: str) -> str:
    """Escape text for HTML, where lines end as they do in it."""
    return escape(text).replace("\n", "<br>")
