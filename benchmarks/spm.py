"""Beside SPM: the evidence of sets, what a search gains, and how probable a parameter is.

Run with ``python benchmarks/spm.py``; writes ``spm.csv``, and the tables of the page "Coming from
SPM" from it. The posteriors of dynamic causal models are those of ``PYRO_BMR_DATA``.

- ``delta_f``: over 200 random problems with correlated posteriors and priors, and 8 random sets of
  each, the largest difference of ΔF from what natural parameters give in numpy, in nats.
- ``search``: nats that are gained by `by_evidence`, by `by_blocks` and by the rule of
  ``spm_dcm_bmr_all`` (2021 and later), here written in numpy; under the prior that SPM leaves to
  the rest.
- ``presence``: ``Pp`` as that routine has it beside the inclusion probability over all sets, for
  all parameters, where more than 16 have a Monte Carlo error, and for the twelve whose own ΔF is
  closest to zero, the others being present, where numpy sums over all 4,096 sets. ``difference`` is
  the largest, ``parameter`` the one that has it; ``error`` the largest standard error, or the
  largest difference of `presence` from the sum.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "moments"))
from dcm import DATA, FILES, Dcm, Problem  # noqa: E402

import pyro_bmr as bmr  # noqa: E402

MOST = 8
# A step of the walk takes far longer under the one prior that is correlated, and singular.
SAMPLES = {"fmri_a": 40_000, "fmri_b": 40_000, "erp_a": 40_000, "eeg_correlated_prior": 300}
PAGE = ROOT / "docs" / "guide" / "coming-from-spm.md"


def _main() -> None:
    rows = [compare_delta_f(rest) for rest in ("conditional", "marginal")]
    for name in FILES:
        rows += [compare_searches(name), *compare_presences(name)]
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.6g")
    print(table.to_string(index=False))
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(), pd.read_csv(Path(__file__).with_suffix(".csv"))))


def compare_delta_f(rest: str) -> dict[str, object]:
    """Compare ΔF of random sets in 200 random problems with numpy."""
    worst = 0.0
    for seed in range(200):
        random = np.random.default_rng(seed)
        size = int(random.integers(3, 13))
        prior, information = _random_spread(random, size), _random_spread(random, size)
        covariance = np.linalg.inv(np.linalg.inv(prior) + np.linalg.inv(information))
        mean, prior_mean = random.normal(size=(2, size)) * [[1.0], [0.3]]
        problem = Problem(mean, np.eye(size), covariance, prior_mean - mean, prior)
        posterior = bmr.Posterior(mean, covariance, prior_mean=prior_mean, prior_covariance=prior)
        sets = random.random((8, size)) < 0.5
        found = _joint_delta_f(posterior, sets, rest)
        expected = np.array([getattr(problem, rest)(drop) for drop in sets])
        worst = max(worst, np.abs(found - expected).max())
    return {"what": "delta_f", "problem": f"200 random, {rest}", "difference": worst}


def _random_spread(random: np.random.Generator, size: int) -> np.ndarray:
    root = random.normal(size=(size, size)) / size**0.5
    return 0.2 * np.eye(size) + root @ root.T


def _joint_delta_f(posterior: bmr.Posterior, sets: np.ndarray, rest: str) -> np.ndarray:
    found: list[float] = []

    def select(scores: bmr.extend.Scores) -> dict[str, torch.Tensor]:
        (name,) = scores.delta_f
        found.extend(scores.joint_delta_f({name: torch.tensor(~drop)}) for drop in sets)
        return {}

    bmr.reduce(posterior, select=select, reduced_prior=bmr.Spike(rest=rest))
    return np.array(found)


def compare_searches(name: str) -> dict[str, object]:
    """Switch off what each search would, of all parameters of a dynamic causal model."""
    posterior = bmr.read_spm(DATA / "dcm" / f"{name}.mat")
    spike = bmr.Spike(rest="marginal")
    found = bmr.reduce(posterior, reduced_prior=spike)
    blocks = bmr.reduce(posterior, reduced_prior=spike, select=bmr.by_blocks())
    dcm = Dcm(name)
    problem = dcm.problem()
    gone, _ = search_as_spm(problem.marginal, int(dcm.free.sum()))
    return {
        "what": "search",
        "problem": name,
        "parameters": int(dcm.free.sum()),
        "by_evidence": -found.delta_f,
        "by_blocks": -blocks.delta_f,
        "spm": -problem.marginal(gone),
    }


def compare_presences(name: str) -> list[dict[str, object]]:
    """Compare ``Pp`` with inclusion probabilities, of all parameters and of twelve."""
    dcm = Dcm(name)
    posterior = bmr.read_spm(DATA / "dcm" / f"{name}.mat")
    names = [one for one, free in zip(posterior.names, dcm.free, strict=True) if free]
    problem = dcm.problem()
    size = len(names)
    own = np.array([problem.conditional(one) for one in np.eye(size, dtype=bool)])
    twelve = np.sort(np.abs(own).argsort()[:12])
    rows = []
    for of in (np.arange(size), twelve):

        def delta_f(drop: np.ndarray, of: np.ndarray = of) -> float:
            whole = np.zeros(size, dtype=bool)
            whole[of] = drop
            return problem.conditional(whole)

        _, pp = search_as_spm(delta_f, len(of))
        chosen = [names[i] for i in of]
        found = bmr.presence(posterior, sites=chosen, num_samples=SAMPLES[name])
        presence = np.array([float(found.probability[one]) for one in chosen])
        error = max((float(one.max()) for one in found.standard_error.values()), default=0.0)
        if len(of) == 12:
            exact = enumerate_presence(delta_f, 12)
            error, presence = np.abs(presence - exact).max(), exact
        worst = int(np.abs(pp - presence).argmax())
        rows.append(
            {
                "what": "presence",
                "problem": name,
                "parameters": len(of),
                "parameter": chosen[worst],
                "Pp": pp[worst],
                "presence": presence[worst],
                "difference": abs(pp - presence)[worst],
                "off by 0.1": int((abs(pp - presence) > 0.1).sum()),
                "error": error,
            }
        )
    return rows


def search_as_spm(
    delta_f: Callable[[np.ndarray], float], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``spm_dcm_bmr_all`` switches off, and its ``Pp``, of ``size`` parameters."""
    gone = np.zeros(size, dtype=bool)
    while True:
        left = np.flatnonzero(~gone)
        if not len(left):
            return gone, np.zeros(size)
        most = max(len(left) // 4, MOST)
        greedy = len(left) > most
        if greedy:
            cost = [delta_f(_add(gone, [i])) for i in left]
            left = left[np.argsort(cost, kind="stable")[:most]]
            if delta_f(gone) - delta_f(_add(gone, left)) > most:
                gone = _add(gone, left)
                continue
        left = left[:MOST]
        sets = _all_sets(len(left))
        log_evidence = -np.array([delta_f(_add(gone, left[one])) for one in sets])
        probability = np.exp(log_evidence - log_evidence.max())
        probability /= probability.sum()
        best = sets[probability.argmax()]
        gone = _add(gone, left[best])
        if not (greedy and best.any()):
            # Of those in the last comparison, with against without; of the others, on or off.
            present = (~gone).astype(float)
            off = probability @ sets
            present[left] = 1 - off
            return gone, present


def enumerate_presence(delta_f: Callable[[np.ndarray], float], size: int) -> np.ndarray:
    """Sum over all sets, each as probable before the data."""
    sets = _all_sets(size)
    log_evidence = -np.array([delta_f(one) for one in sets])
    weight = np.exp(log_evidence - log_evidence.max())
    return weight @ ~sets / weight.sum()


def _all_sets(size: int) -> np.ndarray:
    return (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)


def _add(gone: np.ndarray, more: np.ndarray | list[int]) -> np.ndarray:
    gone = gone.copy()
    gone[more] = True
    return gone


def fill(page: str, table: pd.DataFrame) -> str:
    """Put the tables into a page, between the lines that name them."""
    for name, text in make_tables(table).items():
        pattern = rf"(<!-- {name} of benchmarks/spm.csv -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
        if count != 1:
            msg = f"got {count} places for the table {name!r} in the page. Expected 1"
            raise ValueError(msg)
    return page


def make_tables(table: pd.DataFrame) -> dict[str, str]:
    """Make tables of Markdown by name."""
    delta_f, search, presence = (
        table[table["what"] == what] for what in ("delta_f", "search", "presence")
    )
    return {
        "delta_f": _markdown(
            ["problems", "largest difference (nats)"],
            [[row["problem"], f"{row['difference']:.0e}"] for _, row in delta_f.iterrows()],
        ),
        "search": _markdown(
            ["DCM", "parameters", "`by_evidence` (nats)", "`by_blocks`", "SPM's rule in numpy"],
            [
                [row["problem"], f"{row['parameters']:.0f}"]
                + [f"{row[one]:.2f}" for one in ("by_evidence", "by_blocks", "spm")]
                for _, row in search.iterrows()
            ],
        ),
        "presence": _markdown(
            ["DCM", "parameters", "largest difference", "of", "Pp", "presence", "off by > 0.1"]
            + ["error"],
            [
                [row["problem"], f"{row['parameters']:.0f}", f"{row['difference']:.2f}"]
                + [row["parameter"], f"{row['Pp']:.2f}", f"{row['presence']:.2f}"]
                + [f"{row['off by 0.1']:.0f}", f"{row['error']:.0e}"]
                for _, row in presence.iterrows()
            ],
        ),
    }


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    _main()
