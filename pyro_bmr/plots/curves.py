"""The free energy against what is pruned: at a range of sparsities, and round by round."""

from __future__ import annotations

import matplotlib.ticker as ticks
from matplotlib.axes import Axes

from pyro_bmr.plots.canvas import BLUE, GREEN, GREY, SMALL, VERMILION, one_axes, text_color
from pyro_bmr.pruning import Pruning
from pyro_bmr.sparsities import Sparsities


def plot_sparsities(sparsities: Sparsities, ax: Axes | None = None) -> Axes:
    """Draw ΔF against the pruned fraction, as predicted and as realised.

    The axis of ΔF is linear as far as pruning gains, and logarithmic above and below.

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
        label=f"where the evidence stops: {stop.sparsity:.1%}, ΔF = {stop.predicted:+,.1f} nats",
    )
    values = [value for point in rows for value in (point.predicted, point.realised)]
    lowest = min(values)
    linear = abs(lowest) if lowest < 0 else max(1.0, max(values) / 100)
    ax.set_yscale("symlog", linthresh=linear, linscale=2)
    ax.set_ylim(min(1.25 * lowest, -0.1 * linear), max(2 * max(values), 0.3 * linear))
    _label_symlog(ax, linear)
    ax.set(xlabel="pruned (%)", ylabel=f"ΔF (nats), linear within ±{_short(linear)}")
    ax.set_xlim(-2, 102)
    ax.set_title(
        f"full model: F = {sparsities.free_energy:,.1f} ± {sparsities.free_energy_error:.1f} nats",
        loc="left",
    )
    ax.legend(fontsize=SMALL)
    return ax


def plot_rounds(pruning: Pruning, ax: Axes | None = None) -> Axes:
    """Draw the free energy of `prune`, round by round.

    Each round has a point for the free energy after training, and, on the way to it, what its
    reduction was predicted to lead to and what it led to before training.

    Parameters
    ----------
    pruning : Pruning
        What `prune` returned.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        In nats; error bars are two standard errors.

    Raises
    ------
    TypeError
        If it is not what `prune` returned.
    ValueError
        If it has no rounds.

    Examples
    --------
    >>> from pyro_bmr.pruning import Round
    >>> rounds = (Round(0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.1), Round(1, 0.5, -2.0, -1.9, 0.1, 6.0, 0.1))
    >>> plot_rounds(Pruning(None, rounds, 1)).get_ylabel()
    'free energy F (nats)'
    """
    if not isinstance(pruning, Pruning):
        msg = f"got a {type(pruning).__name__}. Expected what pyro_bmr.prune() returned"
        raise TypeError(msg)
    rounds = pruning.rounds
    if not rounds:
        msg = "got a Pruning without rounds. Expected what pyro_bmr.prune() returned"
        raise ValueError(msg)
    ax = one_axes(ax, max(5.5, min(11.0, 2.5 + 0.9 * len(rounds))), 4.0)
    before = [r.free_energy for r in rounds[:-1]]
    later = rounds[1:]
    between = [r.index - 0.5 for r in later]
    after = [f + r.realised for f, r in zip(before, later, strict=True)]
    path_x, path_y = [float(rounds[0].index)], [rounds[0].free_energy]
    for x, y, r in zip(between, after, later, strict=True):
        path_x += [x, r.index]
        path_y += [y, r.free_energy]
    ax.plot(path_x, path_y, color=GREY, linewidth=1, zorder=1)
    ax.plot(
        between,
        [f + r.predicted for f, r in zip(before, later, strict=True)],
        "s",
        color=VERMILION,
        markerfacecolor="none",
        markersize=9,
        label="reduced: predicted",
    )
    errors = [2 * r.realised_error for r in later]
    ax.errorbar(between, after, errors, fmt="^", color=GREEN, capsize=3, label="reduced: realised")
    ax.errorbar(
        [r.index for r in rounds],
        [r.free_energy for r in rounds],
        [2 * r.free_energy_error for r in rounds],
        fmt="o",
        color=BLUE,
        capsize=3,
        label="trained",
    )
    kept = rounds[pruning.kept_round]
    ax.plot(
        [kept.index],
        [kept.free_energy],
        "o",
        color=text_color(),
        markerfacecolor="none",
        markersize=14,
        markeredgewidth=1.6,
        label=f"kept: {kept.sparsity:.1%}, F = {kept.free_energy:,.1f} nats",
    )
    shown = rounds[:: max(1, len(rounds) // 10)]
    ax.set_xticks([r.index for r in shown], [f"{r.index}\n{100 * r.sparsity:.1f}" for r in shown])
    ax.set(xlabel="round, and how much is pruned after it (%)", ylabel="free energy F (nats)")
    ax.set_title("train, reduce, train what remains", loc="left")
    ax.legend(fontsize=SMALL)
    return ax


def _label_symlog(ax: Axes, linear: float) -> None:
    """Ticks of a symlog axis: some in the linear part, and the decades beyond."""
    inside = [-linear, -linear / 2, 0, linear / 2, linear]
    low, high = ax.get_ylim()
    beyond, value = [], 10 * linear
    while value < high:
        beyond.append(value)
        value *= 10
    ax.yaxis.set_major_locator(ticks.FixedLocator([t for t in inside if t >= low] + beyond))
    ax.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: _short(value)))
    ax.yaxis.set_minor_locator(ticks.NullLocator())


def _short(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{float(f'{value:.3g}'):,.0f}"
