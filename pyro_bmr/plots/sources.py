"""The numbers that a figure was drawn from, as a frame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.plots.theme import load_pyplot

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def data(axes: Any) -> pd.DataFrame:
    """Return what a figure was drawn from.

    Parameters
    ----------
    axes : Axes or sequence of Axes
        What a figure function returned, or one of these.

    Returns
    -------
    DataFrame
        With a row for each bar, point, line or cell; what was drawn last, if several were.

    Raises
    ------
    ValueError
        If none of the figure functions drew there, or several frames are behind these axes, as in
        `plot_models`.

    Examples
    --------
    >>> from pyro_bmr import Reduction
    >>> from pyro_bmr.plots import plot_delta_f
    >>> from pyro_bmr.selection.summaries import SiteSummary
    >>> result = Reduction(None, None, {}, {}, (SiteSummary("w", (4,), 1, -2.5),))
    >>> data(plot_delta_f(result)).loc["w", "delta_f"]
    np.float64(-2.5)
    """
    kind = load_pyplot().Axes
    several = isinstance(axes, np.ndarray | list | tuple)
    parts = list(np.asarray(axes, dtype=object).reshape(-1)) if several else [axes]
    drawn = [part for part in parts if isinstance(part, kind) and part in _DRAWN]
    frames = {id(_DRAWN[part]): _DRAWN[part] for part in drawn}
    if not frames:
        refuse("axes", axes, "what a figure function of pyro_bmr.plots returned")
    if len(frames) > 1:
        msg = f"got {len(parts)} axes with {len(frames)} frames behind them. Expected one of them"
        raise ValueError(msg)
    return next(iter(frames.values())).copy()


def record(axes: Axes | Iterable[Axes], frame: pd.DataFrame) -> None:
    """Remember for as long as the axes live what is drawn on them."""
    for ax in axes if isinstance(axes, Iterable) else [axes]:
        _DRAWN[ax] = frame


_DRAWN: WeakKeyDictionary[Axes, pd.DataFrame] = WeakKeyDictionary()
