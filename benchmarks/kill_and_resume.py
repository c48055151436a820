"""Kill runs of `fit` and `prune` in random places, and resume them each time.

Run with ``python benchmarks/kill_and_resume.py --verb prune --kills 20``. Workers train with a
checkpoint and are killed after a random time, by SIGKILL or, with ``--interrupt``, by SIGINT, again
and again; the last one runs to its end. Its result must be that of a run without interruption, no
file that was whole may be lost, and with one writer at a time none may fall back. ``--writers 2``
has two processes write to the same path, as a job does that was started twice. ``--output`` adds a
line of JSON to a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine import runtime

import pyro_bmr as bmr
from pyro_bmr import demo
from pyro_bmr.files.plans import read_plan
from pyro_bmr.training import keeping

_FORK = multiprocessing.get_context("fork")
_INTERRUPTED = 130


def prune(checkpoint: Path | None, epochs: int) -> dict[str, Any]:
    """Prune a small network.

    Returns
    -------
    dict
        The rounds and the weights.
    """
    x, y, model = _problem()
    guide = bmr.mean_field(model, gamma=["precision"])
    told: dict[str, Any] = {"select": bmr.by_evidence(margin=-1.0), "algorithm": "paper"}
    told |= {"max_rounds": 6, "num_samples": 20, "checkpoint": checkpoint}
    result = bmr.prune(model, guide, x, y, num_epochs=epochs, **_OPTIONS, **told)
    return {"rounds": result.round_summary().to_dict(), "weights": _weights(result.guide)}


def fit(checkpoint: Path | None, epochs: int) -> dict[str, Any]:
    """Train a small network, for as long as `prune` does.

    Returns
    -------
    dict
        The losses and the weights.
    """
    x, y, model = _problem()
    guide = bmr.mean_field(model, gamma=["precision"])
    losses = bmr.fit(model, guide, x, y, num_epochs=4 * epochs, checkpoint=checkpoint, **_OPTIONS)
    return {"losses": losses, "weights": _weights(guide)}


_OPTIONS: dict[str, Any] = {
    "batch_size": 20,
    "estimator": "local",
    "seed": 1,
    "compile": False,
    "progress": False,
}
_VERBS = {"fit": fit, "prune": prune}


def _problem() -> tuple[torch.Tensor, torch.Tensor, Any]:
    pyro.set_rng_seed(0)
    x = torch.randn(100, 6)
    return x, x[:, 0] * x[:, 1].relu() + 0.1 * torch.randn(100), demo.Regression(6, hidden=10)


def _weights(guide: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in guide.state_dict().items()}


def _work(verb: str, checkpoint: Path, output: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Much more often than a user's runs do, so that many are killed while they write.
    keeping._LEAST_APART, keeping._MOST_WRITING = 0.02, 0.3
    try:
        result = _VERBS[verb](checkpoint, epochs)
    except KeyboardInterrupt:
        sys.exit(1 if runtime._PYRO_STACK else _INTERRUPTED)
    output.write_text(json.dumps(result))


def _progress(verb: str, checkpoint: Path) -> tuple[int, int]:
    """Count the rounds and the epochs after them that a checkpoint holds."""
    if not checkpoint.exists():
        return 0, 0
    content = read_plan(checkpoint)["content"]
    if verb == "fit":
        return 0, len(content["losses"])
    state, training = content["state"], content["training"]
    rounds = 0 if state is None else len(state["last"]["rounds"])
    return rounds, 0 if training is None else len(training["losses"])


@dataclass(frozen=True)
class Experiment:
    """What is killed, how often, and how."""

    verb: str
    kills: int
    epochs: int
    seed: int
    writers: int
    interrupt: bool

    def run(self, directory: Path) -> list[tuple[int, int]]:
        """Compare a run that is killed again and again with one that is not.

        Returns
        -------
        list of tuple
            What was safe after each kill: rounds, and epochs after them.

        Raises
        ------
        AssertionError
            If a file is lost or falls back, if a worker fails, or if the results differ.
        """
        # What is imported when it is first needed, workers have from here.
        _VERBS[self.verb](None, 1)
        randomness = random.Random(self.seed)
        begin = time.perf_counter()
        self._join([self._start(directory, "whole", 0)])
        duration = time.perf_counter() - begin
        expected = (directory / "whole-0.json").read_text()
        checkpoint = directory / "killed.pt"
        seen: list[tuple[int, int]] = []
        safe = 0, 0
        while len(seen) < self.kills:
            workers = [self._start(directory, "killed", i) for i in range(self.writers)]
            for worker in workers:
                worker.join(randomness.uniform(0, 0.4 * duration))
                if worker.exitcode is None:
                    self._kill(worker)
                    now = _progress(self.verb, checkpoint)
                    if self.writers == 1 and now < safe:
                        msg = f"{safe} was safe, and after a kill only {now} is"
                        raise AssertionError(msg)
                    safe = now
                    seen.append(now)
                    print(f"kill {len(seen)}: {now[0]} rounds, {now[1]} epochs", flush=True)
            if any(worker.exitcode == 0 for worker in workers):
                self._compare(directory, expected)
                checkpoint.unlink()
                safe = 0, 0
        self._join([self._start(directory, "killed", i) for i in range(self.writers)])
        self._compare(directory, expected)
        return seen

    def _start(self, directory: Path, name: str, number: int) -> Any:
        paths = directory / f"{name}.pt", directory / f"{name}-{number}.json"
        worker = _FORK.Process(target=_work, args=(self.verb, *paths, self.epochs))
        worker.start()
        return worker

    def _kill(self, worker: Any) -> None:
        if not self.interrupt:
            worker.kill()
            worker.join()
            return
        while worker.exitcode is None:
            # Torch and Pyro may catch what is raised inside of them.
            os.kill(worker.pid, signal.SIGINT)
            worker.join(1.0)
        if worker.exitcode not in {0, _INTERRUPTED}:
            msg = f"a worker that was interrupted ended with {worker.exitcode}"
            raise AssertionError(msg)

    @staticmethod
    def _join(workers: list[Any]) -> None:
        for worker in workers:
            worker.join()
            if worker.exitcode:
                msg = "a worker failed"
                raise AssertionError(msg)

    @staticmethod
    def _compare(directory: Path, expected: str) -> None:
        for output in directory.glob("killed-*.json"):
            if output.read_text() != expected:
                msg = "the run that was killed ends otherwise than the run without interruption"
                raise AssertionError(msg)
            output.unlink()


def main() -> None:
    """Kill, resume, compare, and print what was safe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verb", choices=sorted(_VERBS), default="prune")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--interrupt", action="store_true")
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        seen = Experiment(**options).run(directory)
        left = len(list(directory.glob(".*")))
    print(f"{len(seen)} kills; rounds that were safe: {seen}; the results are the same")
    print(f"{left} unfinished files were left over")
    if output:
        with output.open("a") as file:
            file.write(json.dumps({**options, "safe": seen, "left over": left}) + "\n")


if __name__ == "__main__":
    main()
