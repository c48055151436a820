"""How often predictions come true, against how sure they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.display import a_or_an
from pyro_bmr.plots.canvas import one_axes
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import GREY, LEGEND, SMALL, series_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reliability(comparison: Any, ax: Axes | None = None) -> Axes:
    r"""Draw accuracy against confidence, bin by bin.

    .. math:: \text{ECE} = \sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|

    Parameters
    ----------
    comparison : Comparison
        What `compare` returned for models of classes; or anything with ``calibration``, by name a
        DataFrame with the columns ``confidence``, ``accuracy`` and ``count``.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        The area of a point is the number of predictions in its bin; a line leads from it to where
        it would be calibrated.

    Raises
    ------
    TypeError
        If it has no calibration.
    ValueError
        If there is nothing to draw, or a column is missing.

    References
    ----------
    Guo et al. (2017), "On calibration of modern neural networks", arXiv:1706.04599.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import pandas as pd
    >>> bins = pd.DataFrame({"confidence": [0.6, 0.9], "accuracy": [0.5, 0.9], "count": [10, 30]})
    >>> ax = plot_reliability(SimpleNamespace(calibration={"full": bins}))
    >>> ax.get_legend_handles_labels()[1][0].splitlines()
    ['full: ECE 2.5%', 'of 40 predictions']
    """
    import pandas as pd

    tables = _check(comparison)
    ax = one_axes(ax, 6.6, 4.6)
    largest = max(float(table["count"].max()) for table in tables.values())
    lowest = 1.0
    for (name, table), style in zip(tables.items(), series_styles(), strict=False):
        confidence, accuracy, count = (
            table[column].to_numpy(float) for column in ("confidence", "accuracy", "count")
        )
        error = np.average(np.abs(accuracy - confidence), weights=count)
        color, marker = style["color"], style["marker"]
        ax.vlines(confidence, confidence, accuracy, color=color, linewidth=1, alpha=0.6)
        ax.plot(confidence, accuracy, color=color, linestyle=style["linestyle"], linewidth=1)
        ax.scatter(
            confidence,
            accuracy,
            s=_area(count, largest),
            color=color,
            edgecolor="white",
            linewidth=0.5,
            marker=marker,
            alpha=0.8,
            label=f"{name}: ECE {error:.1%}\nof {count.sum():,.0f} predictions",
            zorder=3,
        )
        lowest = min(lowest, confidence.min(), accuracy.min())
    low = max(0.0, lowest - 0.05)
    ax.plot([low, 1], [low, 1], color=GREY, linestyle=":", label="calibrated", zorder=0)
    limits = (low - 0.02, 1.03)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=limits, ylim=limits)
    ax.set_aspect("equal", anchor="W")
    ax.set_title("how often predictions come true", loc="left")
    _add_legends(ax, largest)
    record(ax, pd.concat(tables, names=["model", None]).reset_index("model"))
    return ax


def _area(count: np.ndarray, largest: float) -> np.ndarray:
    """In square points."""
    return _SMALLEST + 120 * count / largest


_SMALLEST = 12


def _add_legends(ax: Axes, largest: float) -> None:
    """Name the models, and beside the drawing what areas mean, where neither covers anything."""
    from matplotlib.collections import PathCollection

    legend = ax.legend(**LEGEND, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([30])
    ax.add_artist(legend)
    legend.set_clip_on(False)
    decade = 10 ** np.floor(np.log10(largest))
    counts = sorted({1.0, max(1.0, np.floor(largest / decade) * decade), max(1.0, decade / 2)})
    dots = [
        ax.scatter([], [], s=_area(np.array([count]), largest), color=GREY, label=f"{count:,.0f}")
        for count in counts
    ]
    place = {"loc": "lower left", "bbox_to_anchor": (1.02, 0), "labelspacing": 0.8}
    areas = ax.legend(handles=dots, title="predictions in a bin", **LEGEND, **place)
    areas.get_title().set_fontsize(SMALL)


def _check(comparison: Any) -> dict[str, Any]:
    calibration = getattr(comparison, "calibration", None)
    if not isinstance(calibration, Mapping):
        msg = (
            f"got {a_or_an(comparison)} without calibration. Expected what "
            "pyro_bmr.compare() returned for models whose observations are classes"
        )
        raise TypeError(msg)
    tables = {}
    for name, table in calibration.items():
        missing = {"confidence", "accuracy", "count"} - set(table.columns)
        if missing:
            msg = (
                f"the calibration of {name!r} has no column {sorted(missing)}. Expected what "
                "pyro_bmr.compare() returned"
            )
            raise ValueError(msg)
        tables[name] = table[table["count"] > 0]
    if not any(len(table) for table in tables.values()):
        msg = (
            "the comparison has no predictions to draw. Expected models of classes: compare them "
            "with data whose observed site is Categorical or Bernoulli"
        )
        raise ValueError(msg)
    return {name: table for name, table in tables.items() if len(table)}
