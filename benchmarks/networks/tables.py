"""The tables of the page, from the file of results and that of published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

NETWORKS = {"lenet-300-100": "LeNet-300-100", "lenet-5": "LeNet-5"}
# Those compared, in the order of tables and figures.
METHODS = {
    "bmr": "BMR",
    "bmr, units": "BMR, units first",
    "bmr, shares of units": "BMR, shares of units",
    "sparse vd": "Sparse VD",
    "magnitude": "magnitude, retrained",
    "snr": "SNR, retrained",
    "bc-gnj": "BC-GNJ",
    "dense": "dense",
}
# The recipe that is compared, where it is another one than that of the same name.
RECIPES = {("lenet-5", "bmr"): "bmr, slower at the end"}
SCORES = ("error", "nll", "ece")


@dataclass(frozen=True)
class Sources:
    """What the tables are made of."""

    results: pd.DataFrame
    published: pd.DataFrame


def read_sources(folder: Path) -> Sources:
    """Read the files of results."""
    return Sources(pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "published.csv"))


def find_rows(results: pd.DataFrame, network: str, method: str) -> pd.DataFrame:
    """Return the networks on the way of one of the `METHODS`, by the recipe that is compared."""
    return _find_recipe(results, network, RECIPES.get((network, method), method))


def find_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last row of each seed, the one that is trained longest and pruned most."""
    return rows.sort_values("compression").groupby("seed").tail(1)


def at_compression(rows: pd.DataFrame, compression: float) -> pd.Series | None:
    """Read scores off the curve of each seed, and average them; None beyond where it ends.

    Between two networks of a curve they are interpolated in the logarithm of the compression.
    """
    found = []
    for _, curve in rows.groupby("seed"):
        ordered = curve.sort_values("compression")
        x = np.log(ordered.compression.to_numpy())
        if not x[0] <= np.log(compression) <= x[-1]:
            return None
        found.append([np.interp(np.log(compression), x, ordered[name]) for name in SCORES])
    return pd.Series(np.mean(found, 0), SCORES) if found else None


def find_goal(sources: Sources, network: str) -> float:
    """Return the largest compression that was published."""
    published = sources.published
    return published[published.network == network].compression.max()


def methods_table(sources: Sources, network: str) -> str:
    """Put each method in a row, where it is about as small as the smallest that was published."""
    found = {title: find_rows(sources.results, network, m) for m, title in METHODS.items()}
    return _write_near_goal(found, find_goal(sources, network))


def published_table(sources: Sources, network: str) -> str:
    """Put our rows beside those of papers: as small as the smallest of these, and at the end."""
    goal, rows = find_goal(sources, network), []
    for method in filter(_is_ours, METHODS):
        own = find_rows(sources.results, network, method)
        name = f"**{METHODS[method]}**, this package"
        for nets in (_find_nearest(own, goal), find_ends(own)) if len(own) else ():
            row = name, *_describe(nets)[:2], f"{nets.error.mean():.2f}", "measured here"
            rows += [row] if row not in rows else []
    published = sources.published[sources.published.network == network]
    for one in published.itertuples():
        compression = "" if np.isnan(one.compression) else f"{one.compression:.0f}×"
        widths = one.widths if isinstance(one.widths, str) else ""
        rows.append(
            (one.method, compression, widths, f"{one.error:.2f}", f"published: {one.source}")
        )
    return _write(("", "compression", "units", "error, %", ""), rows)


def claim(sources: Sources, network: str) -> str:
    """Say how good ours is where it is as small as the smallest that was published."""
    own, goal = find_rows(sources.results, network, "bmr"), find_goal(sources, network)
    found = at_compression(own, goal)
    if found is None:
        found, goal = find_ends(own)[[*SCORES]].mean(), find_ends(own).compression.mean()
    size = f"{goal:.0f} times fewer weights at {found.error:.2f} % error"
    scores = f"an NLL of {found.nll:.3f} and a calibration error of {found.ece:.4f}"
    count = own.seed.nunique()
    seeds = f"mean of {count} seeds" if count > 1 else "one seed"
    return f"{NETWORKS[network]} on MNIST: {size}, {scores} ({seeds})."


