"""What each search finds, and what the greedy one takes in time and memory.

Writes `searches.csv`: for random regressions with 12 correlated columns, how many of 100 optima
the greedy search and SPM's rule find and what they miss by; for 60 columns, how often each of the
two finds the better set, and by how much; the same for posteriors of dynamic causal models, with
the nats that each gains, if `PYRO_BMR_DATA` names a directory that has them; for large posteriors,
seconds, MiB and ΔF.
"""

import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.io import loadmat

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
    kinds = (0.0, 0.5, 0.9, 0.99, "mixed")
    rows = [count_optima(size, how) for size in (15, 40) for how in kinds]
    rows += [compare_searches(size, how) for size in (75, 200) for how in kinds]
    rows += [compare_on_dcm(name) for name in DCM if DCM_DIRECTORY.is_dir()]
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


def compare_searches(size, how):
    """Count of 20 regressions with 60 columns in how many the greedy search or SPM's is better."""
    gains = []
    for seed in range(20):
        posterior = regression(seed, 60, size, how)
        greedy, blocks = _both(posterior, _at_zero(60))
        gains.append(blocks - greedy)
    return {
        "problem": f"60 columns, {size} rows, correlation {how}",
        "greedy better": sum(gain > 1e-6 for gain in gains),
        "blocks better": sum(gain < -1e-6 for gain in gains),
        "greedy gains more": max(0.0, *gains),
        "blocks gains more": max(0.0, *(-gain for gain in gains)),
    }


# Of these the priors are independent.
DCM = ("erp_a", "fmri_a", "fmri_b")
DCM_DIRECTORY = Path(os.environ.get("PYRO_BMR_DATA", "")) / "dcm"


def compare_on_dcm(name):
    """Switch off what two searches would of all free parameters of a dynamic causal model."""
    dcm = loadmat(DCM_DIRECTORY / f"{name}.mat")["DCM"][0, 0]
    prior = dcm["M"][0, 0]
    loc, prior_loc = (np.concatenate(_leaves(tree)) for tree in (dcm["Ep"], prior["pE"]))
    covariance, prior_covariance = (_full(tree) for tree in (dcm["Cp"], prior["pC"]))
    variance = prior_covariance.diagonal()
    free = variance > 0
    prior_scale = torch.tensor(variance[free]).sqrt()
    log_prior = torch.distributions.Normal(torch.tensor(prior_loc[free]), prior_scale).log_prob(
        torch.zeros(free.sum(), dtype=torch.float64)
    )
    tril = torch.linalg.cholesky(torch.tensor(covariance[np.ix_(free, free)]))
    greedy, blocks = _both(Dense(torch.tensor(loc[free]), tril), log_prior)
    return {
        "problem": f"dynamic causal model {name}, {free.sum()} parameters",
        "greedy nats": -greedy,
        "blocks nats": -blocks,
    }


def _both(posterior, log_prior):
    return (
        _joint(posterior, log_prior, search(posterior, log_prior))
        for search in (search_greedily, search_blocks)
    )


def _full(tree):
    tree = tree.toarray() if hasattr(tree, "toarray") else tree
    if tree.dtype.names or 1 in tree.shape:
        return np.diag(np.concatenate(_leaves(tree)))
    return tree.astype(float)


def _leaves(tree):
    """Give the numbers of a nested structure in the order of SPM, column by column."""
    tree = tree.toarray() if hasattr(tree, "toarray") else tree
    if tree.dtype.names:
        cells = [record[name] for record in tree.ravel("F") for name in tree.dtype.names]
    elif tree.dtype == object:
        cells = list(tree.ravel("F"))
    else:
        return [tree.ravel("F").astype(float)]
    return [leaf for cell in cells for leaf in _leaves(cell)] or [np.zeros(0)]


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
