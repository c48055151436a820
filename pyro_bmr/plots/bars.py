"""ΔF by site or by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro_bmr.arguments.checks import check_choice
from pyro_bmr.plots.canvas import BLUE, GREY, SMALL, VERMILION, one_axes, signed, text_color
from pyro_bmr.plots.posteriors import check_reduction
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_delta_f(result: Reduction, by: str | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw the part of each site, or of each layer of groups, in the joint ΔF, in nats.

    The parts add up to the whole. Sites left whole have no bar but the reason.

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
    check_reduction(result)
    rows = _list_rows(result, by)
    longest = max(len(row.name) for row in rows)
    ax = one_axes(ax, 6.0 + 0.09 * longest, 1.3 + 0.34 * len(rows))
    places = range(len(rows))
    values = [row.delta_f for row in rows]
    colors = [VERMILION if value > 0 else BLUE for value in values]
    hatches = ["//" if value > 0 else "" for value in values]
    bars = ax.barh(places, values, color=colors, hatch=hatches, height=0.65)
    low, high = min([0.0, *values]), max([0.0, *values])
    for bar, row in zip(bars, rows, strict=True):
        # Text on the side of zero where no bar is.
        right = row.delta_f <= 0
        ax.annotate(
            row.text,
            (0, bar.get_y() + bar.get_height() / 2),
            (5 if right else -5, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=SMALL,
            color=GREY if row.whole else text_color(),
        )
    width = (high - low) or 1.0
    ax.set_xlim(low - (0.9 if high > 0 else 0.05) * width, high + 0.9 * width)
    ax.set_xticks([tick for tick in ax.get_xticks() if low <= tick <= high])
    ax.set_xlim(low - (0.9 if high > 0 else 0.05) * width, high + 0.9 * width)
    ax.axvline(0, color=text_color(), linewidth=0.8)
    ax.set_yticks(places, [row.name for row in rows])
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        if row.whole:
            label.set_color(GREY)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("ΔF (nats); negative is better")
    ax.set_title(
        f"ΔF = {signed(result.delta_f)} nats in all, {result.sparsity:.1%} pruned", loc="left"
    )
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


@dataclass(frozen=True)
class _Row:
    name: str
    delta_f: float
    text: str
    whole: bool = False


def _list_rows(result: Reduction, by: str | None) -> list[_Row]:
    if by is None:
        by = "layer" if result.layers else "site"
    lists = {"site": _site_rows, "layer": _layer_rows}
    check_choice("by", by, lists)
    rows = lists[by](result)
    if not rows:
        remedy = "by='site', or groups=units in reduce" if by == "layer" else "a guide with sites"
        msg = f"this result has no {by} to draw. Expected one or more: {remedy}"
        raise ValueError(msg)
    return rows


def _site_rows(result: Reduction) -> list[_Row]:
    rows = []
    for site in result.sites:
        gone = site.total - site.kept
        whole = site.note.startswith("not reduced")
        shrunk = f", {site.shrunk:,} shrunk" if site.shrunk else ""
        text = f"{signed(site.delta_f)}   {_count(gone, site.total)}{shrunk}"
        rows.append(_Row(site.name, site.delta_f, _shortened(site.note) if whole else text, whole))
    return rows


def _layer_rows(result: Reduction) -> list[_Row]:
    rows = [
        _Row(
            layer.name,
            layer.delta_f,
            f"{signed(layer.delta_f)}   {_count(layer.groups - layer.kept, layer.groups)} "
            f"{layer.kind}s",
        )
        for layer in result.layers
    ]
    rest = result.delta_f - sum(layer.delta_f for layer in result.layers)
    if rows and abs(rest) >= 0.005:
        rows.append(_Row("elements by themselves", rest, signed(rest)))
    return rows


def _count(gone: int, total: int) -> str:
    return f"pruned {gone:,} of {total:,}"


def _shortened(note: str, longest: int = 44) -> str:
    return note if len(note) <= longest else f"{note[: longest - 1].rstrip()}…"
