"""ΔF by site or by layer, and how much of each was pruned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pyro_bmr.arguments.checks import check_choice
from pyro_bmr.plots.canvas import one_axes, set_rows, signed, write_right
from pyro_bmr.plots.posteriors import check_reduction
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, LEGEND, VERMILION, text_color
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_delta_f(result: Reduction, by: str | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw the part of each site, or of each layer of groups, in the joint ΔF, in nats.

    The parts add up to the whole. Sites left whole have no bar but the reason. What was measured on
    data is a diamond.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned, or `load`.
    by : str, optional
        ``"site"`` or ``"layer"``; layers where there are any by default.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        With one horizontal bar per site or layer.

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If there is nothing to draw.

    Examples
    --------
    >>> from pyro_bmr.selection.summaries import SiteSummary
    >>> sites = (SiteSummary("w", (4,), 1, -2.5), SiteSummary("b", (2,), 2, 0.0))
    >>> ax = plot_delta_f(Reduction(None, None, {}, {}, sites))
    >>> [float(bar.get_width()) for bar in ax.patches]
    [-2.5, 0.0]
    """
    rows, by = _list_rows(result, by)
    ax = _make_axes(ax, rows)
    places = range(len(rows))
    values = [row.delta_f for row in rows]
    ax.barh(
        places,
        values,
        color=[VERMILION if value > 0 else BLUE for value in values],
        hatch=["////" if value > 0 else "" for value in values],
        edgecolor=text_color(),
        linewidth=0,
        height=0.62,
    )
    realised = [row.realised for row in rows]
    if any(map(math.isfinite, realised)):
        (points,) = ax.plot(realised, places, "D", color=VERMILION, label="realised")
        points.set(markeredgecolor="white", markersize=7)
        _add_legend(ax)
    ends = [0.0, *values, *filter(math.isfinite, realised)]
    margin = 0.03 * ((max(ends) - min(ends)) or 1.0)
    ax.set_xlim(min(ends) - margin, max(ends) + margin)
    ax.axvline(0, color=text_color(), linewidth=0.8)
    ax.set_xlabel("ΔF (nats); negative is better")
    _label_rows(ax, rows, [row.nats for row in rows], [row.count for row in rows])
    ax.set_title(f"ΔF = {signed(result.delta_f)} nats, {result.sparsity:.1%} pruned", loc="left")
    record(ax, _frame(rows, by))
    return ax


