"""The experiments of the paper, and those beyond it: each trains a network and prunes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, repeat
from pathlib import Path
from typing import Any

import pyro
import torch
from measuring import FreeEnergy, Meter, Scores, predictive_scores
from problems import Problem, load_problem, make_guide

import pyro_bmr as bmr
from pyro_bmr.selection.selections import Selection

MAX_ROUNDS = 20
DRAWS = 24
COLUMNS = (
    *("experiment", "dataset", "estimator", "seed", "split", "method", "round", "pruned"),
    *("free_energy", "free_energy_error", "complexity", "accuracy"),
    *("predicted_delta_f", "realised_delta_f", "realised_error"),
    *("rmse", "test_log_likelihood", "seconds"),
)
BASELINES: Mapping[str, Callable[[float], Selection]] = {
    "snr": bmr.baselines.snr,
    "spr": bmr.baselines.spr,
    "magnitude": bmr.baselines.magnitude,
    "random": bmr.baselines.random,
}
# Reductions of a trained network in one go, of which F is measured before and after.
MARGINS = (-0.1, -0.3, -1.0, -3.0)
MEASURED: Mapping[str, Selection] = {
    "measured": bmr.by_free_energy(progress=False),
    "evidence": bmr.by_evidence(),
    **{f"margin {margin}": bmr.by_free_energy(margin, progress=False) for margin in MARGINS},
}


@dataclass(frozen=True)
class Cell:
    """One network, and what is done with it. Its rows are written together.

    Without a split it learns all rows, for one-shot curves and for loops by these methods. With one
    it learns the training rows, and is scored on the test rows.
    """

    dataset: str
    estimator: str
    seed: int
    split: int | None
    curves: tuple[str, ...]
    loops: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A row of the table: one network at one moment.

    F is measured after training in the experiments ``iterative`` and ``splits``, and directly after
    pruning in ``one-shot``. Both ΔF are of the reduction of this round alone.
    """

    experiment: str
    method: str
    round: int
    pruned: float
    measured: FreeEnergy
    predicted_delta_f: float = 0.0
    realised_delta_f: float = 0.0
    realised_error: float | None = None
    scores: Scores = Scores()


def run(
    cell: Cell, directory: Path | None, epochs: float = 1.0, networks: Path | None = None
) -> list[dict[str, Any]]:
    """Compute all points of a cell.

    Parameters
    ----------
    cell : Cell
        Which.
    directory : Path, optional
        Of the data.
    epochs : float
        Part of the numbers of epochs that is trained.
    networks : Path, optional
        Where trained networks are kept, so that each is trained once.

    Returns
    -------
    list of dict
        The rows of the table.
    """
    torch.set_num_threads(1)
    problem = load_problem(cell.dataset, cell.split, directory, epochs)
    rows = []
    start = time.perf_counter()
    for point in _points(cell, problem, networks):
        seconds = {"seconds": time.perf_counter() - start}
        values = vars(cell) | vars(point) | vars(point.measured) | vars(point.scores) | seconds
        rows.append({column: values[column] for column in COLUMNS})
        start = time.perf_counter()
    return rows


def _points(cell: Cell, problem: Problem, networks: Path | None) -> Iterator[Point]:
    network = _Network(problem, cell.estimator, cell.seed, Meter(problem))
    name = f"{cell.dataset}_{cell.estimator}_{cell.seed}.pt"
    kept = networks / name if networks and cell.split is None else None
    full = network.train(problem.hidden, kept)
    if cell.curves:
        yield from network.curves(full, cell.curves)
    if not cell.loops:
        return
    experiment = "iterative" if cell.split is None else "splits"
    unpruned = network.point(experiment, "unpruned", 0, full)
    yield unpruned
    loop = partial(network.loop, experiment, full=full, unpruned=unpruned)
    if "measured" in cell.loops:
        yield from network.measured_loop(experiment, full)
    rounds = []
    for point in loop("bmr", repeat(bmr.by_evidence(), MAX_ROUNDS)) if "bmr" in cell.loops else ():
        rounds.append(point)
        yield point
    for method in (name for name in cell.loops if name in BASELINES):
        yield from loop(method, [BASELINES[method](point.pruned) for point in rounds])
    if "scratch" in cell.loops and rounds:
        hidden = _size_of(problem, full, rounds[-1].pruned)
        dense = network.train(hidden)
        network.fit(dense.model, dense.guide, len(rounds) * problem.settings.refit_epochs)
        small = network.point(experiment, "scratch", 0, dense)
        yield replace(small, pruned=1 - problem.num_parameters(hidden) / _total(full))
    if "longer" in cell.loops:
        yield from network.train_on(experiment, full, len(rounds))


