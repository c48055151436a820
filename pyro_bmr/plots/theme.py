"""How figures look: colours that differ in hue and in grey, and what new axes are made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro_bmr.extras import import_extra

# The hues of Okabe & Ito (2008), "Color Universal Design", that the colour-blind tell apart, the
# blue darker: lightnesses of 36, 54 and 70 are told apart in grey too.
BLUE, VERMILION, SKY = "#00588C", "#D55E00", "#56B4E9"
GREY = "0.55"

# Small text that can still be read in a notebook.
SMALL = 8.5

# For figures of our own; axes that are given keep the user's style. No colours of text or
# background, so that a dark style stays one.
THEME: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}

LEGEND: dict[str, Any] = {"fontsize": SMALL, "frameon": False}
"""Of legends beside what is drawn; over it they need a frame."""


def text_color() -> Any:
    """Return the colour of text, which stands out from the background in every style."""
    return load_pyplot().rcParams["text.color"]


def load_pyplot() -> Any:
    """Import ``matplotlib.pyplot``, or say how to install it.

    With its backend, which is else loaded when a figure is made: under a theme, after which it
    would not be interactive any more, and notebooks would show no other figure.
    """
    plt = import_extra("matplotlib.pyplot", "matplotlib", "plots", "figures")
    plt.draw_if_interactive()
    return plt


def series_styles() -> Iterator[dict[str, Any]]:
    """Go through styles of series that differ in colour, marker, line and hatch, over and over."""
    while True:
        for color, marker, linestyle, hatch in (
            (VERMILION, "s", "--", "////"),
            (BLUE, "o", "-", ""),
            (SKY, "^", "-.", "...."),
            (text_color(), "D", ":", "xxxx"),
        ):
            yield {"color": color, "marker": marker, "linestyle": linestyle, "hatch": hatch}
