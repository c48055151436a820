"""What ``reduce(guide, x, y)`` costs and brings: the largest UCI networks, and MNIST.

Run with ``python benchmarks/measured.py --data-dir DIRECTORY``; writes ``benchmarks/measured.csv``
and fails if a budget is missed, or if F rises by more than two standard errors: 5 seconds for
D-50-O networks on UCI sets, 90 seconds for a 784-300-100-10 network on the 60,000 images of MNIST,
reduced by units and then elements, on two cores. Networks are trained for it, those of the UCI sets
by the settings of ``benchmarks/paper``, and kept in ``--networks``, so that a second run only
reduces. Seconds depend on the machine; ``seconds per forward pass`` is that of F at all rows once,
measured beside them. Each reduction follows one of a few rows, since in a new process torch takes
seconds to import what the graph of a model is read with.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from mnist import Digits, fit
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.datasets import load_mnist

RESULTS = Path(__file__).with_suffix(".csv")
UCI = ("powerplant", "naval", "kin8nm")
EPOCHS = 30

Case = tuple[str, Callable[..., Any], Any, tuple[torch.Tensor, ...], dict[str, Any], float]


def main() -> int:
    """Train, reduce, print and write; return 1 if a budget is missed or F rose."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--networks", type=Path, default=Path("build/networks"))
    options = parser.parse_args()
    options.networks.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, model, guide, data, how, budget in cases(options):
        start = time.perf_counter()
        bmr.free_energy(model, guide, *data, num_samples=4)
        forward = (time.perf_counter() - start) / 4
        bmr.reduce(guide, *(tensor[:10] for tensor in data), model=model, **how)
        start = time.perf_counter()
        result = bmr.reduce(guide, *data, model=model, **how)
        seconds = time.perf_counter() - start
        print(name, result, f"{seconds:.1f} s", sep="\n", flush=True)
        rows.append(
            {
                "network": name,
                "rows": len(data[0]),
                "weights": sum(site.total for site in result.sites),
                "pruned %": 100 * result.sparsity,
                "predicted": result.delta_f,
                "realised": result.realised,
                "error": result.realised_error,
                "seconds": seconds,
                "budget": budget,
                "seconds per forward pass": forward,
                "threads": torch.get_num_threads(),
            }
        )
        pd.DataFrame(rows).round(3).to_csv(RESULTS, index=False)
    missed = [row["network"] for row in rows if row["seconds"] > row["budget"]]
    rose = [row["network"] for row in rows if row["realised"] > 2 * row["error"]]
    print(f"over budget: {missed or 'none'}; F rose: {rose or 'none'}")
    return int(bool(missed or rose))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Train networks, or take those that were kept."""
    sys.path.insert(0, str(Path(__file__).with_name("paper")))
    from problems import load_problem, make_guide

    for name in UCI:
        problem = load_problem(name, None, options.data_dir)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = problem.make_model(problem.hidden)
        guide = make_guide(model)
        data, settings = (problem.x, problem.y), problem.settings
        kept = options.networks / f"{name}_local_0.pt"
        guide(*(tensor[:4] for tensor in data))
        if kept.exists():
            guide.load_state_dict(torch.load(kept))
        else:
            how = {"batch_size": settings.batch_size, "lr": settings.lr, "estimator": "local"}
            bmr.fit(model, guide, *data, num_epochs=settings.num_epochs, **how)
            torch.save(guide.state_dict(), kept)
        yield name, model, guide, data, {}, 5.0
    images = load_mnist(options.data_dir)
    x, y = images.x.flatten(1), images.y
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Digits()
    guide = AutoNormal(model, init_loc_fn=bmr.init_to_pretrained(model), init_scale=0.02)
    guide(x[:4], y[:4])
    kept = options.networks / f"mnist_{EPOCHS}.pt"
    if kept.exists():
        guide.load_state_dict(torch.load(kept))
    else:
        fit(model, guide, x, y, EPOCHS)
        torch.save(guide.state_dict(), kept)
    for name, groups in {
        "mnist, elements": bmr.elements,
        "mnist, units and elements": [bmr.units, bmr.elements],
    }.items():
        yield name, model, guide, (x, y), {"groups": groups}, 90.0


if __name__ == "__main__":
    sys.exit(main())
