"""The tables of the page, from the table of results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import pandas as pd

ESTIMATORS = ["global", "local", "moments"]
REGRESSION = ["boston", "concrete", "energy", "kin8nm", "naval", "powerplant", "wine", "yacht"]
SIGNALS = ["sine", "sawtooth", "square"]
NETWORK = ["dataset", "estimator", "seed", "split"]


def read_results(path: Path) -> pd.DataFrame:
    """Read the table of results.

    Returns
    -------
    DataFrame
        Without a split, that is -1; pruned fractions are in percent.
    """
    table = pd.read_csv(path)
    table["split"] = table.split.fillna(-1).astype(int)
    table["pruned"] *= 100
    return table


def read_published(path: Path) -> pd.Series:
    """Read the numbers of the paper.

    Returns
    -------
    Series
        By data set, estimator and quantity.
    """
    return pd.read_csv(path).set_index(["dataset", "estimator", "quantity"]).value


def loops(results: pd.DataFrame, experiment: str = "iterative") -> pd.DataFrame:
    """Put before, one-shot and after of each loop of reductions side by side.

    Returns
    -------
    DataFrame
        A row a network: F unpruned, after the first reduction, and after the last refit; its
        rounds and its pruned percentages.
    """
    rows = results[results.experiment == experiment]
    start = rows[rows.method == "unpruned"].set_index(NETWORK)
    ours = rows[rows.method == "bmr"].sort_values("round").groupby(NETWORK)
    first, last = (part.set_index(NETWORK) for part in (ours.head(1), ours.tail(1)))
    # A network of which nothing was to be pruned has no rounds, and stays as it was.
    first, last = (part.reindex(start.index) for part in (first, last))
    scores = {
        f"{short}_{when}": part[column].fillna(start[column])
        for short, column in (("rmse", "rmse"), ("ll", "test_log_likelihood"))
        for when, part in (("before", start), ("after", last))
    }
    return pd.DataFrame(
        {
            "before": start.free_energy,
            "first_pruned": first.pruned.fillna(0.0),
            "first": start.free_energy + first.realised_delta_f.fillna(0.0),
            "rounds": last["round"].fillna(0),
            "pruned": last.pruned.fillna(0.0),
            "after": last.free_energy.fillna(start.free_energy),
            **scores,
        }
    )


def curve_at(results: pd.DataFrame, percent: float, method: str) -> pd.Series:
    """Return F of the one-shot curves at a pruned percentage, or the next one on the curve.

    Returns
    -------
    Series
        By data set, estimator and seed.
    """
    curve = results[(results.experiment == "one-shot") & (results.method == method)]
    index = (curve.pruned - percent).abs().groupby([curve[key] for key in NETWORK]).idxmin()
    return curve.loc[index].set_index(NETWORK[:3]).free_energy


def summary_table(results: pd.DataFrame, datasets: Iterable[str]) -> str:
    """Tell what pruning once and pruning until it stops do to F.

    Returns
    -------
    str
        In markdown; means over seeds with their standard errors.
    """
    table = loops(results).reset_index()
    rows = []
    for dataset in datasets:
        for estimator in ESTIMATORS:
            mine = table[(table.dataset == dataset) & (table.estimator == estimator)]
            if len(mine) == 0:
                continue
            best = "**" * bool(mine.after.mean() < min(mine["first"].mean(), mine.before.mean()))
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine), mean_error(mine.before)),
                    *(mean_error(mine.first_pruned, " %"), mean_error(mine["first"])),
                    *(mean_error(mine.rounds), mean_error(mine.pruned, " %")),
                    f"{best}{mean_error(mine.after)}{best}",
                ]
            )
    header = ["data", "estimator", "seeds", "F unpruned", "pruned once", "F", "rounds"]
    return markdown([*header, "pruned in the end", "F"], rows)


def glance_table(results: pd.DataFrame) -> str:
    """Tell in a line a data set what pruning until it stops does, with ``local``.

    Returns
    -------
    str
        In markdown; means over seeds and over splits.
    """
    whole, split = (loops(results, name) for name in ("iterative", "splits"))
    rows = []
    for dataset in REGRESSION:
        if (dataset, "local") not in split.index.droplevel(["seed", "split"]):
            continue
        mine, tested = whole.loc[(dataset, "local")], split.loc[(dataset, "local")]
        digits = {"naval": 5, "kin8nm": 3}.get(dataset, 2)
        rows.append(
            [
                *(dataset, f"{mine.before.mean():.0f}", f"{mine['first'].mean():.0f}"),
                *(f"{mine.after.mean():.0f}", f"{mine.pruned.mean():.1f} %"),
                f"{tested.rmse_before.mean():.{digits}f} → {tested.rmse_after.mean():.{digits}f}",
                f"{tested.ll_before.mean():.2f} → {tested.ll_after.mean():.2f}",
            ]
        )
    header = ["data", "F unpruned", "pruned once", "until it stops", "pruned"]
    return markdown([*header, "test RMSE", "test log likelihood"], rows)


def sine_table(results: pd.DataFrame, published: pd.Series) -> str:
    """Put the loops of the sine next to the paper's runs.

    Returns
    -------
    str
        In markdown.
    """
    table = loops(results)
    if "sine" not in table.index:
        return ""
    table = table.loc["sine"]
    ours = {
        "first pruned %": table.first_pruned,
        "final pruned %": table.pruned,
        "final F": table.after,
    }
    # The evidence of residuals that are all zero, with a Gamma(1, 1) noise precision.
    rows = 792
    floor = 0.5 * rows * math.log(2 * math.pi) - math.lgamma(1 + 0.5 * rows)
    return (
        f"{_beside(ours, 'sine', published)}\n\nWith a Gamma(1, 1) prior of the noise precision, "
        f"F of {rows} rows cannot be below {floor:.0f}: that of a network which predicts perfectly "
        "and costs nothing."
    )


def computing_time(results: pd.DataFrame) -> str:
    """Tell how long the file took.

    Returns
    -------
    str
        A sentence.
    """
    hours = results.seconds.sum() / 3600
    networks = len(results.groupby(NETWORK))
    return (
        f"The file has {networks} networks and what became of them. They took {hours:.1f} hours of "
        f"one core, so {hours / 2:.1f} on two."
    )


def boston_table(results: pd.DataFrame, published: pd.Series) -> str:
    """Put the curves of Boston next to those of the paper.

    Returns
    -------
    str
        In markdown: F, ours and the paper's.
    """
    table = loops(results).loc["boston"]
    ours = {"unpruned F": table.before, "final F": table.after, "final pruned %": table.pruned}
    for percent in (50, 90):
        for method in ("bmr", "snr", "spr"):
            ours[f"{method} {percent} %"] = curve_at(results, percent, method).loc["boston"]
    return _beside(ours, "boston", published)


def _beside(ours: Mapping[str, pd.Series], dataset: str, published: pd.Series) -> str:
    rows = []
    for quantity, values in ours.items():
        cells = [quantity.replace("bmr", "BMR").replace("snr", "SNR").replace("spr", "SPR")]
        digits = 1 if quantity.endswith("pruned %") else 0
        for estimator in ESTIMATORS:
            paper = published.get((dataset, estimator, quantity))
            cells.append(mean_error(values.loc[estimator], digits=digits))
            cells.append("" if paper is None else f"{paper:.{digits}f}")
        rows.append(cells)
    header = [cell for name in ESTIMATORS for cell in (f"`{name}`", "paper")]
    return markdown(["", *header], rows)


def methods_on_curve_table(results: pd.DataFrame) -> str:
    """Compare the one-shot curves of all methods on Boston.

    Returns
    -------
    str
        In markdown: F by pruned percentage.
    """
    rows = []
    for estimator in ESTIMATORS:
        for percent in (10, 30, 50, 70, 90):
            cells = [
                mean_error(curve_at(results, percent, method).loc["boston", estimator])
                for method in METHODS
            ]
            rows.append([f"`{estimator}`", f"{percent} %", *cells])
    return markdown(["estimator", "pruned", *(NAMES[method] for method in METHODS)], rows)


def curves_verdict(results: pd.DataFrame) -> str:
    """Tell where on Boston's curves another method is lower than BMR, on average.

    Returns
    -------
    str
        A sentence.
    """
    compared, lower = 0, []
    for estimator, percent in product(ESTIMATORS, (10, 30, 50, 70, 90)):
        ours = curve_at(results, percent, "bmr").loc["boston", estimator]
        for method in METHODS[1:]:
            gap = curve_at(results, percent, method).loc["boston", estimator] - ours
            compared += 1
            if gap.mean() <= 0:
                value = mean_error(-gap, digits=1)
                lower.append(f"{NAMES[method]} at {percent} % with `{estimator}` by {value} nats")
    found = f"lower everywhere but for {_listed(lower)}" if lower else "the lowest everywhere"
    return (
        f"Of these {compared} comparisons of means over seeds, BMR wins {compared - len(lower)}: "
        f"it is {found}."
    )


def loops_verdict(results: pd.DataFrame) -> str:
    """Tell where pruning until it stops does not end lowest, on average.

    Returns
    -------
    str
        A sentence.
    """
    table = loops(results).groupby(NETWORK[:2])[["before", "first", "after"]].mean()
    best = table.after < table[["before", "first"]].min(axis=1)
    others = [f"{dataset} with `{estimator}`" for dataset, estimator in table.index[~best]]
    found = f"all but {_listed(others)}" if others else "all of them"
    return f"Of the {len(table)} pairs of data and estimator, it ends lowest in {found}."


def splits_verdict(results: pd.DataFrame) -> str:
    """Tell on which data sets pruning makes test log likelihoods worse.

    Returns
    -------
    str
        Sentences, one an estimator.
    """
    table = loops(results, "splits")
    gain = (table.ll_after - table.ll_before).groupby(["estimator", "dataset"])
    worse = gain.mean() < -gain.sem()
    sentences = []
    for estimator in ESTIMATORS:
        if estimator in worse.index:
            mine = worse[estimator]
            names = _listed(list(mine.index[mine]))
            exceptions = f", worse on {names}" if names else ""
            sentences.append(f"`{estimator}`: no worse on {sum(~mine)} of {len(mine)}{exceptions}.")
    return "After pruning, within one standard error: " + " ".join(sentences)


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def loops_by_method_table(results: pd.DataFrame) -> str:
    """Compare loops by all methods at the same pruned fractions, and dense networks.

    Returns
    -------
    str
        In markdown: F after the last refit.
    """
    rows = results[(results.experiment == "iterative") & (results.estimator == "local")]
    ends = rows.sort_values("round").groupby([*NETWORK, "method"]).last().free_energy.unstack()
    ways = ["unpruned", "longer", *METHODS, "scratch"]
    ends = ends.reindex(columns=ways).dropna()
    cells = []
    for dataset in REGRESSION:
        if dataset in ends.index:
            mine = ends.loc[dataset]
            cells.append([dataset, len(mine), *(mean_error(mine[way].dropna()) for way in ways)])
    header = ["unpruned", "trained on", *(NAMES[m] for m in METHODS), "small dense"]
    return markdown(["data", "seeds", *header], cells)


def splits_table(results: pd.DataFrame) -> str:
    """Compare test scores before and after pruning.

    Returns
    -------
    str
        In markdown: means over splits with their standard errors.
    """
    table = loops(results, "splits").reset_index()
    rows = []
    for dataset in REGRESSION:
        for estimator in ESTIMATORS:
            mine = table[(table.dataset == dataset) & (table.estimator == estimator)]
            if len(mine) == 0:
                continue
            digits = 5 if dataset == "naval" else 3
            gain = mine.ll_after - mine.ll_before
            no_worse = gain.mean() >= -(gain.sem() if len(gain) > 1 else 0.0)
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine), mean_error(mine.pruned, " %")),
                    *(mean_error(mine.rmse_before, digits=digits),),
                    *(mean_error(mine.rmse_after, digits=digits),),
                    *(mean_error(mine.ll_before, digits=3), mean_error(mine.ll_after, digits=3)),
                    f"{mean_error(gain, digits=3, sign=True)}{'' if no_worse else ' worse'}",
                ]
            )
    header = ["data", "estimator", "splits", "pruned", "RMSE before", "after"]
    return markdown([*header, "log likelihood before", "after", "difference"], rows)


def rounds_table(results: pd.DataFrame) -> str:
    """Compare ΔF as predicted and as realised, round by round.

    Returns
    -------
    str
        In markdown: medians over all networks that get so far.
    """
    rows = results[(results.experiment == "iterative") & (results.method == "bmr")]
    rows = rows[rows.predicted_delta_f < -0.01]
    cells = []
    for (is_signal, index), mine in rows.groupby(
        [
            rows.dataset.isin(SIGNALS),
            rows["round"].clip(upper=5),
        ]
    ):
        gap = mine.realised_delta_f - mine.predicted_delta_f
        cells.append(
            [
                *("signals" if is_signal else "regression", "5 and later" if index == 5 else index),
                *(len(mine), f"{mine.predicted_delta_f.median():.1f}"),
                *(f"{mine.realised_delta_f.median():.1f}", f"{gap.median():+.1f}"),
                f"{100 * (mine.realised_delta_f < 0).mean():.0f} %",
            ]
        )
    header = ["networks", "round", "reductions", "ΔF predicted", "ΔF realised", "difference"]
    return markdown([*header, "realised below 0"], cells)


def stopping_table(results: pd.DataFrame) -> str:
    """Tell what it costs to stop where ΔF changes sign, against the best point of each curve.

    Returns
    -------
    str
        In markdown: nats, means over seeds.
    """
    curves = results[
        (results.experiment == "one-shot") & (results.method.isin(["bmr", "unpruned"]))
    ]
    table = loops(results).reset_index()
    cells = []
    for dataset in [*REGRESSION, *SIGNALS]:
        row = [dataset]
        for estimator in ESTIMATORS:
            costs, gains = [], []
            mine = curves[(curves.dataset == dataset) & (curves.estimator == estimator)]
            for seed, curve in mine.groupby("seed"):
                start = curve[curve.method == "unpruned"].free_energy.iloc[0]
                same = table[(table.dataset == dataset) & (table.estimator == estimator)]
                stop = same[same.seed == seed]
                at = curve.pruned.sub(stop.first_pruned.iloc[0]).abs().idxmin()
                costs.append(curve.free_energy[at] - curve.free_energy.min())
                gains.append(start - curve.free_energy.min())
            if costs:
                cost, gain = pd.Series(costs), pd.Series(gains)
                row.append(f"{mean_error(cost, digits=1)} of {gain.mean():.0f}")
            else:
                row.append("")
        cells.append(row)
    return markdown(["data", *(f"`{name}`" for name in ESTIMATORS)], cells)


METHODS = ["bmr", "snr", "spr", "magnitude", "random"]
NAMES = {"bmr": "BMR", "snr": "SNR", "spr": "SPR", "magnitude": "magnitude", "random": "random"}


def mean_error(values: pd.Series, unit: str = "", digits: int | None = None, sign=False) -> str:
    """Format a mean and its standard error.

    Returns
    -------
    str
        Such as ``1434 ± 4``.
    """
    if digits is None:
        digits = 1 if unit or values.abs().max() < 100 else 0
    plus = "+" if sign else ""
    error = f" ± {values.sem():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{plus}.{digits}f}{error}{unit}"


def markdown(header: list[str], rows: list[list[object]]) -> str:
    """Format a table.

    Returns
    -------
    str
        In markdown.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
