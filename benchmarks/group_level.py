"""How fast and how right the group level is, beside the scheme of SPM written in numpy.

Run with ``python benchmarks/group_level.py``; writes ``group_level.csv``. One thread.

- ``seconds``: 30 subjects, 40 parameters, 4 covariates, by components, beside `naive_peb` in the
  same run: variational Laplace over effects and log precisions together, subject by subject, as in
  Friston et al. (2016), NeuroImage 128, with the steps of ``spm_dcm_peb``.
- ``chosen``: of 200 studies with 8 effects, each zero with probability 1/2, how often the set of
  zeros with the lowest F of all 256 is the true one, by either; the two see the same studies.
  ``expected`` is the same count without the luck of the draw: effects, zeros and data come from the
  prior, so that given the data a choice is right with its posterior probability, here under the
  true variance between subjects, in numpy. ``spread`` is by how much the standard deviation between
  subjects exceeds what the prior expects, ``variance`` that of the prior of the log precision.
  ``covered`` is the part of all effects within 90 % intervals, and ``log precision`` its mean
  estimate, of which ``-2 ln(spread)`` is true.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from numpy.linalg import inv, slogdet  # noqa: E402

import pyro_bmr as bmr  # noqa: E402

STUDIES = 200


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    rows = [measure_seconds(components) for components in ("single", "fields", "all")]
    rows += [count_chosen(spread, variance) for spread in (1.0, 3.0) for variance in (1 / 16, 4.0)]
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.5g")
    print(table.to_string(index=False))


def measure_seconds(components: str) -> dict[str, object]:
    """Time both on one large study, each at its best of three."""
    rng = np.random.default_rng(0)
    design = np.c_[np.ones(30), np.repeat([1.0, -1.0], 15), rng.normal(size=(30, 2))]
    names = [f"{field}({i},{j})" for field in "AB" for i in range(1, 6) for j in range(1, 5)]
    prior, effects = np.eye(40) / 2, 0.3 * rng.normal(size=160)
    moments = simulate(rng, design, effects, prior, 1.0, rows=100)
    groups = {"single": [range(40)], "fields": [range(20), range(20, 40)], "all": zip(range(40))}
    parts = [list(one) for one in groups[components]]
    times = {"ours": [], "naive": []}
    for _ in range(3):
        start = time.perf_counter()
        found = bmr.group_level(as_posteriors(moments, prior, names), design, components=components)
        times["ours"].append(time.perf_counter() - start)
        if components == "all" and times["naive"]:  # once is long enough
            continue
        start = time.perf_counter()
        naive = naive_peb(moments, prior, design, parts, 1 / 16)
        times["naive"].append(time.perf_counter() - start)
    ours, theirs = min(times["ours"]), min(times["naive"])
    return {
        "what": "seconds",
        "components": components,
        "ours": ours,
        "naive": theirs,
        "ratio": theirs / ours,
        "F ours": found.delta_f,
        "F naive": naive["F"],
    }


def count_chosen(spread: float, variance: float) -> dict[str, object]:
    """Count studies of which the true set of zeros is chosen."""
    right = {"ours": 0, "naive": 0}
    expected = {"ours": 0.0, "naive": 0.0}
    covered = {"ours": [], "naive": []}
    precisions = {"ours": [], "naive": []}
    prior = np.eye(4) / 2
    for seed in range(STUDIES):
        rng = np.random.default_rng(seed)
        design = np.c_[np.ones(16), rng.permutation(np.repeat([1.0, -1.0], 8))]
        effects = rng.normal(size=8) * 0.5**0.5
        zeros = rng.random(8) < 0.5
        effects[zeros] = 0.0
        moments = simulate(rng, design, effects, prior, spread, rows=16)
        found = bmr.group_level(
            as_posteriors(moments, prior, list("abcd")),
            design,
            prior=bmr.GroupPrior(log_precision_variance=variance),
        )
        naive = naive_peb(moments, prior, design, [list(range(4))], variance)
        results = {
            "ours": (found.posterior.mean.numpy(), found.posterior.covariance.numpy()),
            "naive": (naive["mean"], naive["covariance"]),
        }
        precisions["ours"].append(float(found.log_precisions.mean))
        precisions["naive"].append(naive["gamma"][0])
        truth = dict(score_zeros(*solve(moments, prior, design, spread)))
        total = sum(np.exp(-one) for one in truth.values())
        for name, (mean, covariance) in results.items():
            chosen = min(score_zeros(mean, covariance), key=lambda one: one[1])[0]
            right[name] += chosen == tuple(np.flatnonzero(zeros))
            expected[name] += np.exp(-truth[chosen]) / total
            sd = np.sqrt(np.diag(covariance))
            covered[name].append(np.mean(np.abs(mean - effects) <= 1.6449 * sd))
    return {
        "what": "chosen",
        "studies": STUDIES,
        "spread": spread,
        "variance": variance,
        **right,
        **{f"expected {name}": one for name, one in expected.items()},
        **{f"covered {name}": np.mean(one) for name, one in covered.items()},
        **{f"log precision {name}": np.mean(one) for name, one in precisions.items()},
    }


def score_zeros(mean: np.ndarray, covariance: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
    """Score every set of zeros by ln p - ln q there, under a prior of variance 1/2 around zero."""
    found: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for size in range(1, len(mean) + 1):
        sets = np.array(list(itertools.combinations(range(len(mean)), size)))
        at, within = mean[sets], covariance[sets[:, :, None], sets[:, None, :]]
        squares = (at * np.linalg.solve(within, at[..., None])[..., 0]).sum(1)
        delta_f = (slogdet(within)[1] + squares - size * np.log(0.5)) / 2
        found += zip(map(tuple, sets), delta_f, strict=True)
    return found


def solve(moments, prior, design, spread):
    """Give mean and covariance of the effects where the variance between subjects is known."""
    precision = np.kron(np.eye(design.shape[1]), inv(prior))
    pulled = np.zeros(len(precision))
    for (mean, covariance), x in zip(moments, design, strict=True):
        information = inv(covariance) - inv(prior)
        estimate = np.linalg.solve(information, inv(covariance) @ mean)
        weight = inv(inv(information) + spread**2 * prior / 16)
        precision += np.kron(np.outer(x, x), weight)
        pulled += np.kron(x, weight @ estimate)
    return inv(precision) @ pulled, inv(precision)


def simulate(rng, design, effects, prior, spread, rows):
    """Draw linear data of unit noise, and give each subject's exact mean and covariance."""
    size, moments = len(prior), []
    for x in design:
        own = np.kron(x, np.eye(size)) @ effects
        parameters = rng.multivariate_normal(own, spread**2 * prior / 16)
        inputs = rng.normal(size=(rows, size))
        data = inputs @ parameters + rng.normal(size=rows)
        covariance = inv(inputs.T @ inputs + inv(prior))
        moments.append((covariance @ inputs.T @ data, covariance))
    return moments


