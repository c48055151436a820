"""One reduction of a 13-50-1 network on Boston, against the numbers of the paper.

Run with ``python benchmarks/boston.py --data-dir DIRECTORY``; writes ``benchmarks/boston.csv``.
Inputs are standardised, the target is as it is, the free energy is that of all 506 rows, as in
Beckers et al. (2022), arXiv:2210.09134: 1626 before and 1479 after, by sampling weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer.autoguide import AutoNormal, init_to_mean
from rich.progress import Progress

import pyro_bmr as bmr
from pyro_bmr import datasets, demo


def run(seed: int, epochs: int, directory: Path | None, progress: Progress) -> dict[str, float]:
    """Train, reduce and measure once.

    Returns
    -------
    dict of float
        A row of the table.
    """
    data = datasets.load("boston", directory)
    x, y = demo.Standardization.of(data.x).apply(data.x), data.y.squeeze(-1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = demo.Regression(x.shape[1])
    guide = AutoNormal(model, init_loc_fn=init_to_mean, init_scale=1.0)
    demo.train(model, guide, x, y, epochs=epochs, batch_size=16, lr=1e-2, progress=progress)
    result = bmr.reduce(guide)
    before, before_error = demo.free_energy(model, guide, x, y, draws=1000)
    after, after_error = demo.free_energy(result.model, result.guide, x, y, draws=1000)
    return {
        "seed": seed,
        "pruned %": 100 * result.sparsity,
        "predicted_delta_f": result.delta_f,
        "free_energy_before": before,
        "free_energy_before_error": before_error,
        "free_energy_after": after,
        "free_energy_after_error": after_error,
    }


def main() -> None:
    """Run all seeds and print the table with its mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=750)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with Progress() as progress:
        rows = [run(s, options.epochs, options.data_dir, progress) for s in options.seeds]
    table = pd.DataFrame(rows).set_index("seed")
    table.to_csv(options.output, float_format="%.3f")
    print(table.round(2).to_string())
    print("mean", table.mean().round(2).to_dict())


if __name__ == "__main__":
    main()
