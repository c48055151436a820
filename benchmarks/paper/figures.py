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
from matplotlib.ticker import MaxNLocator
from tables import ESTIMATORS, METHODS, NAMES, NETWORK, REGRESSION, SIGNALS, loops
from torch.distributions import Normal

from pyro_bmr.mathematics.evidence import delta_f_spike
from pyro_bmr.mathematics.gaussian import Diagonal

COLORS = {
    "bmr": "#1b6ca8",
    "snr": "#d1495b",
    "spr": "#edae49",
    "magnitude": "#66a182",
    "random": "0.6",
}

HUES = ("#1b6ca8", "#d1495b", "#edae49")


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
        lines = ax.contour(loc, scale, values, levels=levels, cmap="cividis", vmax=levels[-1] * 2)
        ax.clabel(lines, fontsize=8, colors="black")
        ax.set(title=title, xlabel="posterior mean μ", yscale="log")
    axes[-1].contourf(loc, scale, delta_f.numpy() <= 0, levels=[0.5, 1.5], colors=["0.9"])
    axes[0].set_ylabel("posterior standard deviation σ")
    return figure


def boston_methods(results: pd.DataFrame, published: pd.Series) -> Figure:
    """Draw F of Boston against what is pruned, by each method and estimator."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, estimator in zip(axes, ESTIMATORS, strict=True):
        for method in METHODS:
            _draw_curve(
                ax, _curve(results, "boston", estimator, method), COLORS[method], NAMES[method]
            )
        for method, percent in product(("bmr", "snr", "spr"), (50, 90)):
            value = published.get(("boston", estimator, f"{method} {percent} %"))
            if value is not None:
                ax.plot(percent, value, "o", color=COLORS[method], mfc="white")
        ax.plot([], [], "o", color="black", mfc="white", label="the paper's")
        ax.set(title=f"Boston, {estimator}", xlabel="pruned (%)", xlim=(0, 100), ylim=(1400, 2000))
    axes[0].set_ylabel("free energy (nats)")
    axes[0].legend(fontsize=8)
    return figure


def boston_prediction(results: pd.DataFrame, published: pd.Series) -> Figure:
    """Draw F of Boston as predicted and as realised."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, estimator in zip(axes, ESTIMATORS, strict=True):
        _draw_prediction(ax, results, "boston", estimator)
        ax.plot(0, published["boston", estimator, "unpruned F"], "o", color="black", mfc="white")
        for percent in (50, 90):
            value = published["boston", estimator, f"bmr {percent} %"]
            ax.plot(percent, value, "o", color=COLORS["bmr"], mfc="white")
        ax.plot([], [], "o", color=COLORS["bmr"], mfc="white", label="realised in the paper")
        ax.set(title=f"Boston, {estimator}", ylim=(1400, 1660))
    axes[0].set_ylabel("free energy (nats)")
    axes[0].legend(fontsize=8)
    return figure


