"""The free energy against what is pruned: at a range of sparsities, and round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.arguments.checks import check_kind
from pyro_bmr.display import a_or_an
from pyro_bmr.plots.canvas import legend_below, one_axes, signed, two_axes
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, LEGEND, VERMILION, text_color
from pyro_bmr.results import Reduction
from pyro_bmr.selection.summaries import Round
from pyro_bmr.sparsities import Sparsities

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sparsities(sparsities: Sparsities, ax: Axes | None = None) -> Axes:
    """Draw ΔF against the pruned fraction, as predicted and as realised.

    Where ΔF grows far beyond what pruning gains, its axis is logarithmic there.

    Parameters
    ----------
    sparsities : Sparsities
        What `measure_sparsities` returned.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        In nats; error bars are two standard errors.

    Raises
    ------
    ValueError
        If it has no points.

    Examples
    --------
    >>> from pyro_bmr.sparsities import Sparsity
    >>> points = (Sparsity(0.0, 0.0, 0.0, 0.0), Sparsity(1.0, 80.0, 90.0, 2.0))
    >>> stop = Sparsity(0.9, -50.0, -49.0, 1.0)
    >>> plot_sparsities(Sparsities(points, stop, 160.0, 2.0)).get_xlabel()
    'pruned (%)'
    """
    check_kind("sparsities", sparsities, Sparsities, "what measure_sparsities() returned")
    if not sparsities.points:
        msg = "got Sparsities without points. Expected what measure_sparsities() returned"
        raise ValueError(msg)
    ax = one_axes(ax, 6.4, 4.0)
    stop = sparsities.stop
    rows = sorted({*sparsities.points, stop}, key=lambda point: point.sparsity)
    x = [100 * point.sparsity for point in rows]
    realised = [point.realised for point in rows]
    errors = [2 * point.realised_error for point in rows]
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.axvline(100 * stop.sparsity, color=text_color(), linestyle=":", linewidth=1.2, zorder=1)
    ax.errorbar(x, realised, errors, fmt="o-", color=BLUE, capsize=3, label="realised (± 2 s.e.)")
    ax.plot(
        x,
        [point.predicted for point in rows],
        "s--",
        color=VERMILION,
        markerfacecolor="none",
        markersize=7,
        label="predicted",
    )
    ax.plot(
        [100 * stop.sparsity],
        [stop.predicted],
        "*",
        color=text_color(),
        markersize=12,
        zorder=4,
        label=f"where the evidence stops: {stop.sparsity:.1%}, ΔF = {signed(stop.predicted)} nats",
    )
    values = [value for point in rows for value in (point.predicted, point.realised)]
    lowest, highest = min(0.0, *values), max(0.0, *values)
    note = ""
    if highest > max(20.0, -4 * lowest):
        linear = _round_up(max(-lowest or highest / 100, highest / 1e6))
        ax.set_yscale("symlog", linthresh=linear, linscale=2)
        ax.set_ylim(min(1.25 * lowest, -0.1 * linear), 2 * highest)
        _label_symlog(ax, linear)
        note = f", linear within ±{linear:,g}"
    ax.set(xlabel="pruned (%)", ylabel=f"ΔF (nats){note}")
    _stretch(ax, [point.sparsity for point in rows])
    ax.set_title(
        f"full model: F = {sparsities.free_energy:,.1f} ± {sparsities.free_energy_error:.1f} nats",
        loc="left",
    )
    legend_below(ax, 3)
    record(ax, sparsities.summary())
    return ax


def plot_rounds(result: Reduction, axes: Any = None) -> np.ndarray:
    """Draw the free energy of `prune` round by round, and what its reductions did.

    Parameters
    ----------
    result : Reduction
        What `prune` returned.
    axes : sequence of Axes, optional
        A pair to draw on; of a new figure otherwise.

    Returns
    -------
    ndarray of Axes
        How far the free energy after the training of each round is above that of the round that was
        kept, and ΔF of its reduction before that, as predicted and as realised. In nats, where they
        differ much in logarithms beyond ±1; error bars are two standard errors.

    Raises
    ------
    TypeError
        If it is not what `prune` returned.
    ValueError
        If it has no rounds.

    Examples
    --------
    >>> first = Round(0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.1)
    >>> second = Round(1, 0.5, -2.0, -1.9, 0.1, 6.0, 0.1, kept=True)
    >>> result = Reduction(None, None, {}, {}, (), rounds=(first, second))
    >>> energies, changes = plot_rounds(result)
    >>> [float(y) for y in energies.lines[1].get_ydata()]
    [3.0, 0.0]
    """
    import pandas as pd

    if not isinstance(result, Reduction):
        msg = f"got {a_or_an(result)}. Expected what pyro_bmr.prune() returned"
        raise TypeError(msg)
    rounds, kept = result.rounds, result.kept_round
    if kept is None:
        msg = "got a result without rounds. Expected what pyro_bmr.prune() returned"
        raise ValueError(msg)
    width = max(5.5, min(10.0, 2.5 + 0.7 * len(rounds)))
    axes = two_axes(axes, width, 5.0, nrows=2, sharex=True)
    _draw_energies(axes[0], rounds, kept)
    _draw_changes(axes[1], rounds[1:])
    shown = rounds[:: len(rounds) // 12 + 1]
    ticks = [r.index for r in shown]
    record(axes, pd.DataFrame(map(asdict, rounds)).set_index("index").rename_axis("round"))
    axes[1].set_xticks(ticks, [f"{r.index}\n{100 * r.sparsity:.1f}" for r in shown])
    axes[1].set_xlabel("round, and how much is pruned by then (%)")
    return axes


def _draw_energies(ax: Axes, rounds: Sequence[Round], kept: Round) -> None:
    """Draw F above that of the round that was kept, so that late rounds can be told apart."""
    above = [r.free_energy - kept.free_energy for r in rounds]
    errors = [2 * r.free_energy_error for r in rounds]
    index = [r.index for r in rounds]
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.errorbar(index, above, errors, fmt="o-", color=BLUE, capsize=3)
    (circle,) = ax.plot([kept.index], [0.0], "o", color=text_color(), markerfacecolor="none")
    circle.set(markersize=13, markeredgewidth=1.6)
    circle.set_label(f"kept: {kept.sparsity:.1%} pruned, F = {kept.free_energy:,.1f} nats")
    ends = [v + s * e for v, e in zip(above, errors, strict=True) for s in (-1, 1)]
    ax.set_ylabel(f"nats{_scale_symlog(ax, ends)}")
    ax.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    ax.set_title("F after training, above the kept", loc="left")


def _draw_changes(ax: Axes, rounds: Sequence[Round]) -> None:
    index = [r.index for r in rounds]
    predicted, realised = [r.predicted for r in rounds], [r.realised for r in rounds]
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.plot(
        index,
        predicted,
        "s",
        color=VERMILION,
        markerfacecolor="none",
        markersize=9,
        label="predicted",
    )
    errors = [2 * r.realised_error for r in rounds]
    ax.errorbar(index, realised, errors, fmt="o", color=BLUE, capsize=3, label="realised")
    ax.set_ylabel(f"nats{_scale_symlog(ax, [*predicted, *realised])}")
    ax.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    ax.set_title("ΔF of the reduction before it", loc="left")


def _scale_symlog(ax: Axes, values: Sequence[float]) -> str:
    """Make large values small, and those within ±1 linear; return how to say so."""
    if max(map(abs, values), default=0.0) <= 20:
        return ""
    ax.set_yscale("symlog", linthresh=1)
    low, high = min(values), max(values)
    ax.set_ylim(2 * min(low, -0.75), 2 * max(high, 0.75))
    _label_symlog(ax, 1.0)
    return ", linear within ±1"


def _stretch(ax: Axes, sparsities: Sequence[float]) -> None:
    """Give the last percents room where many points are: what is kept in logarithms."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if np.median(sparsities) < 0.75:
        ax.set_xlim(-2, 102)
        return
    least = 100 * min((1 - one for one in sparsities if one < 1), default=0.1)

    def forward(percent: np.ndarray) -> np.ndarray:
        return -np.log(np.maximum(100 - percent, 0) + 0.5 * least)

    def backward(place: np.ndarray) -> np.ndarray:
        return 100 + 0.5 * least - np.exp(-place)

    ax.set_xscale("function", functions=(forward, backward))
    ticks = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]
    shown = [tick for tick in ticks if 100 - tick >= 1.5 * least]
    ax.xaxis.set_major_locator(FixedLocator([*shown, 100]))
    ax.xaxis.set_major_formatter(FuncFormatter(_write_tick))
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = forward(np.array([0.0, 100.0]))
    margin = 0.03 * (high - low)
    ax.set_xlim(float(backward(low - margin)), 100 + 0.1 * least)


def _label_symlog(ax: Axes, linear: float) -> None:
    """Ticks of a symlog axis: some in the linear part, and decades beyond, not too many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = ax.get_ylim()
    decades = [linear * 10**power for power in range(16) if linear * 10**power < max(-low, high)]
    decades = decades[:: len(decades) // 6 + 1]
    inside = [-linear / 2, 0, linear / 2] if -low < 10 * linear else [0]
    shown = sorted(t for t in [*(-t for t in decades), *inside, *decades] if low <= t <= high)
    ax.yaxis.set_major_locator(FixedLocator(shown))
    ax.yaxis.set_major_formatter(FuncFormatter(_write_tick))
    ax.yaxis.set_minor_locator(NullLocator())


def _write_tick(value: float, _: Any) -> str:
    if abs(value) >= 1e6:
        return f"{value:.0e}".replace("-", "−").replace("e+0", "e")
    return f"{value:,g}".replace("-", "−")


def _round_up(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next((decade * step for step in steps if decade * step >= value), 10 * decade)
