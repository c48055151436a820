"""Predicted ΔF of chosen inputs beside importance sampling, for two Gaussian posteriors.

Run with ``python benchmarks/variable_selection.py``; writes ``variable_selection.csv``, and the
table of the page "Variable selection" from it. The regressions are logistic, of breast cancer, and
Poisson, of counts drawn at the inputs of the diabetes data; weights have the prior N(0, 1). The
posterior is Laplace's approximation at the mode, or the Gaussian with the lowest free energy.
``sampled`` has ΔF of the same set by importance sampling in the full model and in the reduced one,
``error`` its standard error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "selection"))
from generalised import Glm, logistic, poisson  # noqa: E402

import pyro_bmr as bmr  # noqa: E402

PAGE = ROOT / "docs" / "guide" / "variable-selection.md"
PLACE = re.compile(r"(<!-- benchmarks/variable_selection.csv -->\n).*?(<!-- end -->)", re.DOTALL)


def _main() -> None:
    path = Path(__file__).with_suffix(".csv")
    rows = [
        measure(name, make(), how)
        for name, make in {"logistic": logistic, "Poisson": poisson}.items()
        for how in ("Laplace", "lowest free energy")
    ]
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    print(pd.DataFrame(rows).to_string(index=False))
    PAGE.write_text(fill(PAGE.read_text(), pd.read_csv(path)))


def measure(name: str, glm: Glm, how: str) -> dict[str, object]:
    """Choose inputs by one Gaussian posterior, and sample what that changes."""
    best = glm.posterior()
    mean, covariance = glm.laplace() if how == "Laplace" else best
    posterior = bmr.Posterior({"w": mean}, covariance, prior_scale=1.0)
    result = bmr.reduce(posterior)
    kept = result.masks["w"].numpy()
    full, error = glm.log_evidence(np.ones_like(kept), *best)
    reduced, its_error = glm.log_evidence(kept, *best)
    return {
        "regression": name,
        "posterior": how,
        "weights": len(kept),
        "kept": int(kept.sum()),
        "predicted": result.delta_f,
        "sampled": full - reduced,
        "error": float(np.hypot(error, its_error)),
    }


def fill(page: str, table: pd.DataFrame) -> str:
    """Put the table into a page, in its place."""
    text, count = PLACE.subn(lambda m: f"{m[1]}\n{make_table(table)}\n\n{m[2]}", page)
    if count != 1:
        msg = f"got {count} places for the table in the page. Expected 1"
        raise ValueError(msg)
    return text


def make_table(table: pd.DataFrame) -> str:
    """Make a table of Markdown."""
    head = ["regression", "Gaussian posterior", "kept", "ΔF predicted", "by importance sampling"]
    rows = [
        [row["regression"], row["posterior"], f"{row['kept']} of {row['weights']}"]
        + [f"{row['predicted']:.2f}", f"{row['sampled']:.2f} ± {row['error']:.2f}"]
        for _, row in table.iterrows()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * 5, *rows))


if __name__ == "__main__":
    _main()
