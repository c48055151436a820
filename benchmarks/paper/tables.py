"""The tables of the page, from the table of results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
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
        One row per network: F unpruned, after the first reduction, and after the last refit; its
        rounds and its pruned percentages.
    """
    rows = results[results.experiment == experiment]
    start = rows[rows.method == "unpruned"].set_index(NETWORK)
    ours = rows[rows.method == "bmr"].sort_values("round").groupby(NETWORK)
    first, last = (part.set_index(NETWORK) for part in (ours.head(1), ours.tail(1)))
    best = ours.free_energy.min().reindex(start.index)
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
            "best": np.fmin(best, start.free_energy),
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


def summary_table(results: pd.DataFrame, with_data: pd.DataFrame, datasets: Iterable[str]) -> str:
    """Tell what pruning once and pruning in rounds do to F.

    Returns
    -------
    str
        In markdown; means over seeds with their standard errors.
    """
    table = loops(results).reset_index()
    once = with_data[(with_data.experiment == "one-shot") & (with_data.method == "measured")]
    rows = []
    for dataset, estimator in product(datasets, ESTIMATORS):
        measured = once[(once.dataset == dataset) & (once.estimator == estimator)]
        mine = table[(table.dataset == dataset) & (table.estimator == estimator)]
        if len(mine):
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine), mean_error(mine.before)),
                    *(mean_error(mine.first_pruned, " %"), mean_error(mine["first"])),
                    mean_error(measured.free_energy),
                    *(mean_error(mine.rounds), mean_error(mine.pruned, " %")),
                    *(mean_error(mine.after), mean_error(mine.best)),
                ]
            )
    header = ["data", "estimator", "seeds", "F unpruned", "pruned once", "F pruned once"]
    ends = ["with data", "rounds", "pruned in the end", "F in the end", "F of the best round"]
    return markdown([*header, *ends], rows)


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
                f"{tested.pruned.mean():.1f} %",
                f"{tested.rmse_before.mean():.{digits}f} → {tested.rmse_after.mean():.{digits}f}",
                f"{tested.ll_before.mean():.2f} → {tested.ll_after.mean():.2f}",
            ]
        )
    header = ["data", "F unpruned", "F pruned once", "F pruned in rounds", "pruned"]
    return markdown([*header, "pruned, splits", "test RMSE", "test log likelihood"], rows)


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
        f"F of {rows} rows cannot be below {floor:.0f}: that of a network which predicts "
        "perfectly and costs nothing. The paper's values leave little for residuals and weights; "
        "see the last section."
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
        f"Training, pruning and measuring {networks} networks took {hours:.1f} hours of one core, "
        f"{hours / 2:.1f} on two."
    )


def boston_table(results: pd.DataFrame, published: pd.Series) -> str:
    """Put the curves of Boston next to those of the paper.

    Returns
    -------
    str
        In markdown: F, ours and the paper's.
    """
    table = loops(results).loc["boston"]
    ours = {"unpruned F": table.before}
    for percent in (50, 90):
        for method in ("bmr", "snr", "spr"):
            ours[f"{method} {percent} %"] = curve_at(results, percent, method).loc["boston"]
    ours |= {"final F": table.after, "final pruned %": table.pruned}
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
    """Tell where on the curves another method is lower than BMR.

    Returns
    -------
    str
        Sentences.
    """
    rivals, percents = METHODS[1:4], (10, 30, 50, 70, 90)
    clear, close = 0, []
    for estimator, percent, method in product(ESTIMATORS, percents, rivals):
        ours, theirs = (curve_at(results, percent, m) for m in ("bmr", method))
        gap = (theirs - ours).loc["boston", estimator]
        if gap.mean() > 2 * gap.sem():
            clear += 1
        else:
            value = mean_error(gap, digits=1, sign=True)
            close.append(f"{NAMES[method]} at {percent} % with `{estimator}` ({value})")
    text = (
        f"On Boston BMR is lower by more than two standard errors in {clear} of "
        f"{clear + len(close)} comparisons with SNR, SPR and magnitude"
    )
    text += f"; the others are {_listed(close)}, in nats above BMR." if close else "."
    lowest, others = 0, {}
    for percent in percents:
        curves = pd.DataFrame({m: curve_at(results, percent, m) for m in METHODS[:4]}).dropna()
        curves = curves.drop("boston")
        wins = curves.bmr <= curves.min(axis=1)
        lowest += wins.sum()
        for dataset, estimator, _ in wins.index[~wins]:
            key = f"{dataset} with `{estimator}`"
            others[key] = others.get(key, 0) + 1
    total = len(percents) * len(curves)
    exceptions = _listed([name for name, count in others.items() if count > 2])
    text += (
        f" On the other data, on the network of the first seed, BMR is the lowest of the four at "
        f"{lowest} of {total} points"
    )
    return f"{text}; it is not at most of the five on {exceptions}." if exceptions else f"{text}."


