"""The tables of the page, from the file of results and that of published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

NETWORKS = {"lenet-300-100": "LeNet-300-100", "lenet-5": "LeNet-5"}
# Those compared, in the order of tables and figures.
METHODS = {
    "bmr": "BMR",
    "bmr, units": "BMR, units first",
    "sparse vd": "Sparse VD",
    "magnitude": "magnitude, retrained",
    "snr": "SNR, retrained",
    "bc-gnj": "BC-GNJ",
    "dense": "dense",
}
SCORES = ("error", "nll", "ece")


@dataclass(frozen=True)
class Sources:
    """What the tables are made of."""

    results: pd.DataFrame
    published: pd.DataFrame


def read_sources(folder: Path) -> Sources:
    """Read the files of results."""
    return Sources(pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "published.csv"))


def find_ends(results: pd.DataFrame, network: str, method: str) -> pd.DataFrame:
    """Return the last row of each seed, the one that is trained longest and pruned most."""
    rows = results[(results.network == network) & (results.method == method)]
    return rows.sort_values("compression").groupby("seed").tail(1)


def at_compression(
    results: pd.DataFrame, network: str, method: str, compression: float
) -> pd.Series | None:
    """Read scores off the curve of each seed, and average them; None beyond where it ends.

    Between two networks of a curve they are interpolated in the logarithm of the compression.
    """
    rows = results[(results.network == network) & (results.method == method)]
    found = []
    for _, curve in rows.groupby("seed"):
        ordered = curve.sort_values("compression")
        x = np.log(ordered.compression.to_numpy())
        if not x[0] <= np.log(compression) <= x[-1]:
            return None
        found.append([np.interp(np.log(compression), x, ordered[name]) for name in SCORES])
    return pd.Series(np.mean(found, 0), SCORES) if found else None


def methods_table(sources: Sources, network: str) -> str:
    """Put each method in a row: ours at the end, others where they are about as small."""
    results = sources.results
    ours = find_ends(results, network, "bmr").compression.mean()
    head = ("", "compression", "units", *_HEADS.values())
    rows = []
    for method, title in METHODS.items():
        own = results[(results.network == network) & (results.method == method)]
        if len(own):
            ends = find_ends(own, network, method) if _is_ours(method) else _find_nearest(own, ours)
            rows.append((title, *_describe(ends)))
    return _write(head, rows)


def published_table(sources: Sources, network: str) -> str:
    """Put our rows beside those of papers."""
    rows = []
    for method in filter(_is_ours, METHODS):
        ends = find_ends(sources.results, network, method)
        if len(ends):
            name = f"**{METHODS[method]}**, this package"
            rows.append((name, *_describe(ends)[:2], f"{ends.error.mean():.2f}", "measured here"))
    published = sources.published[sources.published.network == network]
    for one in published.itertuples():
        compression = "" if np.isnan(one.compression) else f"{one.compression:.0f}×"
        widths = one.widths if isinstance(one.widths, str) else ""
        rows.append(
            (one.method, compression, widths, f"{one.error:.2f}", f"published: {one.source}")
        )
    return _write(("", "compression", "units", "error, %", ""), rows)


def claim(sources: Sources, network: str) -> str:
    """Say in a sentence how small ours gets, and how good it is then."""
    ends = find_ends(sources.results, network, "bmr")
    means = ends[["compression", "error", "nll", "ece", "epochs"]].mean()
    size = f"{means.compression:.0f} times fewer weights at {means.error:.2f} % error"
    scores = f"an NLL of {means.nll:.3f} and a calibration error of {means.ece:.3f}"
    seeds = f"{len(ends)} seeds" if len(ends) > 1 else "one seed"
    return f"{NETWORKS[network]} on MNIST: {size}, {scores} ({seeds}, {means.epochs:.0f} epochs)."


def equal_compression_table(sources: Sources, network: str) -> str:
    """Compare ours with each other method where that is as small, by interpolation."""
    results, rows = sources.results, []
    ours = find_ends(results, network, "bmr")
    compression = ours.compression.mean()
    for method in METHODS:
        other = at_compression(results, network, method, compression)
        if other is None or _is_ours(method):
            continue
        pairs = [f"{ours[name].mean():.3g} / {other[name]:.3g}" for name in SCORES]
        verdicts = ["" if ours[name].mean() <= other[name] else " ✗" for name in SCORES]
        rows.append((METHODS[method], *(a + b for a, b in zip(pairs, verdicts, strict=True))))
    heads = (f"at {compression:.0f}×: BMR / other", *(_HEADS[name] for name in SCORES))
    return _write(heads, rows)


def attempts_table(sources: Sources, network: str) -> str:
    """Put each variant of our method in a row, beside the method itself."""
    results = sources.results
    names = [n for n in results.method.unique() if _is_ours(n)]
    rows = []
    for name in sorted(names, key=lambda n: (n != "bmr", n)):
        ends = find_ends(results[results.seed == 0], network, name)
        if len(ends):
            rows.append((name, *_describe(ends)))
    return _write(("", "compression", "units", *_HEADS.values()), rows)


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
