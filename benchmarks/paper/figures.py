"""The figures of the page, from the table of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from tables import ESTIMATORS, METHODS, NAMES, NETWORK, REGRESSION, SIGNALS, loops
from torch.distributions import Normal

from pyro_bmr.mathematics.evidence import delta_f_spike
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.plots.theme import BLUE, GREY, SKY, VERMILION

STYLES = {
    "bmr": {"color": BLUE, "linestyle": "-", "linewidth": 2.0},
    "snr": {"color": VERMILION, "linestyle": "--"},
    "spr": {"color": SKY, "linestyle": "-."},
    "magnitude": {"color": "black", "linestyle": ":"},
    "random": {"color": GREY, "linestyle": (0, (1, 3))},
}
# By estimator.
HUES, MARKERS = (BLUE, VERMILION, SKY), ("o", "s", "^")


def criteria(_results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw what SNR, SPR and ΔF say of a weight, by its posterior mean and variance."""
    loc, scale = np.meshgrid(np.linspace(-1.0, 1.0, 301), np.geomspace(0.02, 1.5, 300))
    posterior = Diagonal(torch.tensor(loc), torch.tensor(scale))
    delta_f = delta_f_spike(posterior, Normal(0.0, 1.0).log_prob(torch.tensor(0.0)))
    maps = {
        "signal-to-noise ratio |μ| / σ": (np.abs(loc) / scale, [0.3, 1, 3, 10, 30]),
        "signal plus robustness |μ| + σ": (np.abs(loc) + scale, [0.1, 0.3, 0.6, 1, 1.5, 2]),
        "ΔF of pruning (nats), prior N(0, 1)": (delta_f.numpy(), [-3, -2, -1, 0, 3, 30, 300]),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, (title, (values, levels)) in zip(axes, maps.items(), strict=True):
        lines = ax.contour(loc, scale, values, levels=levels, colors=[BLUE], linestyles="-")
        ax.clabel(lines, fontsize=8, colors="black", fmt="%g", manual=_LABELS[title.split()[0]])
        ax.set(title=title, xlabel="posterior mean μ", yscale="log")
    axes[-1].contourf(loc, scale, delta_f.numpy() <= 0, levels=[0.5, 1.5], colors=["0.9"])
    axes[0].set_ylabel("posterior standard deviation σ")
    return figure


# Where the contours of each criterion are labelled.
_LABELS = {
    "signal-to-noise": [(0.3, 1.0), (0.6, 0.6), (0.65, 0.217), (0.65, 0.065), (0.75, 0.025)],
    "signal": [(0, 0.1), (0, 0.3), (0, 0.6), (0, 1.0), (0.4, 1.1), (0.75, 1.25)],
    "ΔF": [(0, 0.05), (0, 0.135), (0, 0.368), (0, 1.0), (0.61, 0.2), (0.8, 0.1), (0.74, 0.03)],
}


def boston_methods(results: pd.DataFrame, published: pd.Series) -> Figure:
    """Draw F of Boston against what is pruned, by each method and estimator."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, estimator in zip(axes, ESTIMATORS, strict=True):
        for method in METHODS:
            _draw_curve(ax, _curve(results, "boston", estimator, method), method, NAMES[method])
        for method, percent in product(("bmr", "snr", "spr"), (50, 90)):
            value = published.get(("boston", estimator, f"{method} {percent} %"))
            if value is not None:
                ax.plot(percent, value, "o", color=STYLES[method]["color"], mfc="white")
        ax.plot([], [], "o", color="black", mfc="white", label="the paper's")
        ax.set(title=f"Boston, {estimator}", xlabel="pruned (%)", xlim=(0, 100), ylim=(1400, 2000))
    axes[0].set_ylabel("free energy (nats)")
    _legend_below(figure, axes[0])
    return figure


def boston_prediction(results: pd.DataFrame, published: pd.Series) -> Figure:
    """Draw F of Boston as predicted and as realised."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, estimator in zip(axes, ESTIMATORS, strict=True):
        _draw_prediction(ax, results, "boston", estimator)
        ax.plot(0, published["boston", estimator, "unpruned F"], "o", color="black", mfc="white")
        for percent in (50, 90):
            value = published["boston", estimator, f"bmr {percent} %"]
            ax.plot(percent, value, "o", color=BLUE, mfc="white")
        ax.plot([], [], "o", color=BLUE, mfc="white", label="realised in the paper")
        ax.set(title=f"Boston, {estimator}", xlabel="pruned (%)", ylim=(1400, 1660))
    axes[0].set_ylabel("free energy (nats)")
    _legend_below(figure, axes[0])
    return figure


def predictions(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw F as predicted and as realised, of all data sets."""
    return _grid(results, REGRESSION)


def signals(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw F as predicted and as realised, of the recurrent networks."""
    return _grid(results, SIGNALS)


def iterations(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw how pruning and training in turn goes on where pruning once ends, with ``local``."""
    ours = results[
        (results.experiment == "iterative")
        & results.method.isin(["bmr", "unpruned"])
        & (results.estimator == "local")
    ]
    table = loops(results)
    names = [*REGRESSION, *SIGNALS]
    figure, axes = plt.subplots(3, 4, figsize=(11, 7), layout="constrained")
    for ax, dataset in zip(axes.flat, names, strict=False):
        for seed, rounds in ours[ours.dataset == dataset].groupby("seed"):
            rounds = rounds.sort_values("round")
            once = table.loc[(dataset, "local", seed, -1)]
            ax.plot(rounds["round"], rounds.free_energy, ".-", color=BLUE, alpha=0.7, lw=1)
            ax.plot(1, once["first"], "x", color=VERMILION)
        ax.set_title(dataset, fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[:, 0]:
        ax.set_ylabel("free energy (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("round")
    last = axes.flat[-1]
    last.set_axis_off()
    last.plot([], [], ".-", color=BLUE, label="a network, pruned\nand trained in turn")
    last.plot([], [], "x", color=VERMILION, label="pruned once,\nnot trained again")
    last.legend(loc="center", frameon=False)
    return figure


def rounds(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw the realised against the predicted ΔF of all reductions."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    ours = results[(results.experiment == "iterative") & (results.method == "bmr")]
    for ax, first in zip(axes, (True, False), strict=True):
        mine = ours[(ours["round"] == 1) == first]
        for estimator, color, marker in zip(ESTIMATORS, HUES, MARKERS, strict=True):
            some = mine[mine.estimator == estimator]
            for face, hard in ((color, False), ("none", True)):
                part = some[(some.dataset == "powerplant") == hard]
                name = f"{estimator}, powerplant" if hard else estimator
                line = part.predicted_delta_f, part.realised_delta_f
                ax.plot(*line, marker, color=color, mfc=face, label=name, ls="none", ms=4)
        low = min(mine.predicted_delta_f.min(), -1.0)
        ax.plot([low, 0], [low, 0], color="0.5", lw=1, label="as predicted")
        ax.axhline(0, color="0.8", lw=1, zorder=0)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_yscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter(FuncFormatter(_write_tick))
        ax.yaxis.set_major_formatter(FuncFormatter(_write_tick))
        high = float(mine.predicted_delta_f.max())
        ax.set_xlim(1.5 * low, 0.3 if high > -1 else high / 3)
        title = "first reduction" if first else "later reductions"
        ax.set(title=title, xlabel="predicted ΔF (nats, linear within ±1)")
    axes[0].set_ylabel("realised ΔF (nats, linear within ±1)")
    _legend_below(figure, axes[0], 4)
    return figure


def test_scores(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw what pruning does to the log likelihood of test rows."""
    table = loops(results, "splits").reset_index()
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    looks = zip(ESTIMATORS, HUES, MARKERS, strict=True)
    for offset, (estimator, color, marker) in enumerate(looks, -1):
        for place, dataset in enumerate(REGRESSION):
            mine = table[(table.dataset == dataset) & (table.estimator == estimator)]
            gain = mine.ll_after - mine.ll_before
            point = place + 0.2 * offset, gain.mean(), gain.sem()
            ax.errorbar(*point, fmt=marker, color=color, ms=5)
        if (table.estimator == estimator).any():
            ax.plot([], [], marker, color=color, label=estimator)
    ax.axhline(0, color="0.5", lw=1)
    ax.set_yscale("symlog", linthresh=0.05)
    ax.set_xticks(range(len(REGRESSION)), REGRESSION)
    ax.set_ylabel("change of test log likelihood\n(nats per row, linear within ±0.05)")
    _legend_below(figure, ax)
    return figure


FIGURES: Mapping[str, Callable[[pd.DataFrame, pd.Series], Figure]] = {
    "criteria": criteria,
    "boston-methods": boston_methods,
    "boston-prediction": boston_prediction,
    "predictions": predictions,
    "iterations": iterations,
    "rounds": rounds,
    "signals": signals,
    "test-scores": test_scores,
}


def _curve(results: pd.DataFrame, dataset: str, estimator: str, method: str) -> pd.DataFrame:
    """Return the means over seeds and their standard errors, in steps of one percent."""
    rows = results[
        (results.experiment == "one-shot")
        & (results.dataset == dataset)
        & (results.estimator == estimator)
        & results.method.isin([method, "unpruned"])
    ].copy()
    start = rows[rows.method == "unpruned"].set_index("seed").free_energy
    before = rows.seed.map(start)
    rows["predicted"] = before + rows.predicted_delta_f
    rows["change"] = rows.free_energy - before
    if not (rows.method == method).any():
        return rows[:0]
    seeds = rows[rows.method == method].seed.unique()
    columns = ["free_energy", "predicted", "change", "predicted_delta_f"]
    steps = rows[rows.seed.isin(seeds)].groupby(rows.pruned.round())[columns]
    return steps.mean().join(steps.sem(), rsuffix="_error")


def _draw_curve(
    ax: Axes, curve: pd.DataFrame, method: str, label: str, column: str = "free_energy"
) -> None:
    if len(curve):
        error = curve[f"{column}_error"].fillna(0)
        style = STYLES[method]
        ax.plot(curve.index, curve[column], label=label, **style)
        low, high = curve[column] - error, curve[column] + error
        ax.fill_between(curve.index, low, high, color=style["color"], alpha=0.2, lw=0)


def _draw_prediction(
    ax: Axes,
    results: pd.DataFrame,
    dataset: str,
    estimator: str,
    columns: tuple[str, str] = ("free_energy", "predicted"),
) -> pd.DataFrame:
    """Draw what is realised and what was predicted; return both."""
    realised, predicted = columns
    curve = _curve(results, dataset, estimator, "bmr")
    ax.plot(curve.index, curve[predicted], color=VERMILION, ls="--", label="predicted")
    _draw_curve(ax, curve, "bmr", "realised", realised)
    stop = loops(results).loc[(dataset, estimator)].first_pruned.mean()
    ax.axvline(stop, color="black", lw=1, ls=":", label="where ΔF turns positive")
    ax.set_xlim(0, 100)
    return curve[list(columns)]


def _grid(results: pd.DataFrame, datasets: list[str]) -> Figure:
    """Draw for each data set and estimator how F changes, a row on one scale."""
    figure, axes = plt.subplots(
        *(len(datasets), 3),
        figsize=(10, 1.75 * len(datasets) + 0.7),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    networks = set(results.set_index(NETWORK[:2]).index)
    for row, dataset in zip(axes, datasets, strict=True):
        lowest = -1.0
        for ax, estimator in zip(row, ESTIMATORS, strict=True):
            ax.set_title(f"{dataset}, {estimator}", fontsize=10)
            ax.axhline(0, color=GREY, lw=0.8)
            if (dataset, estimator) in networks:
                columns = ("change", "predicted_delta_f")
                drawn = _draw_prediction(ax, results, dataset, estimator, columns)
                lowest = min(lowest, float(drawn.min().min()))
        row[0].set_ylim(1.1 * lowest, -0.4 * lowest)
    figure.supylabel("change of F (nats)", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("pruned (%)")
    _legend_below(figure, axes[0, 0])
    return figure


def _write_tick(value: float, _place: int) -> str:
    return f"{value:,g}".replace("-", "−")


def _legend_below(figure: Figure, ax: Axes, columns: int = 6) -> None:
    """Name what is drawn in all panels, where it covers nothing."""
    lines, names = ax.get_legend_handles_labels()
    once = dict(zip(names, lines, strict=True))
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(once.values(), once.keys(), **place, fontsize=9, frameon=False)
