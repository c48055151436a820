"""What figures share: axes, the numbers that were drawn on them, names and signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.arguments.checks import check_kind, read_names
from pyro_bmr.plots.theme import LEGEND, SMALL, THEME, load_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend


def one_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the user's axes, or those of a new figure of this size in inches."""
    plt = load_pyplot()
    if ax is not None:
        check_kind("ax", ax, plt.Axes, "axes to draw on, as of plt.subplots()[1]")
        return ax
    with plt.rc_context(THEME):
        return plt.subplots(figsize=(width, height), layout="constrained")[1]


def two_axes(axes: Any, width: float, height: float, **options: Any) -> np.ndarray:
    """Return the user's pair of axes, or that of a new figure by ``plt.subplots``."""
    return _read_axes(axes, 2, "two axes, as of plt.subplots(2)[1]", width, height, options)


def four_axes(axes: Any, width: float, height: float, **options: Any) -> np.ndarray:
    """Return the user's four axes, or those of a new figure, row by row."""
    expected = "four axes, as of plt.subplots(2, 2)[1]"
    return _read_axes(axes, 4, expected, width, height, {"nrows": 2, "ncols": 2} | options)


def legend_below(ax: Axes, ncols: int, inches: float = 0.48) -> Legend:
    """Add a legend in a row below the label of the axis, where it covers nothing."""
    from matplotlib.transforms import ScaledTranslation

    below = ax.transAxes + ScaledTranslation(0, -inches, ax.figure.dpi_scale_trans)
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": below}
    return ax.legend(**LEGEND, **place, ncols=ncols, columnspacing=1.3, borderaxespad=0)


def write_right(ax: Axes, place: float, text: str, color: Any = None) -> None:
    """Write beside a row, right of what is drawn."""
    ax.annotate(
        text,
        (1, place),
        (8, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
        color=color,
        annotation_clip=False,
    )


def set_rows(ax: Axes, names: Sequence[str], fontsize: float | None = None) -> None:
    """Give each name a row, from the top."""
    ax.set_yticks(range(len(names)), names, fontsize=fontsize)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def read_labels(
    labels: Sequence[str] | None, count: int, what: str, place: str = ""
) -> tuple[str, ...] | None:
    """Read names, so many of them, for a place; None stays None."""
    names = read_names("labels", labels, "names")
    if names is not None and len(names) != count:
        msg = f"got {len(names)} labels{place}. Expected {count}, {what}"
        raise ValueError(msg)
    return names


def signed(value: float) -> str:
    """Write ΔF, in nats, with its sign, a minus as wide as a plus."""
    digits = 2 if abs(value) < 1e5 else 0
    return f"{value:+,.{digits}f}".replace("-", "−")


def _read_axes(
    axes: Any, count: int, expected: str, width: float, height: float, options: dict[str, Any]
) -> np.ndarray:
    plt = load_pyplot()
    if axes is None:
        with plt.rc_context(THEME):
            new = plt.subplots(figsize=(width, height), layout="constrained", **options)[1]
        return new.reshape(-1)
    check_kind("axes", axes, (np.ndarray, list, tuple), expected)
    found = np.asarray(axes, dtype=object).reshape(-1)
    if len(found) != count or not all(isinstance(one, plt.Axes) for one in found):
        msg = f"got axes= with {len(found)} axes. Expected {expected}"
        raise ValueError(msg)
    return found
