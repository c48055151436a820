"""Seconds that ``import pyro_bmr`` adds to ``import torch, pyro``: whole processes, in turn.

    python benchmarks/import_time.py

writes `import_time.csv`, and fails if the difference of the medians is above the bound.
"""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

RESULTS = Path(__file__).with_suffix(".csv")
WAYS = {"torch and Pyro": "import torch, pyro", "pyro_bmr": "import torch, pyro, pyro_bmr"}
TIMES, BOUND = 10, 0.3


def main() -> None:
    """Measure, write, print."""
    # What is compiled is kept, as in an environment in which it was imported before.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    rows = []
    for round_ in range(-1, TIMES):
        for way, statement in WAYS.items():
            before, start = _seconds_of_children(), perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
            wall, work = perf_counter() - start, _seconds_of_children() - before
            if round_ >= 0:
                rows.append(
                    {"what": way, "wall (s)": f"{wall:.3f}", "processor (s)": f"{work:.3f}"}
                )
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for clock in ("wall (s)", "processor (s)"):
        alone, ours = (median(float(r[clock]) for r in rows if r["what"] == way) for way in WAYS)
        print(f"{clock}: torch and Pyro {alone:.2f}, pyro_bmr {ours - alone:+.2f} (medians)")
        if clock == "wall (s)":
            failed = ours - alone > BOUND
    if failed:
        sys.exit(f"Expected at most {BOUND} s more")


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
