"""The tables of what the data at hand bring, from ``with_data.csv``."""

from __future__ import annotations

from itertools import product

import pandas as pd
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
    networks = once(results)
    rows = []
    for dataset, estimator in product([*REGRESSION, *SIGNALS], ESTIMATORS):
        if (dataset, estimator) in networks.index.droplevel("seed"):
            mine = networks.loc[(dataset, estimator)]
            rose = int((mine.realised > 2 * mine.error).sum())
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine)),
                    *(mean_error(mine[name], digits=0) for name in ("evidence", "best")),
                    mean_error(mine.measured, digits=0),
                    *(f"{mine[n].mean():.1f} %" for n in ("pruned by evidence", "pruned")),
                    rose,
                ]
            )
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
    means = networks.groupby(level=["dataset", "estimator"])[["measured", "best"]].mean()
    less = means[means.measured < means.best].index
    named = ", ".join(f"{dataset} with `{estimator}`" for dataset, estimator in less)
    return (
        f"Of {len(networks)} networks F rose in {int(alone.sum())} by the evidence alone, and in "
        f"{int(rose.sum())} with data by more than two standard errors. In the mean over seeds at "
        f"least as much is gained with data as at the best of the 99 points in "
        f"{len(means) - len(less)} of {len(means)} pairs of data and estimator"
        f"{'; not on ' + named if named else ''}."
    )


def rounds_table(results: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Put pruning in rounds as in the paper beside that with data, on the same seeds.

    Returns
    -------
    str
        In markdown: F in nats, means over seeds.
    """
    loops = [
        table[(table.experiment == "iterative") & (table.method == method)]
        .sort_values("round")
        .groupby(_NETWORK)[["free_energy", "pruned", "round"]]
        .last()
        for table, method in ((paper, "bmr"), (results, "measured"))
    ]
    both = loops[0].join(loops[1], lsuffix=" before", how="inner")
    rows = []
    for dataset, estimator in product([*REGRESSION, *SIGNALS], ESTIMATORS):
        if (dataset, estimator) in both.index.droplevel("seed"):
            mine = both.loc[(dataset, estimator)]
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine)),
                    *(mean_error(mine["free_energy before"]), mean_error(mine.free_energy)),
                    *(mean_error(mine[name], " %") for name in ("pruned before", "pruned")),
                    *(mean_error(mine[name]) for name in ("round before", "round")),
                ]
            )
    header = ["data", "estimator", "seeds", "F, paper", "F, measured", "pruned, paper"]
    return markdown([*header, "pruned, measured", "rounds, paper", "rounds, measured"], rows)
