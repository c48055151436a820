"""Try to predict ΔF better, and measure: ``python benchmarks/paper/predictions.py --networks DIR``.

Takes the networks that ``benchmarks/paper --networks DIR`` has kept and drops a quarter, half and
all of what the evidence says, in its order. Writes ``predictions.csv``, one row per set of weights:
what is predicted in nats by ``evidence`` alone, with the ``gradient`` of F, with the
``interaction`` of what goes together, with ``both``, and with the gradient taken anew after each
eighth (``again``), and what is ``realised``. A run that was stopped goes on.

With u = -μ of what is dropped, the interaction is ½(uᵀHu - Σ u²/σ²): the curvature of F along u,
from its gradients at two points, less what the evidence counts of it already.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from problems import load_problem, make_guide
from rich.progress import track
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.realised import ROWS, make_meter
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.trials import Trials

RESULTS = Path(__file__).with_name("predictions.csv")
NETWORK = ["dataset", "estimator", "seed"]
COLUMNS = [
    *(*NETWORK, "part", "dropped", "evidence", "gradient", "interaction", "both", "again"),
    *("realised", "error", "seconds"),
]
PARTS = (0.25, 0.5, 1.0)
STEPS, DRAWS, STEP = 8, 16, 0.1

Masks = dict[str, Tensor]


def main() -> None:
    """Predict and measure what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.output.exists():
        pd.DataFrame(columns=COLUMNS).to_csv(options.output, index=False)
    done = set(pd.read_csv(options.output)[NETWORK].itertuples(index=False, name=None))
    # Seed by seed, so that a part of the run is a smaller experiment.
    paths = sorted(options.networks.glob("*_*_*.pt"), key=lambda path: path.stem.split("_")[::-1])
    for path in track(paths, "networks"):
        dataset, estimator, seed = path.stem.split("_")
        if (dataset, estimator, int(seed)) not in done:
            rows = [
                {"dataset": dataset, "estimator": estimator, "seed": int(seed)} | row
                for row in predict(dataset, path, options.data_dir)
            ]
            table = pd.DataFrame(rows, columns=COLUMNS).round(4)
            table.to_csv(options.output, mode="a", header=False, index=False)


def predict(dataset: str, path: Path, directory: Path | None) -> Iterator[Mapping[str, float]]:
    """Predict what dropping parts of a trained network does, and measure it.

    Yields
    ------
    dict
        A row of the table, without the name of the network.
    """
    scores = _read(dataset, path, directory)
    trials = Trials(scores.decision, DRAWS, ROWS, seed=0)
    delta_f, shift = scores.delta_f, trials.first_order()
    for part in PARTS:
        start = time.perf_counter()
        masks = _drop(delta_f, part)
        evidence = scores.joint_delta_f(masks)
        gradient = sum(float(one[~masks[name]].sum()) for name, one in shift.items())
        interaction = _interaction(scores.decision, masks)
        # As precisely as trials go, wherever it may be.
        realised, error = trials.measure(masks, errors=float("inf"))
        yield {
            "part": part,
            "dropped": sum(int((~mask).sum()) for mask in masks.values()),
            "evidence": evidence,
            "gradient": evidence + gradient,
            "interaction": evidence + interaction,
            "both": evidence + gradient + interaction,
            "again": _step_by_step(scores, part),
            "realised": realised,
            "error": error,
            "seconds": time.perf_counter() - start,
        }


def _read(dataset: str, path: Path, directory: Path | None) -> Scores:
    problem = load_problem(dataset, None, directory)
    pyro.clear_param_store()
    model = problem.make_model(problem.hidden)
    guide = make_guide(model)
    guide(problem.x[:4], problem.y[:4])
    guide.load_state_dict(torch.load(path))
    seen = []

    def look(scores: Scores) -> Mapping[str, Tensor]:
        seen.append(scores)
        return scores.kept

    bmr.reduce(guide, problem.x, problem.y, model=model, select=look)
    return seen[0]


def _drop(delta_f: Mapping[str, Tensor], part: float) -> Masks:
    """Keep all but a part of what the evidence says, its most negative first."""
    flat = torch.cat([one.reshape(-1) for one in delta_f.values()]).sort().values
    count = round(part * int((flat < 0).sum()))
    return {name: one >= flat[count] for name, one in delta_f.items()}


def _interaction(decision: Any, masks: Masks) -> float:
    """Return ½(uᵀHu - Σ u²/σ²) of F in nats, by a finite difference of its gradient."""
    before, after = _gradients(decision, masks, 0.0), _gradients(decision, masks, STEP)
    total = 0.0
    for factor, first, second in zip(decision.factors, before, after, strict=True):
        if isinstance(factor, IndependentFactor) and factor.site.name in masks:
            gone = ~masks[factor.site.name]
            along = -factor.loc * gone
            curvature = (along * (second - first)).sum() / STEP
            total += 0.5 * float(curvature - (along / factor.stored.scale)[gone].square().sum())
    return total


def _gradients(decision: Decision, masks: Masks, step: float) -> list[Tensor]:
    """Return the gradient of F by the means, a step towards zero of those that go."""
    model, guide, _ = decision.assemble()
    for part, factor in zip(guide.parts, decision.factors, strict=True):
        if isinstance(factor, IndependentFactor) and factor.site.name in masks:
            part.loc_unconstrained.data -= step * factor.loc * ~masks[factor.site.name]
    halves = make_meter(decision, ROWS, seed=0).differentiate((model, guide), DRAWS, {})
    return [
        (one.get("loc_unconstrained", 0) + two.get("loc_unconstrained", 0)) / 2
        for one, two in zip(*halves, strict=True)
    ]


def _step_by_step(scores: Scores, part: float) -> float:
    """Add up what is predicted of each eighth, with the gradient at what the last has left."""
    trials, total, kept = Trials(scores.decision, DRAWS, ROWS, seed=0), 0.0, scores.kept
    for step in range(1, STEPS + 1):
        shift, masks = trials.first_order(), _drop(scores.delta_f, part * step / STEPS)
        total += scores.given(kept).joint_delta_f(masks)
        total += sum(float(one[kept[name] & ~masks[name]].sum()) for name, one in shift.items())
        trials.measure(masks)
        trials.accept()
        kept = masks
    return total


if __name__ == "__main__":
    main()
