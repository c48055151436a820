"""Sparse regression under a horseshoe: which coefficients a reduction keeps.

Run with ``python benchmarks/horseshoe.py``; writes ``benchmarks/horseshoe.csv``, one row per seed,
parametrisation, guide and margin. With ``--seeds 0 1 2`` it runs these only.

100 coefficients, of which 5 are not zero (0.5 to 2 in size, of either sign), 200 rows of standard
normal inputs, noise of scale 1. The prior is Carvalho, Polson & Scott's (2010) horseshoe. In its
centred form, b ~ Normal(0, tau * lam), what is reduced has a prior that depends on other sites; in
its non-centred form, b = tau * lam * z, what is reduced is z, whose prior is a standard normal.
Non-centred, the scale of the prior of tau is that of Piironen & Vehtari (2017), sec. 3.3; centred,
where mean-field guides collapse under so small a scale, it is 0.1.

``margin`` is that of `pyro_bmr.by_evidence`. A ΔF is an upper bound on what refitting reaches,
since the scales of a dropped coefficient are then free: -1 also drops what costs up to a nat.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
    init_to_value,
)
from torch import Tensor

import pyro_bmr as bmr

ROWS, COLUMNS, SIZES = 200, 100, (0.5, 0.75, 1.0, 1.5, 2.0)
PIIRONEN_VEHTARI = len(SIZES) / (COLUMNS - len(SIZES)) / ROWS**0.5
MARGINS = (0.0, -1.0)


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(40)))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = [row for seed in options.seeds for row in run(seed)]
    table = pd.DataFrame(rows)
    table.to_csv(options.out, index=False)
    settings = table.groupby(["form", "guide", "margin"])
    print(settings[["kept_true", "dropped_rest"]].agg(["min", "mean", "max"]))


def run(seed: int) -> Iterator[dict[str, Any]]:
    """Train and reduce, in every setting.

    Parameters
    ----------
    seed : int
        Of the data and of the training.

    Yields
    ------
    dict
        A row.
    """
    x, y, coefficients = make_data(seed)
    guides = {}
    for centred in (True, False):
        guides[centred] = train_mean_field(make_model(centred=centred), x, y, seed)
        yield from rows(seed, centred, guides[centred], x, y, coefficients)
    dense = train_dense(make_model(centred=False), guides[True], x, y, seed)
    yield from rows(seed, False, dense, x, y, coefficients)


def make_data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw inputs, outputs and true coefficients.

    Parameters
    ----------
    seed : int
        Of a generator.

    Returns
    -------
    tuple of Tensor
        Of shapes ``(ROWS, COLUMNS)``, ``(ROWS,)`` and ``(COLUMNS,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    coefficients = torch.zeros(COLUMNS)
    chosen = torch.randperm(COLUMNS, generator=generator)[: len(SIZES)]
    signs = (torch.rand(len(SIZES), generator=generator) < 0.5) * 2.0 - 1
    coefficients[chosen] = signs * torch.tensor(SIZES)
    return x, x @ coefficients + torch.randn(ROWS, generator=generator), coefficients


def make_model(*, centred: bool) -> Callable[[Tensor, Tensor], None]:
    """Write the horseshoe regression, in which the site to be reduced is called b.

    Parameters
    ----------
    centred : bool
        Whether b are the coefficients, or these without their scale.

    Returns
    -------
    callable
        A Pyro model.
    """
    tau_scale = torch.tensor(0.1 if centred else PIIRONEN_VEHTARI)

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfCauchy(torch.ones(())))
        tau = pyro.sample("tau", dist.HalfCauchy(tau_scale))
        lam = pyro.sample("lam", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        scale = tau * lam
        prior_scale = scale if centred else torch.ones_like(scale)
        b = pyro.sample("b", dist.Normal(torch.zeros_like(scale), prior_scale).to_event(1))
        mean = x @ (b if centred else scale * b)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return model


def train_mean_field(model: Callable[..., Any], x: Tensor, y: Tensor, seed: int) -> AutoNormal:
    """Train an AutoNormal from scratch.

    Parameters
    ----------
    model, x, y
        The problem.
    seed : int
        For `pyro.set_rng_seed`.

    Returns
    -------
    AutoNormal
        Trained.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoNormal(model, init_loc_fn=init_to_median(num_samples=15), init_scale=0.1)
    bmr.fit(model, guide, x, y, num_epochs=3000, lr=decay(0.02), seed=seed, progress=False)
    return guide


def train_dense(
    model: Callable[..., Any], start: AutoNormal, x: Tensor, y: Tensor, seed: int
) -> AutoMultivariateNormal:
    """Train an AutoMultivariateNormal in the non-centred form from where a centred guide is.

    Parameters
    ----------
    model, x, y
        The problem, non-centred.
    start : AutoNormal
        Of the centred form, which finds the true coefficients where the other may not.
    seed : int
        For `pyro.set_rng_seed`.

    Returns
    -------
    AutoMultivariateNormal
        Trained.
    """
    values = start.median()
    values["b"] = values["b"] / (values["tau"] * values["lam"])
    init = init_to_value(values=values)
    guide = AutoMultivariateNormal(model, init_loc_fn=init, init_scale=0.05)
    bmr.fit(model, guide, x, y, num_epochs=4000, lr=decay(0.01), seed=seed, progress=False)
    return guide


def decay(lr: float) -> Callable[[float], float]:
    """Hold a learning rate for half of the training, then lower it to nearly nothing.

    Parameters
    ----------
    lr : float
        The rate.

    Returns
    -------
    callable
        From the fraction of the training to the rate.
    """
    return lambda fraction: lr * min(1.0, 2 * (1 - fraction)) + 1e-4


def rows(
    seed: int, centred: bool, guide: Any, x: Tensor, y: Tensor, coefficients: Tensor
) -> Iterator[dict[str, Any]]:
    """Reduce with every margin, and count.

    Parameters
    ----------
    seed, centred, guide, x, y, coefficients
        What was trained on what.

    Yields
    ------
    dict
        A row.
    """
    true = coefficients != 0
    for margin in MARGINS:
        select = bmr.by_evidence(margin=margin)
        result = bmr.reduce(guide, x, y, sites=["b"], select=select)
        kept, scores = result.masks["b"], result.scores["b"]
        measured = bmr.free_energy(result.model, result.guide, x, y, num_samples=300)
        yield {
            "seed": seed,
            "form": "centred" if centred else "non-centred",
            "guide": type(guide).__name__,
            "margin": margin,
            "kept_true": int(kept[true].sum()),
            "dropped_rest": int((~kept[~true]).sum()),
            "delta_f": round(result.delta_f, 2),
            "free_energy": round(measured[0], 2),
            "error": round(measured[1], 2),
            "lowest_true": round(float(scores[true].min()), 2),
            "highest_rest": round(float(scores[~true].max()), 2),
        }


if __name__ == "__main__":
    main()
