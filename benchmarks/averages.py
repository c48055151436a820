"""How long `reduce`, `presence` and `average` take with a correlated posterior, and their errors.

Writes `averages.csv`: for the exact posteriors of regressions with correlated columns, the seconds
of each, and the largest Monte Carlo standard errors of presence and mean.
"""

import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from searches import regression

import pyro_bmr as bmr

SIZES = (12, 16, 17, 100, 500, 1000)


def measure(size):
    """Reduce and average one regression."""
    posterior = regression(0, size, size + size // 2, 0.5)

    def model():
        zero = torch.zeros(size, dtype=torch.float64)
        pyro.sample("w", dist.Normal(zero, 1.0).to_event(1))

    def guide():
        scale_tril = posterior.scale_tril
        pyro.sample("w", dist.MultivariateNormal(posterior.loc, scale_tril=scale_tril))

    row = {"elements": size}
    results = {}
    for verb in (bmr.reduce, bmr.presence, bmr.average):
        start = time.perf_counter()
        results[verb] = verb(guide, model=model)
        row[f"{verb.__name__} seconds"] = time.perf_counter() - start
    average = results[bmr.average]
    for what, action in (
        ("covariance", lambda: average.covariance),
        ("interval", average.interval),
        ("probability", lambda: average.probability({"w[0]": 1.0})),
    ):
        start = time.perf_counter()
        action()
        row[f"{what} seconds"] = time.perf_counter() - start
    for name, errors in (("presence", average.presence_error), ("mean", average.mean_error)):
        row[f"{name} error"] = float(errors["w"].max()) if errors else 0.0
    return row


if __name__ == "__main__":
    table = pd.DataFrame([measure(size) for size in (12, *SIZES)]).iloc[1:]
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.3g")
    print(table.to_string(index=False))