@dataclass(frozen=True)
class _Network:
    """How networks of a cell are trained, pruned and measured.

    Every training and every loop starts with the same random numbers, whatever went before.
    """

    problem: Problem
    estimator: str
    seed: int
    meter: Meter

    def train(self, hidden: int, kept: Path | None = None) -> bmr.Reduction:
        """Train a network from the start, and return the reduction of it that prunes nothing.

        One that is ``kept`` in a file is not trained again.
        """
        # Pyro names the parameters of every such guide alike.
        pyro.clear_param_store()
        pyro.set_rng_seed(self.seed)
        model = self.problem.make_model(hidden)
        guide = make_guide(model)
        if kept is not None and kept.exists():
            guide(self.problem.x[:4], self.problem.y[:4])
            guide.load_state_dict(torch.load(kept))
        else:
            self.fit(model, guide, self.problem.settings.num_epochs)
        if kept is not None and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(guide.state_dict(), kept)
        return bmr.reduce(guide, model=model, select=lambda scores: scores.kept)

    def curves(self, full: bmr.Reduction, methods: Iterable[str]) -> Iterator[Point]:
        """Prune a trained network in steps of 1 %, by each method."""
        before = self.meter.measure(full, draws=1)
        yield Point("one-shot", "unpruned", 0, 0.0, before)
        for name, select in MEASURED.items():
            if name in methods:
                yield self.measured(name, full, select)
        methods = [name for name in methods if name not in MEASURED]
        total = _total(full)
        selections = {"bmr": lambda part: bmr.top_k(total - round(part * total)), **BASELINES}
        for method, percent in product(methods, range(1, 100)):
            reduction = bmr.reduce(full.guide, select=selections[method](percent / 100))
            after = self.meter.measure(reduction, draws=1)
            delta_f = reduction.delta_f, after.free_energy - before.free_energy
            yield Point("one-shot", method, 1, _pruned(reduction), after, *delta_f)

    def measured(self, name: str, full: bmr.Reduction, select: Selection) -> Point:
        """Reduce a trained network once, with the data at hand."""
        reduction = bmr.reduce(full.guide, self.problem.x, self.problem.y, select=select)
        after = self.meter.measure(reduction, draws=1)
        changes = reduction.delta_f, reduction.realised, reduction.realised_error
        return Point("one-shot", name, 1, _pruned(reduction), after, *changes)

    def measured_loop(self, experiment: str, full: bmr.Reduction) -> Iterator[Point]:
        """Prune a trained network in rounds that are measured, as `pyro_bmr.prune` does."""
        settings = self.problem.settings
        result = bmr.prune(
            *(full.model, full.guide, self.problem.x, self.problem.y),
            num_epochs=0,
            refit_epochs=settings.refit_epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            estimator=self.estimator,
            num_samples=DRAWS,
            seed=self.seed,
            progress=False,
        )
        everything = sum(site.total for site in result.sites) / _total(full)
        for one in result.rounds[1:]:
            if one.counts and not one.kept:
                measured = FreeEnergy(one.free_energy, math.nan, math.nan, one.free_energy_error)
                changes = one.predicted, one.realised, one.realised_error
                pruned = one.sparsity * everything
                yield Point(experiment, "measured", one.index, pruned, measured, *changes)
        kept = result.kept_round
        point = self.point(experiment, "measured", kept.index, result)
        yield replace(
            point,
            predicted_delta_f=kept.predicted,
            realised_delta_f=kept.realised,
            realised_error=kept.realised_error,
        )

    def loop(
        self,
        experiment: str,
        method: str,
        selections: Iterable[Selection],
        *,
        full: bmr.Reduction,
        unpruned: Point,
    ) -> Iterator[Point]:
        """Reduce and train by one selection after the other, until one prunes nothing more."""
        pyro.set_rng_seed(self.seed)
        last, before = full, unpruned.measured
        for index, select in enumerate(selections, 1):
            reduction = bmr.reduce(last.guide, select=select)
            if _pruned(reduction) <= _pruned(last):
                return
            masked = self.meter.measure(reduction, draws=DRAWS)
            self.fit(reduction.model, reduction.guide, self.problem.settings.refit_epochs)
            point = self.point(experiment, method, index, reduction)
            realised = masked.free_energy - before.free_energy
            yield replace(point, predicted_delta_f=reduction.delta_f, realised_delta_f=realised)
            last, before = reduction, point.measured

    def train_on(self, experiment: str, full: bmr.Reduction, rounds: int) -> Iterator[Point]:
        """Train an unpruned network for as long as one is trained that is pruned in rounds."""
        pyro.set_rng_seed(self.seed)
        for index in range(1, rounds + 1):
            self.fit(full.model, full.guide, self.problem.settings.refit_epochs)
            yield self.point(experiment, "longer", index, full)

    def point(self, experiment: str, method: str, index: int, network: bmr.Reduction) -> Point:
        """Measure a network."""
        measured = self.meter.measure(network, draws=DRAWS)
        scores = predictive_scores(network.model, network.guide, self.problem)
        return Point(experiment, method, index, _pruned(network), measured, scores=scores)

    def fit(self, model: Any, guide: Any, num_epochs: int) -> None:
        """Train as the problem wants it."""
        bmr.fit(
            *(model, guide, self.problem.x, self.problem.y),
            num_epochs=num_epochs,
            batch_size=self.problem.settings.batch_size,
            lr=self.problem.settings.lr,
            estimator=self.estimator,
            progress=False,
        )


def _size_of(problem: Problem, full: bmr.Reduction, pruned: float) -> int:
    """Return how many hidden units a dense network has with as many weights as a pruned one."""
    kept = (1 - pruned) * _total(full)
    sizes = range(1, problem.hidden + 1)
    return min(sizes, key=lambda hidden: abs(problem.num_parameters(hidden) - kept))


def _total(reduction: bmr.Reduction) -> int:
    return sum(mask.numel() for mask in reduction.masks.values())


def _pruned(reduction: bmr.Reduction) -> float:
    """Return the fraction of the weights and biases that are pruned; the noise does not count."""
    return 1 - sum(int(mask.sum()) for mask in reduction.masks.values()) / _total(reduction)
