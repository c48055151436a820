"""How time and memory of the verbs grow with the number of elements, over three decades and more.

Run with ``python benchmarks/scaling.py``, which takes a quarter of an hour on two cores that others
use too, and goes on where it was stopped; writes ``benchmarks/scaling.csv``, the exponents in
``benchmarks/scaling_exponents.csv``, and figure and tables of ``docs/how-it-grows.md`` (``--page``:
these alone, from the files that are there).

Each verb at each size has a process and a thread of its own, and is called once before, at a small
size. Seconds are the least of three calls, or of fewer if these take longer than 20 seconds; memory
is the highest of the first call beyond what was there before (see ``memory.py``). Of `fit` it is
the least time of a compiled step, and what is resident between steps, the guide's own among it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from memory import WARM_UP, make_model, resident, spread_guide, watched
from pyro.infer.autoguide import AutoNormal
from rich.progress import Progress
from scaling_page import EXPONENTS, RESULTS, write_page
from searches import regression
from torch import Tensor, nn

import pyro_bmr as bmr

CALLS, ENOUGH_SECONDS = 3, 20.0
EPOCHS, EPOCH_SECONDS = 12, 5.0
DRAWS, STEPS = 100, 200
THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the file yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="from the files that are there")
    parser.add_argument("--quick", action="store_true", help="two small sizes, in this process")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measure(options.verbs[0], options.alone)))
        return
    if not options.page:
        measure_missing(options.verbs, options.output, quick=options.quick)
    if not options.quick:
        write_page(options.output, EXPONENTS)


def measure_missing(verbs: list[str], path: Path, *, quick: bool) -> None:
    """Measure one after the other, and add each to the file at once."""
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["verb", "size"])
    done = set(zip(known["verb"], known["size"], strict=True))
    sizes = {verb: VERBS[verb].sizes[:2] if quick else VERBS[verb].sizes for verb in verbs}
    cases = [(v, n) for v in verbs for n in sizes[v] if (v, n) not in done]
    with Progress() as progress:
        for verb, size in progress.track(cases, description="measuring"):
            found = measure(verb, size) if quick else measure_alone(verb, size)
            row = {"verb": verb, "size": size} | found
            table = pd.DataFrame([row]).round({"seconds": 6, "MiB": 2})
            table.to_csv(path, mode="a", header=not path.exists(), index=False)
            progress.console.print(row)


def measure_alone(verb: str, size: int) -> dict[str, float]:
    """Measure in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--verbs", verb, "--alone", str(size)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | THREAD
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(verb: str, size: int) -> dict[str, float]:
    """Return seconds, MiB and how often that was timed."""
    torch.set_num_threads(1)
    return VERBS[verb].measure(size)


