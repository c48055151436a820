"""The tables of what the data at hand bring, from ``with_data.csv`` and ``predictions.csv``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pandas as pd
from experiments import MARGINS
from tables import ESTIMATORS, REGRESSION, SIGNALS, markdown, mean_error

_NETWORK = ["dataset", "estimator", "seed"]


def once(results: pd.DataFrame) -> pd.DataFrame:
    """Put beside each other what the ways to reduce a trained network once bring.

    Returns
    -------
    DataFrame
        One row per network: the fall of F in nats by the evidence alone, at the best point of its
        curve and with data, what was predicted of both, and what was pruned.
    """
    rows = results[results.experiment == "one-shot"].set_index(_NETWORK)
    start = rows[rows.method == "unpruned"].free_energy
    curve, measured, evidence = (rows[rows.method == m] for m in ("bmr", "measured", "evidence"))
    return pd.DataFrame(
        {
            "evidence": start - evidence.free_energy,
            "best": start - curve.groupby(level=_NETWORK).free_energy.min(),
            "measured": start - measured.free_energy,
            "realised": measured.realised_delta_f,
            "error": measured.realised_error,
            "pruned by evidence": evidence.pruned,
            "pruned": measured.pruned,
            "predicted by evidence": evidence.predicted_delta_f,
            "seconds": measured.seconds,
        }
    )


def once_table(results: pd.DataFrame) -> str:
    """Tell how far F falls in one reduction, by the evidence alone and with data.

    Returns
    -------
    str
        In markdown: nats, means over seeds.
    """
    rows = [
        [
            *(dataset, f"`{estimator}`", len(mine)),
            *(mean_error(mine[name], digits=0) for name in ("evidence", "best", "measured")),
            *(f"{mine[name].mean():.1f} %" for name in ("pruned by evidence", "pruned")),
            int((mine.realised > 2 * mine.error).sum()),
        ]
        for (dataset, estimator), mine in _pairs(once(results))
    ]
    header = ["data", "estimator", "seeds", "evidence alone", "best of 99 points", "with data"]
    return markdown([*header, "pruned by evidence", "pruned with data", "rose"], rows)


def once_verdict(results: pd.DataFrame) -> str:
    """Say in how many networks F rose, and where less was gained than at the best point.

    Returns
    -------
    str
        A paragraph.
    """
    networks = once(results)
    rose = networks.realised > 2 * networks.error
    alone = networks.evidence < 0
    means = networks.groupby(level=_NETWORK[:2])[["measured", "best"]].mean()
    less = means[means.measured < means.best].index
    return (
        f"Of {len(networks)} networks F rose in {int(alone.sum())} by the evidence alone, and in "
        f"{int(rose.sum())} with data by more than two standard errors. In the mean over seeds at "
        f"least as much is gained with data as at the best of the 99 points in "
        f"{len(means) - len(less)} of {len(means)} pairs of data and estimator{_but(less)}."
    )


def rounds(results: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Put the ends of pruning in rounds, as in the paper and measured, beside each other.

    Returns
    -------
    DataFrame
        One row per network that was pruned in both ways; columns of the paper end in `` paper``.
    """
    ends = [
        table[(table.experiment == "iterative") & (table.method == method)]
        .sort_values("round")
        .groupby(_NETWORK)[["free_energy", "free_energy_error", "pruned", "round"]]
        .last()
        for table, method in ((paper, "bmr"), (results, "measured"))
    ]
    return ends[0].add_suffix(" paper").join(ends[1], how="inner")


