"""How often the greedy search finds the best set, and what it takes in time and memory.

Writes `searches.csv`: for random regressions with 12 correlated columns, how many of 100 optima
each search finds and what it misses by; for large posteriors, seconds, MiB and ΔF.
"""

import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from pyro_bmr.mathematics.evidence import delta_f_spike, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.greedy import search_greedily
from pyro_bmr.mathematics.subset_search import search_blocks
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets

UNIT_NORMAL_AT_ZERO = -0.5 * math.log(2 * math.pi)
NOISE = 0.5


def _main():
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]).values())
        return
    rows = [count_optima(size, how) for size in (15, 40) for how in (0.0, 0.5, 0.9, 0.99, "mixed")]
    # A process each, so that its peak of memory is its own.
    for name in LARGE:
        command = [sys.executable, __file__, name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        values = map(float, output.split())
        rows.append({"problem": name} | dict(zip(MEASURED, values, strict=True)))
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")
    print(table.to_string(index=False))


def count_optima(size, how):
    """Count the optima of 100 regressions with 12 columns that each search finds."""
    missed = {"greedy": [], "blocks": []}
    for seed in range(100):
        posterior = regression(seed, 12, size, how)
        log_prior = _at_zero(12)
        best = delta_f_of_all_subsets(posterior, log_prior).min().item()
        for name, search in (("greedy", search_greedily), ("blocks", search_blocks)):
            gap = _joint(posterior, log_prior, search(posterior, log_prior)) - best
            missed[name] += [gap] if gap > 1e-6 else []
    row = {"problem": f"12 columns, {size} rows, correlation {how}"}
    for name, gaps in missed.items():
        row |= {f"{name} optima": 100 - len(gaps), f"{name} worst gap": max(gaps, default=0.0)}
    return row


LARGE = {
    "dense, 2,000 weights": lambda: regression(0, 2000, 3000, 0.5),
    "rank 20, 1,000,000 weights": lambda: low_rank(1_000_000, 20),
}
MEASURED = ("seconds", "MiB", "dropped", "delta_f", "naive delta_f")


def measure(name):
    """Search one large posterior, and compare with dropping all that is worth it by itself."""
    posterior = LARGE[name]()
    log_prior = _at_zero(len(posterior.loc))
    start = time.perf_counter()
    dropped = search_greedily(posterior, log_prior)
    seconds, memory = time.perf_counter() - start, _peak()
    naive = delta_f_spike(posterior.marginals(), log_prior) <= 0
    values = (
        seconds,
        memory,
        dropped.sum().item(),
        _joint(posterior, log_prior, dropped),
        _joint(posterior, log_prior, naive),
    )
    return dict(zip(MEASURED, values, strict=True))


def regression(seed, columns, rows, how):
    """Give the exact posterior of correlated columns, half of which do something."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if how == "mixed":
        x = draw(rows, columns) @ (torch.eye(columns) + draw(columns, columns)) / 3
    else:
        x = (1 - how) ** 0.5 * draw(rows, columns) + how**0.5 * draw(rows, 1)
    weights = torch.where(torch.rand(columns, generator=generator) < 0.5, draw(columns), 0.0)
    y = x @ weights + NOISE * draw(rows)
    precision = x.mT @ x / NOISE**2 + torch.eye(columns).double()
    covariance = precision.inverse()
    return Dense(covariance @ x.mT @ y / NOISE**2, torch.linalg.cholesky(covariance))


def low_rank(size, rank):
    """Give a posterior in which a tenth of the weights is far from zero."""
    torch.manual_seed(0)
    loc = torch.where(torch.rand(size) < 0.1, torch.randn(size), 0.05 * torch.randn(size))
    factor, diagonal = 0.1 * torch.randn(size, rank), 0.005 + 0.01 * torch.rand(size)
    return LowRank(loc, factor, diagonal).to(torch.float64)


def _at_zero(size):
    return torch.full((size,), UNIT_NORMAL_AT_ZERO, dtype=torch.float64)


def _joint(posterior, log_prior, dropped):
    return delta_f_spike_chain(posterior.split(dropped)[0], log_prior[dropped]).sum().item()


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    _main()