def plot_sites(result: Reduction, by: str | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw how much of each site, or of each layer of groups, is left, beside its part in ΔF.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned, or `load`.
    by : str, optional
        ``"site"`` or ``"layer"``; layers where there are any by default.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        With one bar from 0 to 100 % per site or layer: filled what is kept, hatched what is pruned.

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If there is nothing to draw.

    Examples
    --------
    >>> from pyro_bmr.selection.summaries import SiteSummary
    >>> sites = (SiteSummary("w", (4,), 1, -2.5), SiteSummary("b", (2,), 2, 0.0))
    >>> ax = plot_sites(Reduction(None, None, {}, {}, sites))
    >>> [float(bar.get_width()) for bar in ax.patches[:2]]
    [25.0, 100.0]
    """
    rows, by = _list_rows(result, by)
    rows = [row for row in rows if row.total]
    ax = _make_axes(ax, rows)
    places = range(len(rows))
    kept = [100.0 * (1 - row.pruned / row.total) for row in rows]
    colors = [GREY if row.whole else BLUE for row in rows]
    ax.barh(places, kept, color=colors, height=0.62)
    ax.barh([0], [0], color=BLUE, label="kept")
    gone = [100.0 - one for one in kept]
    bars = ax.barh(places, gone, left=kept, label="pruned", height=0.62, hatch="////")
    for bar in bars:
        bar.set(facecolor="none", edgecolor=GREY, linewidth=0.8)
    _add_legend(ax)
    ax.set(xlim=(0, 100), xlabel="of its elements (%)" if by == "site" else "of its groups (%)")
    counts = [f"{row.total - row.pruned:,} of {row.total:,}{row.what}" for row in rows]
    _label_rows(ax, rows, counts, [f"ΔF {row.nats}" for row in rows])
    ax.set_title(f"{1 - result.sparsity:.1%} of all elements kept", loc="left")
    record(ax, _frame(rows, by))
    return ax


@dataclass(frozen=True)
class _Row:
    name: str
    delta_f: float
    realised: float = math.nan
    pruned: int = 0
    total: int = 0
    what: str = ""
    text: str = ""
    whole: bool = False

    @property
    def nats(self) -> str:
        return signed(self.delta_f)

    @property
    def count(self) -> str:
        if not self.total:
            return ""
        return f"pruned {self.pruned:,} of {self.total:,}{self.what}{self.text}"


# As wide as a digit, so that numbers stand below each other.
_SPACE = "\u2007"


def _list_rows(result: Reduction, by: str | None) -> tuple[list[_Row], str]:
    check_reduction(result)
    if by is None:
        by = "layer" if result.layers else "site"
    lists = {"site": _site_rows, "layer": _layer_rows}
    check_choice("by", by, lists)
    rows = lists[by](result)
    if not rows:
        remedy = "by='site', or groups=units in reduce" if by == "layer" else "a guide with sites"
        msg = f"this result has no {by} to draw. Expected one or more: {remedy}"
        raise ValueError(msg)
    return rows, by


def _site_rows(result: Reduction) -> list[_Row]:
    rows = []
    for site in result.sites:
        whole = site.note.startswith("not reduced")
        shrunk = f", {site.shrunk:,} shrunk" if site.shrunk else ""
        realised = math.nan if whole or site.realised is None else site.realised
        text = _shortened(site.note) if whole else shrunk
        pruned = site.total - site.kept
        rows.append(_Row(site.name, site.delta_f, realised, pruned, site.total, "", text, whole))
    return rows


def _layer_rows(result: Reduction) -> list[_Row]:
    rows = []
    for layer in result.layers:
        pruned, what = layer.groups - layer.kept, f" {layer.kind}s"
        rows.append(_Row(layer.name, layer.delta_f, math.nan, pruned, layer.groups, what))
    rest = result.delta_f - sum(layer.delta_f for layer in result.layers)
    if rows and abs(rest) >= 0.005:
        rows.append(_Row("elements by themselves", rest))
    return rows


def _make_axes(ax: Axes | None, rows: list[_Row]) -> Axes:
    longest = max(len(row.name) for row in rows)
    return one_axes(ax, 6.6 + 0.08 * longest, 1.25 + 0.32 * len(rows))


def _add_legend(ax: Axes) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (1, 1), "ncols": 2, "borderpad": 0.2}
    ax.legend(**LEGEND, **place, columnspacing=1.2, handlelength=1.2)


def _label_rows(ax: Axes, rows: list[_Row], numbers: list[str], others: list[str]) -> None:
    """Write names on the left and two columns on the right, where no bar can be."""
    width = max(map(len, numbers))
    for place, (row, number, other) in enumerate(zip(rows, numbers, others, strict=True)):
        text = row.text if row.whole else f"{number.rjust(width, _SPACE)}   {other}"
        write_right(ax, place, text, GREY if row.whole else None)
    set_rows(ax, [row.name for row in rows])
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        if row.whole:
            label.set_color(GREY)


def _frame(rows: list[_Row], by: str) -> pd.DataFrame:
    import pandas as pd

    columns = ["name", "delta_f", "realised", "pruned", "total"]
    return pd.DataFrame(map(asdict, rows))[columns].set_index("name").rename_axis(by)


def _shortened(note: str, longest: int = 44) -> str:
    return note if len(note) <= longest else f"{note[: longest - 1].rstrip()}…"
