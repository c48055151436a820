"""How often predictions come true, against how sure they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.plots.canvas import one_axes
from pyro_bmr.plots.theme import GREY, SMALL, series_styles

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
    >>> ax.get_legend_handles_labels()[1]
    ['full: ECE 2.5%', 'calibrated']
    """
    tables = _check(comparison)
    ax = one_axes(ax, 5.0, 4.6)
    from matplotlib.collections import PathCollection

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
            s=12 + 120 * count / largest,
            color=color,
            marker=marker,
            alpha=0.7,
            label=f"{name}: ECE {error:.1%}",
            zorder=3,
        )
        lowest = min(lowest, confidence.min(), accuracy.min())
    low = max(0.0, lowest - 0.05)
    ax.plot([low, 1], [low, 1], color=GREY, linestyle=":", label="calibrated", zorder=0)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(low, 1.03), ylim=(low, 1.03))
    ax.set_aspect("equal")
    ax.set_title("areas: number of predictions", loc="left")
    legend = ax.legend(fontsize=SMALL)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([30])
    return ax


def _check(comparison: Any) -> dict[str, Any]:
    calibration = getattr(comparison, "calibration", None)
    if not isinstance(calibration, Mapping):
        msg = (
            f"got a {type(comparison).__name__} without calibration. Expected what "
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
