"""The figures of the page, from the file of results and that of what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from tables import METHODS, NETWORKS, Sources, find_rows

from pyro_bmr.plots.theme import BLUE, GREY, SKY, VERMILION

STYLES = {
    "bmr": {"color": BLUE, "marker": "o", "linewidth": 2.2, "zorder": 3},
    "bmr, units": {"color": BLUE, "marker": "s", "linestyle": "--", "zorder": 3},
    "bmr, shares of units": {"color": BLUE, "marker": "x", "linestyle": ":", "zorder": 3},
    "sparse vd": {"color": VERMILION, "marker": "^", "linestyle": "--"},
    "magnitude": {"color": "black", "marker": "v", "linestyle": ":"},
    "snr": {"color": SKY, "marker": "D", "linestyle": "-."},
    "bc-gnj": {"color": GREY, "marker": "P"},
}
PUBLISHED = {"DNS": "x", "SWS": "+", "Sparse VD": "1", "BC-GNJ": "2", "BC-GHS": "*"}
CURVES = {"error": "error (%)", "nll": "negative log likelihood", "ece": "calibration error"}


def curves(sources: Sources) -> Figure:
    """Draw error, NLL and ECE against compression, for each network and method."""
    networks = [name for name in NETWORKS if (sources.results.network == name).any()]
    figure, axes = plt.subplots(
        *(len(networks), len(CURVES)),
        figsize=(12, 3.6 * len(networks)),
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    for row, network in zip(axes, networks, strict=True):
        for ax, (score, label) in zip(row, CURVES.items(), strict=True):
            _draw_curves(ax, sources, network, score)
            ax.set(ylabel=label, title=NETWORKS[network], xlabel="compression")
    handles = [ax.get_legend_handles_labels() for ax in axes[:, 0]]
    once = {name: line for lines, names in handles for line, name in zip(lines, names, strict=True)}
    place = {"loc": "outside lower center", "ncols": 6, "fontsize": 9, "frameon": False}
    figure.legend(once.values(), once.keys(), **place)
    return figure


def free_energies(sources: Sources) -> Figure:
    """Draw F against compression along the rounds, for what minimises it."""
    networks = [name for name in NETWORKS if (sources.results.network == name).any()]
    figure, axes = plt.subplots(
        1, len(networks), figsize=(4.6 * len(networks), 3.6), squeeze=False, layout="constrained"
    )
    for ax, network in zip(axes[0], networks, strict=True):
        _draw_curves(ax, sources, network, "free_energy")
        ax.set(title=NETWORKS[network], ylabel="free energy (nats)", xlabel="compression")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.legend(fontsize=8)
    return figure


def what_is_left(_sources: Sources) -> Figure:
    """Draw how many weights read each pixel, and the filters that stay."""
    draws = {"lenet-300-100": _draw_pixels, "lenet-5": _draw_filters}
    there = {name: draw for name, draw in draws.items() if _first_layer_file(name).exists()}
    figure, axes = plt.subplots(
        1, len(there), figsize=(4.6 * len(there), 3.8), squeeze=False, layout="constrained"
    )
    for ax, (name, draw) in zip(axes[0], there.items(), strict=True):
        with np.load(_first_layer_file(name)) as file:
            draw(figure, ax, file["weights"])
        ax.set(xticks=[], yticks=[])
    return figure


FIGURES: Mapping[str, Callable[[Sources], Figure]] = {
    "curves": curves,
    "free-energies": free_energies,
    "what-is-left": what_is_left,
}


def _draw_curves(ax: Axes, sources: Sources, network: str, score: str) -> None:
    """Draw means over seeds, and the range of the seeds where there are several."""
    for method, style in STYLES.items():
        rows = find_rows(sources.results, network, method)
        # What is cut much too far would leave no room for the rest.
        rows = rows[rows[score].notna() & (rows.error < 3 * rows.error.min())]
        if rows.empty:
            continue
        levels = rows.groupby("level")
        means = levels[["compression", score]].mean().sort_values("compression")
        spread = levels[score].agg(["min", "max"]).loc[means.index]
        ax.fill_between(
            means.compression, spread["min"], spread["max"], color=style["color"], alpha=0.15, lw=0
        )
        ax.plot(means.compression, means[score], label=METHODS[method], markersize=5, **style)
    dense = find_rows(sources.results, network, "dense")
    if len(dense) and dense[score].notna().any():
        ax.axhline(dense[score].mean(), color="0.5", linestyle=":", label="dense")
    if score == "error":
        known = sources.published[sources.published.network == network]
        for one in known[known.compression > 1].itertuples():
            mark, label = PUBLISHED[one.method], f"{one.method}, published"
            ax.plot(one.compression, one.error, mark, color="black", ms=8, label=label, zorder=4)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_pixels(figure: Figure, ax: Axes, weights: np.ndarray) -> None:
    read = (weights != 0).sum(0).reshape(28, 28)
    image = ax.imshow(np.where(read > 0, read, np.nan), cmap="cividis_r")
    figure.colorbar(image, ax=ax, label="weights that read a pixel")
    ax.set(title=f"LeNet-300-100: {(read > 0).sum()} of 784 pixels are read")


def _draw_filters(figure: Figure, ax: Axes, weights: np.ndarray) -> None:
    kept = weights[(weights != 0).any((1, 2, 3)), 0]
    wide = math.ceil(math.sqrt(len(kept)))
    sheet = np.full((6 * math.ceil(len(kept) / wide) + 1, 6 * wide + 1), np.nan)
    for number, one in enumerate(kept):
        row, column = divmod(number, wide)
        sheet[6 * row + 1 : 6 * row + 6, 6 * column + 1 : 6 * column + 6] = one
    size = np.abs(kept).max()
    image = ax.imshow(sheet, cmap="RdBu", vmin=-size, vmax=size)
    figure.colorbar(image, ax=ax, label="posterior mean")
    ax.set(title=f"LeNet-5: {len(kept)} of 20 filters")


def _first_layer_file(network: str) -> Path:
    return Path(__file__).with_name(f"first-layer-{network}.npz")