def measure_fit(size: int) -> dict[str, float]:
    """Return the seconds of a compiled step, and what is resident between steps."""
    time_epochs(1000, 1)
    before = resident()
    steps = max(1, 1_000_000 // size)
    times, held = time_epochs(size, steps)
    mib = (median(held) - before) / 2**20
    return {"seconds": min(times) / steps, "MiB": mib, "calls": len(times) * steps}


def time_epochs(size: int, steps: int) -> tuple[list[float], list[int]]:
    """Train for some epochs; return the seconds and the memory of each after the first."""
    pyro.clear_param_store()
    model = make_model(size)
    guide, data = AutoNormal(model), (torch.ones(2 * steps), torch.ones(2 * steps))
    times: list[float] = []
    held: list[int] = []
    begun: list[float] = []

    def look(epoch: Any) -> None:
        if begun:
            times.append(time.perf_counter() - begun[0])
            held.append(resident())
        if epoch.epoch > EPOCHS or sum(times) > EPOCH_SECONDS and len(times) >= CALLS:
            raise _EnoughError
        begun[:] = [time.perf_counter()]

    options = {"num_epochs": 1000, "batch_size": 2, "progress": False}
    try:
        bmr.fit(model, guide, *data, **options, callback=look)
    except _EnoughError:
        pass
    return times, held


class _EnoughError(Exception):
    """All epochs that are looked at are over."""


def measure_calls(prepare: Callable[[int], Callable[[], object]], warm_up: int) -> Measure:
    """Make the measurement of a verb, given what makes a problem of a size and returns its call."""

    def measure_one(size: int) -> dict[str, float]:
        prepare(warm_up)()
        call = prepare(size)
        before = resident()
        with watched() as peak:
            times = [_time(call)]
        mib = max(0.0, (peak[0] - before) / 2**20)
        while len(times) < CALLS and sum(times) < ENOUGH_SECONDS:
            times.append(_time(call))
        return {"seconds": min(times), "MiB": mib, "calls": len(times)}

    return measure_one


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reduce_independent(size: int) -> Callable[[], object]:
    """Return a reduction in closed form of independent weights."""
    guide = spread_guide(size)
    return lambda: bmr.reduce(guide)


def find_presence(size: int) -> Callable[[], object]:
    """Return the presence of independent weights."""
    guide = spread_guide(size)
    return lambda: bmr.presence(guide)


def reduce_correlated(size: int) -> Callable[[], object]:
    """Return the greedy search among the coefficients of a regression with correlated columns."""
    posterior = correlated_posterior(size)
    return lambda: bmr.reduce(posterior)


def walk_correlated(size: int) -> Callable[[], object]:
    """Return the presence of the same coefficients."""
    posterior = correlated_posterior(size)
    return lambda: bmr.presence(posterior, num_samples=STEPS)


def correlated_posterior(size: int) -> bmr.Posterior:
    """Return a dense posterior under a unit normal prior."""
    exact = regression(0, size, size + size // 2, 0.5)
    return bmr.Posterior(exact.loc, covariance=exact.covariance, prior_scale=1.0)


def compact_network(size: int) -> Callable[[], object]:
    """Return the compaction of a network with two hidden layers, of which half of the units go."""
    width = round((size / 2) ** 0.5 - 0.75)
    first, second = nn.Linear(width, width), nn.Linear(width, width)
    net = bmr.bayesianize(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 1)))

    def model(x: Tensor, y: Tensor) -> None:
        loc = net(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    pyro.clear_param_store()
    guide, data = AutoNormal(model), (torch.randn(10, width), torch.randn(10))
    guide(*data)
    half = bmr.baselines.random(0.5, seed=0)
    result = bmr.reduce(guide, groups=bmr.units, select=half)
    return lambda: result.compact(*data)


def convert_to_arviz(size: int) -> Callable[[], object]:
    """Return the conversion of draws of a posterior and its prior."""
    model, data = make_model(size), (torch.ones(2), torch.ones(2))
    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide(*data)
    return lambda: bmr.to_arviz(model, guide, *data, num_samples=DRAWS)


Measure = Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class Verb:
    """How it is measured, and at which numbers of elements."""

    measure: Measure
    sizes: tuple[int, ...]


def half_decades(first: int, last: int) -> tuple[int, ...]:
    """Return 1, 3, 10, 30, ... times the first, up to the last; or 3, 10, 30, ..."""
    found = [first]
    while found[-1] < last:
        digit = int(str(found[-1])[0])
        found.append(found[-1] * 3 if digit == 1 else found[-1] // 3 * 10)
    return tuple(found)


VERBS = {
    "fit": Verb(measure_fit, (10_000, 100_000, *half_decades(1_000_000, 30_000_000))),
    "reduce": Verb(measure_calls(reduce_independent, WARM_UP), half_decades(100_000, 100_000_000)),
    "presence": Verb(measure_calls(find_presence, WARM_UP), half_decades(30_000, 30_000_000)),
    "compact": Verb(measure_calls(compact_network, 10_000), half_decades(10_000, 10_000_000)),
    "to_arviz": Verb(measure_calls(convert_to_arviz, 1000), half_decades(1000, 1_000_000)),
    "reduce, correlated": Verb(measure_calls(reduce_correlated, 30), half_decades(3, 3000)),
    "presence, correlated": Verb(measure_calls(walk_correlated, 30), half_decades(3, 3000)),
}


if __name__ == "__main__":
    main()
