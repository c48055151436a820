"""Named models: their evidence and probabilities, and what they say of each element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.arguments.checks import check_kind, read_number
from pyro_bmr.averaging.compared_models import ModelComparison
from pyro_bmr.plots.canvas import four_axes, signed
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, SMALL, VERMILION, text_color

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_models(
    comparison: ModelComparison,
    model: str | None = None,
    mass: float = 0.9,
    axes: Any = None,
) -> np.ndarray:
    r"""Draw the log evidence and the probability of models, and what they say of each element.

    Four panels, as in SPM: :math:`-\Delta F` of each model, in nats, against the full one; how
    probable it is; the posterior mean of each element with its interval, in the full model and on
    average; how probable it is that it is present. Of more than 30 models the most probable ones
    are drawn, of more than 60 elements those that models differ in and that are the largest against
    their standard deviation.

    Parameters
    ----------
    comparison : ModelComparison
        What `compare_models` returned, or what is within a family of it.
    model : str, optional
        To draw in place of the average.
    mass : float
        The probability inside of an interval.
    axes : sequence of Axes, optional
        Four to draw on, row by row; of a new figure otherwise.

    Returns
    -------
    ndarray
        Four Axes.

    Raises
    ------
    TypeError
        If ``comparison`` is not one of models.
    ValueError
        If there is no such model, or ``mass`` is not between 0 and 1.

    Examples
    --------
    >>> from pyro_bmr import Posterior, compare_models
    >>> q = Posterior([0.1, 2.0], scale=[0.5, 0.5], prior_scale=1.0, names=["A(1,2)", "A(2,1)"])
    >>> found = compare_models(q, {"full": {}, "forward": {"A(1,2)": False}})
    >>> [label.get_text() for label in plot_models(found)[2].get_yticklabels()]
    ['A(1,2)', 'A(2,1)']
    """
    expected = "what pyro_bmr.compare_models() returned"
    check_kind("comparison", comparison, ModelComparison, expected)
    told = "a probability between 0 and 1 and neither of them"
    mass = read_number("mass", mass, lambda part: 0 < part < 1, told)
    models = _list_models(comparison)
    elements = _list_elements(comparison, model, mass)
    rows = len(models), max(1, len(elements))
    drawn = four_axes(
        axes,
        10.0,
        2.2 + _ROW * sum(rows),
        height_ratios=[row + _AROUND for row in rows],
        width_ratios=[1.5, 1.0],
    )
    evidence, probability, moments, presence = drawn
    _draw_evidence(evidence, models, len(comparison))
    _draw_probability(probability, models, comparison)
    _draw_moments(moments, elements, model, mass, len(comparison.elements))
    _draw_presence(presence, elements)
    record(drawn[:2], models)
    record(drawn[2:], elements.drop(columns="reach"))
    return drawn


# Rows that are drawn, and the height of one in inches; and of titles and axes, in rows.
_MODELS, _ELEMENTS = 30, 60
_ROW, _AROUND = 0.22, 3.0
# Nats below the best from which on a model has no bar, letters at which a name is cut, and the
# least probability that is written.
_WORST, _LONGEST, _SMALLEST = 25.0, 34, 0.005


def _list_models(comparison: ModelComparison) -> pd.DataFrame:
    """List the models in their order, or if there are too many, the most probable ones first."""
    frame = comparison.summary()
    few = len(frame) <= _MODELS
    frame = frame.loc[list(comparison.names)] if few else frame.head(_MODELS)
    return frame.assign(evidence=0.0 - frame["delta_f"])


def _list_elements(comparison: ModelComparison, model: str | None, mass: float) -> pd.DataFrame:
    from scipy.stats import norm

    frame = comparison.parameters(model)
    reach = norm.ppf((1 + mass) / 2)
    if model is None:
        low, high = comparison.flatten(comparison.interval(mass)).cpu().numpy()
    else:
        low, high = (frame["mean"] + side * reach * frame["sd"] for side in (-1, 1))
    frame = frame.assign(low=low, high=high, reach=reach * frame["full sd"])
    if len(frame) <= _ELEMENTS:
        return frame
    kept = comparison.flatten(comparison.kept)
    differs = (kept.any(0) & ~kept.all(0)).cpu().numpy()
    size = (frame["full mean"].abs() / frame["full sd"].clip(lower=1e-300)).to_numpy()
    order = np.lexsort((-size, ~differs))[:_ELEMENTS]
    return frame.iloc[np.sort(order)]


def _draw_evidence(ax: Axes, models: pd.DataFrame, total: int) -> None:
    evidence = models["evidence"].to_numpy()
    best = evidence.max()
    least = max(evidence.min(), best - _WORST)
    span = (best - least) or 1.0
    start = least - 0.05 * span
    places = _set_rows(ax, models.index)
    lengths = np.clip(evidence - start, 0, None)
    ax.barh(places, lengths, left=start, color=BLUE, height=0.65)
    for place, value, length in zip(places, evidence, lengths, strict=True):
        # What rounds to zero has no minus.
        text = signed(round(value, 2) + 0.0) if np.isfinite(value) else "−∞"
        _write(ax, text if length else f"◂ {text}", start + length, place)
    ax.set_xlim(start, best + 0.25 * span)
    if start < 0 < best + 0.25 * span:
        ax.axvline(0, color=GREY, linestyle=":", linewidth=1.0, zorder=0)
    ax.set_xlabel("−ΔF (nats); the full model has 0")
    shown = f", best {len(models)} of {total:,} models" if len(models) < total else ""
    ax.set_title(f"log evidence{shown}", loc="left")


def _draw_probability(ax: Axes, models: pd.DataFrame, comparison: ModelComparison) -> None:
    _draw_bars(ax, models["probability"])
    ax.set_title("P(model)", loc="left")
    rest = 1 - float(models["probability"].sum())
    more = f"; {rest:.2f} in those not shown" if len(models) < len(comparison) else ""
    found = comparison.family_probability
    families = [
        f"best of {partition}: {_shorten(family)} {found[partition][family]:.2f}"
        for partition, family in comparison.best_family.items()
    ]
    ax.set_xlabel("\n".join([f"probability{more}", *families]))


def _draw_moments(
    ax: Axes, elements: pd.DataFrame, model: str | None, mass: float, total: int
) -> None:
    places = _set_rows(ax, elements.index)
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    full = ax.errorbar(
        elements["full mean"],
        places - 0.16,
        xerr=elements["reach"],
        fmt="s",
        color=VERMILION,
        markerfacecolor="none",
        markersize=4,
        linewidth=1.0,
        label="full model",
    )
    # Of a skewed mixture the mean may be outside of its interval.
    mean, low, high = (elements[name].to_numpy() for name in ("mean", "low", "high"))
    ax.hlines(places + 0.16, low, high, color=BLUE, linewidth=2.0)
    label = "average over models" if model is None else model
    (dots,) = ax.plot(mean, places + 0.16, "o", color=BLUE, markersize=4.5, label=label)
    shown = f": {len(elements)} of {total:,}" if len(elements) < total else ""
    ax.set_title(f"elements{shown}", loc="left")
    ax.set_xlabel(f"posterior mean, {mass:.0%} interval")
    ax.legend(
        handles=[full, dots],
        fontsize=SMALL,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        borderpad=0,
        frameon=False,
    )


def _draw_presence(ax: Axes, elements: pd.DataFrame) -> None:
    _draw_bars(ax, elements["presence"])
    ax.axvline(0.5, color=text_color(), linestyle=":", linewidth=1.0)
    ax.set_title("P(present)", loc="left")
    ax.set_xlabel("probability")


def _draw_bars(ax: Axes, values: pd.Series[float]) -> None:
    """Draw probabilities, each with its number if that does not round to zero."""
    places = _set_rows(ax, values.index, named=False)
    ax.barh(places, values, color=BLUE, height=0.65)
    for place, value in zip(places, values, strict=True):
        if value >= _SMALLEST:
            _write(ax, f"{value:.2f}", value, place)
    ax.set_xlim(0, 1.14)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _set_rows(ax: Axes, names: Iterable[Any], named: bool = True) -> np.ndarray:
    """Give each name a row, from the top."""
    labels = [_shorten(name) if named else "" for name in names]
    places = np.arange(len(labels))
    ax.set_yticks(places, labels, fontsize=SMALL)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return places


def _write(ax: Axes, text: str, x: float, y: float) -> None:
    ax.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=SMALL)


def _shorten(name: Any) -> str:
    text = str(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