def loops_verdict(results: pd.DataFrame) -> str:
    """Tell where pruning in rounds does not end lowest, on average, and where pruning once fails.

    Returns
    -------
    str
        Sentences.
    """
    table = loops(results)
    means = table.groupby(NETWORK[:2])[["before", "first", "after"]].mean()
    best = means.after < means[["before", "first"]].min(axis=1)
    others = [f"{dataset} with `{estimator}`" for dataset, estimator in means.index[~best]]
    exceptions = f", but for {_listed(others)}" if others else ""
    raised = (table["first"] > table.before).groupby("dataset").agg(["sum", "size"])
    raised = raised[raised["sum"] > 0]
    failures = [f"{row['sum']} of {row['size']} on {name}" for name, row in raised.iterrows()]
    return (
        f"In {best.sum()} of {len(means)} pairs of data and estimator the mean F is lower in the "
        f"end than both unpruned and pruned once{exceptions}. The first reduction by itself lowers "
        f"F in all {len(table)} networks{' but ' if failures else ''}{_listed(failures)}."
    )


def splits_verdict(results: pd.DataFrame) -> str:
    """Tell where pruning changes test log likelihoods by more than their errors.

    Returns
    -------
    str
        Sentences, one an estimator.
    """
    table = loops(results, "splits")
    gain = (table.ll_after - table.ll_before).groupby(["estimator", "dataset"])
    mean, error = gain.mean(), gain.sem()
    sentences = []
    for estimator in (name for name in ESTIMATORS if name in mean.index):
        m, e = mean[estimator], error[estimator]
        groups = {
            "rises by more than two standard errors on": m > 2 * e,
            "falls by more than two on": m < -2 * e,
            "falls by one to two on": (m >= -2 * e) & (m < -e),
        }
        parts = [f"{text} {_listed(list(m.index[of]))}" for text, of in groups.items() if of.any()]
        rest = ~np.logical_or.reduce(list(groups.values()))
        if rest.any():
            parts.append(f"does neither on {_listed(list(m.index[rest]))}")
        sentences.append(
            f"With `{estimator}` the test log likelihood {'; '.join(parts)}. So it is no worse "
            f"within one standard error on {int((m >= -e).sum())} of {len(m)} sets."
        )
    return "\n\n".join(sentences)


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
    others = ["unpruned", "longer", *METHODS[1:], "scratch"]
    ends = ends.reindex(columns=["bmr", *others]).dropna()
    cells = []
    for dataset in (name for name in REGRESSION if name in ends.index):
        mine = ends.loc[dataset]
        gaps = mine[others].sub(mine.bmr, axis=0)
        differences = [mean_error(gaps[way], digits=0, sign=True) for way in others]
        cells.append([dataset, len(mine), mean_error(mine.bmr), *differences])
    header = ["unpruned", "trained on", *(NAMES[m] for m in METHODS[1:]), "small dense"]
    return markdown(["data", "seeds", "F by BMR", *header], cells)


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
            rows.append(
                [
                    *(dataset, f"`{estimator}`", len(mine), mean_error(mine.pruned, " %")),
                    *(mean_error(mine.rmse_before, digits=digits),),
                    *(mean_error(mine.rmse_after, digits=digits),),
                    *(mean_error(mine.ll_before, digits=3), mean_error(mine.ll_after, digits=3)),
                    mean_error(gain, digits=3, sign=True),
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
    kind = rows.dataset.map(dict.fromkeys(SIGNALS, "signals")).fillna("regression")
    kind = kind.mask(rows.dataset == "powerplant", "powerplant")
    kind = kind.replace("regression", "other regression")
    for (name, index), mine in rows.groupby([kind, rows["round"].clip(upper=5)]):
        gap = mine.realised_delta_f - mine.predicted_delta_f
        cells.append(
            [
                *(name, "5 and later" if index == 5 else index),
                *(len(mine), f"{mine.predicted_delta_f.median():.1f}"),
                *(f"{mine.realised_delta_f.median():.1f}", f"{gap.median():+.1f}"),
                f"{100 * (mine.realised_delta_f < 0).mean():.0f} %",
            ]
        )
    header = ["networks", "round", "reductions", "ΔF predicted", "ΔF realised", "difference"]
    return markdown([*header, "realised below 0"], cells)


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
