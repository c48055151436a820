"""What figures share: axes, colours that the colour-blind tell apart, and markers for print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.arguments.checks import check_kind, read_names
from pyro_bmr.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), "Color Universal Design": those that also stand out from black and white.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "0.6"

# Small text that can still be read in a notebook.
SMALL = 8.5


def one_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the user's axes, or those of a new figure of this size in inches."""
    plt = load_pyplot()
    if ax is not None:
        check_kind("ax", ax, plt.Axes, "axes to draw on, as of plt.subplots()[1]")
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def two_axes(axes: Any, width: float, height: float, **options: Any) -> np.ndarray:
    """Return the user's pair of axes, or that of a new figure by ``plt.subplots``."""
    return _read_axes(axes, 2, "two axes, as of plt.subplots(2)[1]", width, height, options)


def four_axes(axes: Any, width: float, height: float, **options: Any) -> np.ndarray:
    """Return the user's four axes, or those of a new figure, row by row."""
    expected = "four axes, as of plt.subplots(2, 2)[1]"
    return _read_axes(axes, 4, expected, width, height, {"nrows": 2, "ncols": 2} | options)


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
        new = plt.subplots(figsize=(width, height), layout="constrained", **options)[1]
        return new.reshape(-1)
    check_kind("axes", axes, (np.ndarray, list, tuple), expected)
    found = np.asarray(axes, dtype=object).reshape(-1)
    if len(found) != count or not all(isinstance(one, plt.Axes) for one in found):
        msg = f"got axes= with {len(found)} axes. Expected {expected}"
        raise ValueError(msg)
    return found


def text_color() -> Any:
    """Return the colour of text, which stands out from the background in every style."""
    return load_pyplot().rcParams["text.color"]


def load_pyplot() -> Any:
    """Import ``matplotlib.pyplot``, or say how to install it."""
    return import_extra("matplotlib.pyplot", "matplotlib", "plots", "figures")


def series_styles() -> Iterator[dict[str, Any]]:
    """Go through styles of series that differ in colour, marker and line, over and over."""
    while True:
        for color, marker, linestyle in (
            (VERMILION, "s", "--"),
            (BLUE, "o", "-"),
            (GREEN, "^", "-."),
            (PURPLE, "D", ":"),
        ):
            yield {"color": color, "marker": marker, "linestyle": linestyle}