def rounds_table(results: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Put pruning in rounds as in the paper beside that with data, on the same seeds.

    Returns
    -------
    str
        In markdown: F in nats, means over seeds.
    """
    rows = [
        [
            *(dataset, f"`{estimator}`", len(mine)),
            *(mean_error(mine[name]) for name in ("free_energy paper", "free_energy")),
            *(mean_error(mine[name], " %") for name in ("pruned paper", "pruned")),
            *(mean_error(mine[name]) for name in ("round paper", "round")),
        ]
        for (dataset, estimator), mine in _pairs(rounds(results, paper))
    ]
    header = ["data", "estimator", "seeds", "F, paper", "F, measured", "pruned, paper"]
    return markdown([*header, "pruned, measured", "rounds, paper", "rounds, measured"], rows)


def rounds_verdict(results: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Say where pruning in measured rounds ends lower, and where with fewer weights pruned.

    Returns
    -------
    str
        A paragraph.
    """
    ends = rounds(results, paper)
    ends["above"] = ends.free_energy - ends["free_energy paper"]
    ends["variance"] = ends.free_energy_error**2 + ends["free_energy_error paper"] ** 2
    groups = ends.groupby(level=_NETWORK[:2])
    means, error = groups.mean(), groups.variance.sum() ** 0.5 / groups.size()
    higher = means[means.above > 0]
    clearly = means[means.above > 2 * error].index
    larger = means[means.pruned < means["pruned paper"] - 2].index
    return (
        f"Measured rounds end at or below the mean F of the paper's in "
        f"{len(means) - len(higher)} of {len(means)} pairs{_but(higher.index)}, there by "
        f"{higher.above.max():.1f} nats at most; above it by more than two standard errors of "
        f"measuring in {len(clearly)}. They prune at most two points less in "
        f"{len(means) - len(larger)}{_but(larger)}."
    )


def frontier_table(results: pd.DataFrame) -> str:
    """Tell what fewer weights than at the lowest F cost, by the margin.

    Returns
    -------
    str
        In markdown: F in nats above that of no margin, and what is pruned; means over seeds.
    """
    rows = results[results.experiment == "one-shot"]
    rows = rows[rows.method.isin(["measured", *_MARGINS])].set_index([*_NETWORK, "method"])
    by_method = rows[["free_energy", "pruned"]].unstack().dropna(subset=[("pruned", _WIDEST)])
    lines = []
    for dataset, mine in by_method.groupby(level="dataset", sort=False):
        above = mine.free_energy.sub(mine.free_energy.measured, axis=0).mean()
        pruned = mine.pruned.mean()
        others = [f"{above[name]:+.0f} ({pruned[name]:.1f} %)" for name in _MARGINS]
        lines.append([dataset, len(mine), f"{pruned['measured']:.1f} %", *others])
    header = ["data", "seeds", "pruned with no margin"]
    return markdown([*header, *(name.replace("-", "−") for name in _MARGINS)], lines)


def predictions_table(predictions: pd.DataFrame) -> str:
    """Compare ways to predict ΔF of sets of weights with what came true.

    Returns
    -------
    str
        In markdown: nats, medians over networks.
    """
    kind = predictions.dataset.map(dict.fromkeys(SIGNALS, "signals")).fillna("other regression")
    kind = kind.mask(predictions.dataset.isin(_HARD), predictions.dataset)
    rows = []
    for (name, part), mine in predictions.groupby([kind, "part"]):
        gaps = [(mine[way] - mine.realised).abs().median() for way in WAYS]
        wrong = [int(((mine[way] < 0) & (mine.realised > 2 * mine.error)).sum()) for way in WAYS]
        cells = [f"{gap:.0f} ({count})" for gap, count in zip(gaps, wrong, strict=True)]
        rows.append([name, _PARTS[part], len(mine), f"{mine.realised.median():.0f}", *cells])
    header = ["networks", "dropped", "sets", "realised", "evidence", "and gradient"]
    return markdown([*header, "and interaction", "and both", "gradient anew"], rows)


def computing_time(results: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Tell how long the files took.

    Returns
    -------
    str
        A sentence.
    """
    rows = results[results.experiment == "one-shot"]
    once = rows[rows.method == "measured"].seconds
    hours = (results.seconds.sum() + predictions.seconds.sum()) / 3600
    return (
        f"Reducing and measuring, with a part of the training, took {hours:.1f} hours of one core "
        f"beside other work; one reduction with data "
        f"{once.median():.1f} seconds in the median, {once.max():.0f} at most."
    )


_MARGINS = [f"margin {margin}" for margin in MARGINS]
_WIDEST = _MARGINS[-1]
# Where the evidence alone has failed.
_HARD = ("concrete", "powerplant")
_PARTS = {0.25: "a quarter", 0.5: "half", 1.0: "all"}
WAYS = ("evidence", "gradient", "interaction", "both", "again")


def _pairs(networks: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for pair in product([*REGRESSION, *SIGNALS], ESTIMATORS):
        if pair in networks.index.droplevel("seed"):
            yield pair, networks.loc[pair]


def _but(pairs: pd.Index) -> str:
    named = ", ".join(f"{dataset} with `{estimator}`" for dataset, estimator in pairs)
    return f", but not on {named}" if named else ""
