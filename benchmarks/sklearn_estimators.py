"""Pruned estimators beside scikit-learn's, on data that come with scikit-learn.

Run with ``python benchmarks/sklearn_estimators.py``; writes ``sklearn_estimators.csv``, a row for
each estimator, data set and split, and the table of the page "From a data frame" from it. All have
their defaults, but for networks of 50 units; inputs of the others are standardised, as are the
targets of their networks. Seconds are of the processor, on one thread, without the first fit, in
which torch loads what it needs.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_bmr.sklearn import PrunedClassifier, PrunedRegressor

SPLITS = 3
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "scikit-learn.md"
PLACE = re.compile(r"(<!-- benchmarks/sklearn_estimators.csv -->\n).*?(<!-- end -->)", re.DOTALL)
DATA = {"diabetes": load_diabetes, "wine": load_wine, "breast cancer": load_breast_cancer}


def _main() -> None:
    path = Path(__file__).with_suffix(".csv")
    PrunedRegressor(3, max_iter=2).fit(*load_diabetes(return_X_y=True))
    rows = [row for name in DATA for seed in range(SPLITS) for row in measure(name, seed)]
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")
    PAGE.write_text(fill(PAGE.read_text(), pd.read_csv(path)))


def measure(name: str, seed: int) -> list[dict[str, object]]:
    """Train all estimators on one split."""
    x, y = DATA[name](return_X_y=True, as_frame=True)
    split = train_test_split(x, y, test_size=0.2, random_state=seed)
    estimators = regressors(seed) if name == "diabetes" else classifiers(seed)
    rows = []
    for called, estimator in estimators.items():
        begin = time.process_time()
        estimator.fit(split[0], split[2])
        seconds = time.process_time() - begin
        score, nll = scores(estimator, *split)
        result = getattr(estimator, "result_", None)
        kept = float("nan") if result is None else 1 - result.sparsity
        row = {"data": name, "split": seed, "estimator": called, "score": score, "nll": nll}
        rows.append({**row, "kept": kept, "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def regressors(seed: int) -> dict[str, Any]:
    """Make them."""
    network = TransformedTargetRegressor(
        MLPRegressor(hidden_layer_sizes=50, max_iter=1000, random_state=seed),
        transformer=StandardScaler(),
    )
    return {
        "PrunedRegressor": PrunedRegressor(random_state=seed),
        "max_rounds=0": PrunedRegressor(max_rounds=0, random_state=seed),
        "MLPRegressor": make_pipeline(StandardScaler(), network),
        "RidgeCV": make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 20))),
    }


def classifiers(seed: int) -> dict[str, Any]:
    """Make them."""
    network = MLPClassifier(hidden_layer_sizes=50, max_iter=1000, random_state=seed)
    return {
        "PrunedClassifier": PrunedClassifier(random_state=seed),
        "max_rounds=0": PrunedClassifier(max_rounds=0, random_state=seed),
        "MLPClassifier": make_pipeline(StandardScaler(), network),
        "LogisticRegression": make_pipeline(StandardScaler(), LogisticRegression()),
    }


def scores(estimator: Any, x: Any, x_test: Any, y: Any, y_test: Any) -> tuple[float, float]:
    """Return RMSE or accuracy, and the mean negative log likelihood, of the test rows."""
    if hasattr(estimator, "classes_"):
        probability = estimator.predict_proba(x_test)
        return estimator.score(x_test, y_test), log_loss(y_test, probability)
    mean = estimator.predict(x_test)
    if isinstance(estimator, PrunedRegressor):
        _, scale = estimator.predict(x_test, return_std=True)
    else:
        scale = np.sqrt(np.square(estimator.predict(x) - y).mean())
    rmse = float(np.sqrt(np.square(mean - y_test).mean()))
    return rmse, float(-norm(mean, scale).logpdf(y_test).mean())


def fill(page: str, table: pd.DataFrame) -> str:
    """Write the table into the page."""
    means = table.groupby(["data", "estimator"], sort=False)[["score", "nll", "kept", "seconds"]]
    lines = ["| data | estimator | RMSE or accuracy | NLL | weights kept | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for (data, estimator), row in means.mean().iterrows():
        score = f"{row['score']:.1f}" if data == "diabetes" else f"{row['score']:.1%}"
        kept = "" if np.isnan(row["kept"]) else f"{row['kept']:.1%}"
        start = f"| {data} | `{estimator}` | {score} | {row['nll']:.3f} | {kept} |"
        lines.append(f"{start} {row['seconds']:.1f} |")
    text = "\n".join(["", *lines, "", ""])
    return PLACE.sub(lambda found: found[1] + text + found[2], page)


if __name__ == "__main__":
    _main()
