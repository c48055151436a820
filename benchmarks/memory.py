"""Bytes a weight that `fit` and `reduce` take: on the way, at most, and after.

Run with ``python benchmarks/memory.py``, or with ``--sizes 2e7 1e8``; writes
``benchmarks/memory.csv`` and the table of ``docs/mathematics/training.md``, and fails if a bound is
missed. Each measurement has a process of its own, which first does the same with a million weights,
so that libraries are loaded, and hands free memory back. Memory is what is resident and belongs to
no file (``RssAnon`` of Linux), looked at every two milliseconds. That of training counts from
before the guide, whose two parameters of float32 are 8 bytes; that of `reduce` beyond the guide.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

RESULTS = Path(__file__).with_suffix(".csv")
DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "mathematics" / "training.md", DOCS / "guide" / "gpu-and-large-data.md"
SIZES = (2e7, 1e8)
WARM_UP = 1 << 20
EPOCHS = 4
# Bytes a weight: while steps are taken, and at any time in `reduce`.
BOUNDS = {("fit", "resident"): 44, ("reduce", "peak"): 12, ("reduce", "after"): 12}


def main() -> int:
    """Measure, print and write; return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="numbers of weights")
    parser.add_argument("--verbs", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--alone", action="store_true", help="in this process, printed as JSON")
    options = parser.parse_args()
    if options.alone:
        (verb,), (size,) = options.verbs, options.sizes
        print(json.dumps(MEASURES[verb](int(size))))
        return 0
    rows = [
        {"verb": verb, "weights": int(size)} | measure_alone(verb, size)
        for verb in options.verbs
        for size in options.sizes
    ]
    table = pd.DataFrame(rows).round(1)
    print(table.to_string(index=False))
    table.to_csv(RESULTS, index=False)
    for page in PAGES:
        page.write_text(fill(page.read_text(), pd.read_csv(RESULTS)))
    missed = find_missed(table)
    print(f"over a bound: {missed or 'none'}")
    return int(bool(missed))


def find_missed(table: pd.DataFrame) -> list[str]:
    """Name the numbers that are over their bound."""
    return [
        f"{verb} of {row['weights']:,}, {what}: {row[what]} > {bound}"
        for (verb, what), bound in BOUNDS.items()
        for _, row in table[table["verb"] == verb].iterrows()
        if row[what] > bound
    ]


def measure_alone(verb: str, size: float) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--alone", "--verbs", verb, "--sizes", str(size)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return dict(json.loads(shown.splitlines()[-1]))


def measure_fit(size: int) -> dict[str, float]:
    """Return bytes a weight of training, the guide's own among them."""
    train(WARM_UP, [])
    before, during = resident(), []
    with watched() as peak:
        guide = train(size, during)
    after = resident()
    del guide
    # The first epoch is still compiled in.
    numbers = {"resident": median(during[1:]), "peak": peak[0], "after": after}
    return {what: (value - before) / size for what, value in numbers.items()}


def measure_reduce(size: int) -> dict[str, float]:
    """Return bytes a weight of `reduce`, without those of the guide that it is given."""
    bmr.reduce(spread_guide(WARM_UP))
    guide = spread_guide(size)
    before = resident()
    with watched() as peak:
        result = bmr.reduce(guide)
    after = resident()
    del result
    numbers = {"resident": after, "peak": peak[0], "after": after}
    return {what: (value - before) / size for what, value in numbers.items()}


MEASURES: dict[str, Callable[[int], dict[str, float]]] = {
    "fit": measure_fit,
    "reduce": measure_reduce,
}


def make_model(size: int) -> Callable[..., None]:
    """Return a model in which every weight has a gradient, and the likelihood costs little."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * w.mean(), 1.0), obs=y)

    return model


def train(size: int, during: list[int]) -> AutoNormal:
    """Train for a few epochs of the thousand steps from which on `fit` compiles."""
    pyro.clear_param_store()
    model = make_model(size)
    guide = AutoNormal(model)

    def look(epoch: Any) -> None:
        during.append(resident())
        if epoch.epoch == EPOCHS:
            raise _EnoughError

    try:
        data = torch.ones(2), torch.ones(2)
        bmr.fit(model, guide, *data, num_epochs=1000, callback=look, progress=False)
    except _EnoughError:
        pass
    return guide


class _EnoughError(Exception):
    """All epochs that are looked at are over."""


def spread_guide(size: int) -> AutoNormal:
    """Make a guide of dead and live weights without training it."""
    pyro.clear_param_store()
    guide = AutoNormal(make_model(size), init_scale=0.5)
    guide(torch.ones(2), torch.ones(2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in guide.named_parameters():
        parameter.data.normal_(0.0, 0.3 if "loc" in name else 1.0, generator=generator)
    return guide


def resident() -> int:
    """Return the bytes of memory that are resident and of no file, once free ones are back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return read_resident()


def read_resident() -> int:
    """Return the bytes of memory that are resident and of no file."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """Look at the memory all the time; yields a list of the highest number so far."""
    peak, stopped = [0], threading.Event()

    def watch() -> None:
        while not stopped.is_set():
            peak[0] = max(peak[0], read_resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stopped.set()
        thread.join()


def fill(page: str, table: pd.DataFrame) -> str:
    """Put the table into the page, between the lines that name it."""
    lines = ["| | weights | on the way | at most | after |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{row['verb']}` | {row['weights']:,} | {row['resident']:.1f} | {row['peak']:.1f} "
        f"| {row['after']:.1f} |"
        for _, row in table.iterrows()
    ]
    text = "\n".join(lines)
    pattern = r"(<!-- benchmarks/memory.csv -->\n).*?(<!-- end -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S)
    if count != 1:
        msg = f"got {count} places for the table in the page. Expected 1"
        raise ValueError(msg)
    return page


if __name__ == "__main__":
    sys.exit(main())
