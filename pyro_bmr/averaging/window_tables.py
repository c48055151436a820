"""The most probable models of a window as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from pyro_bmr.averaging.occam_window import Window

if TYPE_CHECKING:
    import pandas as pd

# Of a window, so many models and of each so many absent elements are printed.
_ROWS = 10


def title_window(window: Window) -> str:
    """Say whose models these are, and how probable they are together."""
    names = ", ".join(site.name for site in window.factor.sites)
    many = "the most probable model" if len(window) == 1 else f"the {len(window):,} most probable"
    return f"{names}: {many}, with {window.mass:.1%} of the probability"


def frame_window(window: Window) -> pd.DataFrame:
    """Make a data frame with one row per model, the most probable ones."""
    import pandas as pd

    left, masks = window.factor.kept(), window.masks
    rows = []
    for i in range(min(_ROWS, len(window))):
        absent = [
            f"{name}{index}" if index else name
            for name, mask in masks.items()
            for index in (left[name] & ~mask[i]).nonzero()[: _ROWS + 1].tolist()
        ]
        more = ", ..." if len(absent) > _ROWS else ""
        kept = int(window.kept[i].sum())
        number = float(window.weight[i]), float(window.delta_f[i]), kept
        rows.append((*number, ", ".join(absent[:_ROWS]) + more))
    return pd.DataFrame(rows, columns=["weight", "delta_f", "kept", "absent"])


def draw_window(window: Window) -> Table:
    """Make the table that is printed."""
    table = Table(title=title_window(window), title_justify="left")
    for column in ("weight", "ΔF (nats)", "kept"):
        table.add_column(column, justify="right")
    table.add_column("absent")
    for row in frame_window(window).itertuples():
        table.add_row(f"{row.weight:.1%}", f"{row.delta_f:+.2f}", f"{row.kept:,}", str(row.absent))
    table.caption = note_rest(window)
    return table


def note_rest(window: Window) -> str | None:
    """Say how many are not in the table."""
    rest = len(window) - _ROWS
    return f"and {rest:,} less probable ones" if rest > 0 else None