def equal_compression_table(sources: Sources, network: str) -> str:
    """Compare ours with others at half the goal, at the goal, and where the first of both ends."""
    own, rows = find_rows(sources.results, network, "bmr"), []
    goal = find_goal(sources, network)
    for place, (method, title) in product(range(3), METHODS.items()):
        curve = find_rows(sources.results, network, method)
        if len(curve) and not _is_ours(method):
            end = min(find_ends(one).compression.min() for one in (own, curve))
            compression = (goal / 2, goal, end)[place]
            ours, other = (at_compression(one, compression) for one in (own, curve))
            if ours is None or other is None:
                continue
            pairs = [f"{ours[name]:.3g} / {other[name]:.3g}" for name in SCORES]
            verdicts = ["" if ours[name] <= other[name] else " ✗" for name in SCORES]
            cells = (a + b for a, b in zip(pairs, verdicts, strict=True))
            rows.append((f"{compression:.0f}×", title, *cells))
    return _write(("", "BMR / other", *(_HEADS[name] for name in SCORES)), rows)


def attempts_table(sources: Sources, network: str) -> str:
    """Put each variant of ours in a row, where it is about as small as the smallest published."""
    names = sorted(filter(_is_ours, sources.results.method.unique()))
    found = {name: _find_recipe(sources.results, network, name) for name in names}
    return _write_near_goal(found, find_goal(sources, network))


def rounds_table(sources: Sources, network: str) -> str:
    """Put what ours is after each round in a row."""
    rows = []
    for method in filter(_is_ours, METHODS):
        own = find_rows(sources.results, network, method)
        rows += [_describe_round(METHODS[method], group) for _, group in own.groupby("level")]
    heads = "", "pruned, %", "compression", "units", "error, %", "NLL", "ECE", "F (nats)"
    return _write((*heads, "FLOPs", "predictive"), rows)


_HEADS = {
    "error": "error, %",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "auroc_rotated": "AUROC turned",
    "auroc_cifar10": "AUROC CIFAR-10",
    "free_energy": "F (nats)",
    "flops": "FLOPs",
    "epochs": "epochs",
    "minutes": "minutes",
}
_FORMATS = {
    "error": "{:.2f}",
    "free_energy": "{:,.0f}",
    "flops": "{:,.0f}",
    "epochs": "{:.0f}",
    "minutes": "{:.1f}",
}


def _is_ours(method: str) -> bool:
    return method.startswith("bmr")


def _find_recipe(results: pd.DataFrame, network: str, recipe: str) -> pd.DataFrame:
    return results[(results.network == network) & (results.method == recipe)]


def _write_near_goal(found: Mapping[str, pd.DataFrame], goal: float) -> str:
    rows = [
        (title, str(own.seed.nunique()), *_describe(_find_nearest(own, goal)))
        for title, own in found.items()
        if len(own)
    ]
    return _write(("", "seeds", "compression", "units", *_HEADS.values()), rows)


def _describe_round(title: str, rows: pd.DataFrame) -> tuple[str, ...]:
    means = rows.mean(numeric_only=True)
    faster = means.dense_predictive_ms / means.predictive_ms
    return (
        title,
        f"{100 * (1 - 1 / means.compression):.1f}",
        *_describe(rows)[:2],
        *(f"{means.error:.2f}", f"{means.nll:.3f}", f"{means.ece:.3f}"),
        *(f"{means.free_energy:,.0f}", f"{means.flops:,.0f}", f"{faster:.1f}×"),
    )


def _find_nearest(rows: pd.DataFrame, compression: float) -> pd.DataFrame:
    distance = np.log(rows.compression / compression).abs()
    return rows.loc[distance.groupby(rows.seed).idxmin()]


def _describe(rows: pd.DataFrame) -> tuple[str, ...]:
    """Write means over seeds."""
    means = rows.assign(minutes=rows.seconds / 60).mean(numeric_only=True)
    scores = [
        "" if np.isnan(means[name]) else _FORMATS.get(name, "{:.3f}").format(means[name])
        for name in _HEADS
    ]
    return f"{means.compression:.0f}×", " / ".join(rows.widths.unique()), *scores


def _write(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)