def as_posteriors(moments, prior, names):
    """Hand over the same moments."""
    return [
        bmr.Posterior(mean, covariance=covariance, prior_covariance=prior, names=names)
        for mean, covariance in moments
    ]


def naive_peb(moments, prior, design, parts, variance):
    """Fit the second level as spm_dcm_peb does, with priors around zero.

    The posteriors of subjects are not narrowed by 1/16 of their prior precision.
    """
    size, count = len(prior), len(parts)
    expected = inv(prior / 16)
    pieces = []
    for part in parts:
        piece = np.zeros_like(prior)
        piece[np.ix_(part, part)] = expected[np.ix_(part, part)]
        pieces.append(piece)
    squares = (design**2).mean(0)
    effect_precision = np.kron(np.diag(squares), inv(prior))
    log_precision = np.eye(count) / variance
    effects, gamma = np.zeros(len(effect_precision)), np.zeros(count)
    whole = np.block(
        [
            [effect_precision, np.zeros((len(effects), count))],
            [np.zeros((count, len(effects))), log_precision],
        ]
    )
    speed, best = -4.0, None
    for step in range(64):
        between = expected / 4096
        for one, piece in zip(gamma, pieces, strict=True):
            between = between + np.exp(one) * piece
        spread = inv(between)
        level = 0.0
        slope_b, slope_g = -effect_precision @ effects, -log_precision @ gamma
        curve_bb, curve_gg = -effect_precision.copy(), -log_precision.copy()
        curve_bg = np.zeros((len(effects), count))
        for (mean, covariance), x in zip(moments, design, strict=True):
            slope = np.kron(x, np.eye(size))
            centre = slope @ effects
            change, new_mean, new = log_evidence(mean, covariance, prior, centre, between)
            level += change
            error = new_mean - centre
            slope_b = slope_b + slope.T @ between @ error
            curve_bb = curve_bb + slope.T @ (between @ new @ between - between) @ slope
            for j, piece in enumerate(pieces):
                scale = np.exp(gamma[j])
                part = scale * (np.trace((spread - new) @ piece) - error @ piece @ error) / 2
                slope_g[j] += part
                curve_gg[j, j] += part
                curve_bg[:, j] += scale * (slope - new @ between @ slope).T @ piece @ error
                for k, other in enumerate(pieces):
                    both = np.trace((spread @ other @ spread - new @ other @ new) @ piece) / 2
                    both -= error @ other @ new @ piece @ error
                    curve_gg[j, k] -= np.exp(gamma[j] + gamma[k]) * both
        curve = np.block([[curve_bb, curve_bg], [curve_bg.T, curve_gg]])
        level -= (effects @ effect_precision @ effects + gamma @ log_precision @ gamma) / 2
        level += (slogdet(whole)[1] - slogdet(-curve)[1]) / 2
        if best is None or level >= best["level"]:
            gain = 0.0 if best is None else level - best["level"]
            best = {
                "level": level,
                "at": (effects, gamma),
                "slope": np.r_[slope_b, slope_g],
                "curve": curve,
                "covariance": inv(-curve_bb),
            }
            speed = min(speed + 0.25, 2.0)
        else:
            gain = 0.0
            speed -= 1.0
        move = regularized_step(best["curve"], best["slope"], speed)
        effects = best["at"][0] + move[: len(effects)]
        gamma = best["at"][1] + move[len(effects) :]
        if speed < -4 or (gain < 1e-4 and step > 4):
            break
    return {
        "F": -best["level"],
        "mean": best["at"][0],
        "gamma": best["at"][1],
        "covariance": best["covariance"],
    }


def log_evidence(mean, covariance, prior, centre, between):
    """Give the change of a subject's log evidence under another prior, and its posterior."""
    own, first = inv(covariance), inv(prior)
    new = inv(own + between - first)
    pulled = own @ mean + between @ centre
    log_dets = slogdet(between)[1] + slogdet(own)[1] + slogdet(new)[1] + slogdet(prior)[1]
    squares = mean @ own @ mean + centre @ between @ centre - pulled @ new @ pulled
    return (log_dets - squares) / 2, new @ pulled, new


def regularized_step(curve, slope, speed):
    """Follow the local linear flow for a time, as spm_dx does."""
    values, vectors = np.linalg.eigh(curve)
    time_ = np.exp(speed - np.log(np.abs(values)).mean())
    return vectors @ (np.expm1(values * time_) / values * (vectors.T @ slope))


if __name__ == "__main__":
    main()