def predictions(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw F as predicted and as realised, of all data sets."""
    return _grid(
        results, REGRESSION, lambda ax, name, est: _draw_prediction(ax, results, name, est)
    )


def signals(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw F as predicted and as realised, of the recurrent networks."""
    return _grid(results, SIGNALS, lambda ax, name, est: _draw_prediction(ax, results, name, est))


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
            ax.plot(rounds["round"], rounds.free_energy, ".-", color=COLORS["bmr"], alpha=0.7, lw=1)
            ax.plot(1, once["first"], "x", color=COLORS["snr"])
        ax.set_title(dataset, fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[:, 0]:
        ax.set_ylabel("free energy (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("round")
    last = axes.flat[-1]
    last.set_axis_off()
    last.plot([], [], ".-", color=COLORS["bmr"], label="a network, pruned\nand trained in turn")
    last.plot([], [], "x", color=COLORS["snr"], label="pruned once,\nnot trained again")
    last.legend(loc="center", frameon=False)
    return figure


def rounds(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw the realised against the predicted ΔF of all reductions."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    ours = results[(results.experiment == "iterative") & (results.method == "bmr")]
    for ax, first in zip(axes, (True, False), strict=True):
        mine = ours[(ours["round"] == 1) == first]
        for estimator, color in zip(ESTIMATORS, HUES, strict=True):
            some = mine[mine.estimator == estimator]
            for marker, hard in ((".", False), ("x", True)):
                part = some[(some.dataset == "powerplant") == hard]
                name = f"{estimator}, powerplant" if hard else estimator
                line = part.predicted_delta_f, part.realised_delta_f
                ax.plot(*line, marker, color=color, label=name, ls="none", ms=5)
        low = min(mine.predicted_delta_f.min(), -1.0)
        ax.plot([low, 0], [low, 0], color="0.5", lw=1, label="as predicted")
        ax.axhline(0, color="0.8", lw=1, zorder=0)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_yscale("symlog", linthresh=1)
        title = "first reduction" if first else "later reductions"
        ax.set(title=title, xlabel="predicted ΔF (nats, linear within ±1)")
    axes[0].set_ylabel("realised ΔF (nats)")
    axes[0].legend(fontsize=8)
    return figure


def test_scores(results: pd.DataFrame, _published: pd.Series) -> Figure:
    """Draw what pruning does to the log likelihood of test rows."""
    table = loops(results, "splits").reset_index()
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for offset, (estimator, color) in enumerate(zip(ESTIMATORS, HUES, strict=True), -1):
        for place, dataset in enumerate(REGRESSION):
            mine = table[(table.dataset == dataset) & (table.estimator == estimator)]
            gain = mine.ll_after - mine.ll_before
            ax.errorbar(place + 0.2 * offset, gain.mean(), gain.sem(), fmt="o", color=color, ms=4)
        if (table.estimator == estimator).any():
            ax.plot([], [], "o", color=color, label=estimator)
    ax.axhline(0, color="0.5", lw=1)
    ax.set_yscale("symlog", linthresh=0.05)
    ax.set_xticks(range(len(REGRESSION)), REGRESSION)
    ax.set_ylabel("change of test log likelihood\n(nats per row, linear within ±0.05)")
    ax.legend(fontsize=8)
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
    rows["predicted"] = rows.seed.map(start) + rows.predicted_delta_f
    if not (rows.method == method).any():
        return rows[:0]
    seeds = rows[rows.method == method].seed.unique()
    steps = rows[rows.seed.isin(seeds)].groupby(rows.pruned.round())[["free_energy", "predicted"]]
    return steps.mean().join(steps.sem(), rsuffix="_error")


def _draw_curve(ax: Axes, curve: pd.DataFrame, color: str, label: str) -> None:
    if len(curve):
        error = curve.free_energy_error.fillna(0)
        ax.plot(curve.index, curve.free_energy, color=color, label=label)
        ax.fill_between(
            curve.index,
            curve.free_energy - error,
            curve.free_energy + error,
            color=color,
            alpha=0.2,
            lw=0,
        )


def _draw_prediction(ax: Axes, results: pd.DataFrame, dataset: str, estimator: str) -> None:
    curve = _curve(results, dataset, estimator, "bmr")
    if len(curve) == 0:
        return
    ax.plot(curve.index, curve.predicted, color=COLORS["snr"], ls="--", label="predicted")
    _draw_curve(ax, curve, COLORS["bmr"], "realised")
    table = loops(results)
    stop = table.loc[(dataset, estimator)].first_pruned.mean()
    ax.axvline(stop, color="black", lw=1, ls=":", label="where ΔF turns positive")
    values = pd.concat([curve.free_energy, curve.predicted])
    low, start = values.min(), curve.free_energy.iloc[0]
    ax.set(xlabel="pruned (%)", xlim=(0, 100))
    ax.set_ylim(low - 0.1 * (start - low), start + 0.3 * (start - low))


def _grid(
    results: pd.DataFrame, datasets: list[str], draw: Callable[[Axes, str, str], None]
) -> Figure:
    """Draw a panel for each data set and estimator."""
    figure, axes = plt.subplots(
        len(datasets), 3, figsize=(10, 2.1 * len(datasets)), layout="constrained", squeeze=False
    )
    networks = set(results.set_index(NETWORK[:2]).index)
    for row, dataset in zip(axes, datasets, strict=True):
        for ax, estimator in zip(row, ESTIMATORS, strict=True):
            ax.set_title(f"{dataset}, {estimator}", fontsize=10)
            if (dataset, estimator) in networks:
                draw(ax, dataset, estimator)
        row[0].set_ylabel("F (nats)")
    axes[0, 0].legend(fontsize=8)
    return figure
