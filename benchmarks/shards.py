"""The memory that `reduce_files` takes: 200 million weights in two shards.

Run with ``python benchmarks/shards.py --work FOLDER``, which takes 4 GB there; writes
``benchmarks/shards.csv`` and fails if anonymous memory, as which files do not count, goes above
half a gibibyte. Times are seconds on a machine that others may use.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pyro.distributions as dist
import torch
from safetensors.torch import save_file

import pyro_bmr as bmr

RESULTS = Path(__file__).with_suffix(".csv")
SHARD = 100_000_000
MOST_MIB = 512


def main() -> int:
    """Measure, print and write; return 1 if it took too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    paths = [write(options.work / f"shard-{i}.safetensors", i) for i in range(options.shards)]
    rows = []
    for select in (bmr.by_evidence(), bmr.top_k(len(paths) * SHARD // 10)):
        out = options.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with Peak() as peak:
            begun = time.perf_counter()
            table = bmr.reduce_files(paths, out, prior=dist.Normal(0.0, 1.0), select=select)
            seconds = time.perf_counter() - begun
        row = {"select": repr(select), "weights": table.elements.sum(), "kept": table.kept.sum()}
        rows.append(row | {"peak (MiB)": peak.mib, "before (MiB)": peak.before, "seconds": seconds})
    found = pd.DataFrame(rows).set_index("select").round(1)
    found.to_csv(RESULTS)
    print(found.to_string())
    return int((found["peak (MiB)"] > MOST_MIB).any())


def write(path: Path, seed: int) -> Path:
    """Write a shard, if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        loc, scale = 0.2 * torch.randn(SHARD), 0.02 + 0.1 * torch.rand(SHARD)
        save_file({f"layers.{seed}.loc": loc, f"layers.{seed}.scale": scale}, path)
    return path


class Peak:
    """Watches the anonymous memory of this process, as Linux counts it."""

    def __enter__(self) -> Peak:
        self.before = self.mib = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.mib = max(self.mib, _anonymous())


def _anonymous() -> float:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
