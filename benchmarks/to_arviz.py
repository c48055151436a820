"""What `to_arviz` takes: 1,000 draws of networks of up to 100,000 weights.

Run with ``python benchmarks/to_arviz.py``; writes ``benchmarks/to_arviz.csv`` and fails if a bound
is missed: with the largest network less than 10 seconds and 2 GiB.

Each network has two hidden layers, a mean-field normal posterior and 300 data, and is measured in
a process of its own. The time is that of the call of `to_arviz`, with all groups, the prior too,
and the import of ArviZ in it. The memory is the peak resident set size of the whole process, with
Python, torch and ArviZ; the draws of posterior and prior alone are 4 bytes for each draw and
weight, twice. CPU seconds are of the same call and of all cores together: they hold where others
use the machine too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bmr as bmr

RESULTS = Path(__file__).with_suffix(".csv")
WIDTHS = ((20, 50, 10, 10), (100, 80, 25, 10), (784, 110, 110, 10))
DRAWS, ROWS = 1000, 300
SECONDS, MIB = 10.0, 2048.0


def measure(widths: tuple[int, ...]) -> dict[str, float]:
    """Convert the draws of one network, in this process."""
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
    net = bmr.bayesianize(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoNormal(model)
    x, y = torch.randn(ROWS, widths[0]), torch.randint(widths[-1], (ROWS,))
    guide(x, y)
    result = bmr.reduce(guide, select=bmr.baselines.random(0.5, seed=0))
    start, start_cpu = time.perf_counter(), time.process_time()
    data = result.to_arviz(x, y, num_samples=DRAWS)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    weights = sum(one[0, 0].size for one in data["posterior"].data_vars.values())
    # On macOS in bytes, elsewhere in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    times = {"seconds": round(seconds, 2), "CPU seconds": round(cpu, 2)}
    return {"weights": weights, "draws": DRAWS} | times | {"MiB": round(mib)}


def main() -> None:
    """Measure every network, and write what came out."""
    rows = []
    for widths in WIDTHS:
        command = [sys.executable, __file__, json.dumps(widths)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        print(rows[-1])
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS, index=False)
    last = table.iloc[-1]
    if last["seconds"] > SECONDS or last["MiB"] > MIB:
        sys.exit(f"expected at most {SECONDS} seconds and {MIB} MiB for the last network")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(tuple(json.loads(sys.argv[1])))))
    else:
        main()
