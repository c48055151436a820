"""Kill a run of `prune` in random places, and resume it each time.

Run with ``python benchmarks/kill_and_resume.py --kills 20``. A worker prunes with a checkpoint and
is killed by SIGKILL after a random time, again and again; the last one runs to its end. Its result
must be that of a run without interruption, and no kill may cost more than the round under way.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyro
import torch

import pyro_bmr as bmr
from pyro_bmr import demo
from pyro_bmr.files.plans import read_plan


def work(checkpoint: Path, output: Path, epochs: int) -> None:
    """Prune, from the checkpoint if there is one, and write down the result."""
    torch.set_num_threads(1)
    output.with_suffix(".ready").touch()
    pyro.set_rng_seed(0)
    x = torch.randn(100, 6)
    y = x[:, 0] * x[:, 1].relu() + 0.1 * torch.randn(100)
    model = demo.Regression(6, hidden=10)
    guide = bmr.mean_field(model, gamma=["precision"])
    result = bmr.prune(
        model,
        guide,
        x,
        y,
        num_epochs=epochs,
        max_rounds=6,
        batch_size=20,
        estimator="local",
        select=bmr.by_evidence(margin=-1.0),
        algorithm="paper",
        num_samples=20,
        checkpoint=checkpoint,
        seed=1,
        compile=False,
    )
    weights = {name: value.tolist() for name, value in result.guide.state_dict().items()}
    rounds = result.round_summary().to_dict()
    output.write_text(json.dumps({"rounds": rounds, "weights": weights}))


def rounds_in(checkpoint: Path) -> int:
    """Count the rounds that a checkpoint holds.

    Returns
    -------
    int
        0 if there is none.
    """
    if not checkpoint.exists():
        return 0
    state = read_plan(checkpoint)["content"]["state"]
    return 0 if state is None else len(state["last"]["rounds"])


def start(directory: Path, name: str, epochs: int) -> subprocess.Popen[bytes]:
    """Start a worker, and wait until it works.

    Returns
    -------
    Popen
        Its process.
    """
    paths = [str(directory / f"{name}.pt"), str(directory / f"{name}.json")]
    ready = directory / f"{name}.ready"
    ready.unlink(missing_ok=True)
    arguments = [sys.executable, __file__, "--epochs", str(epochs), "--work", *paths]
    worker = subprocess.Popen(arguments)
    while not ready.exists() and worker.poll() is None:
        time.sleep(0.01)
    return worker


def kill_and_resume(kills: int, epochs: int, seed: int) -> list[int]:
    """Compare a run that is killed again and again with one that is not.

    Returns
    -------
    list of int
        Rounds in the checkpoint after each kill.

    Raises
    ------
    AssertionError
        If a kill loses a whole round, if a worker fails, or if the results differ.
    """
    randomness = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        whole = start(directory, "whole", epochs)
        begin = time.perf_counter()
        if whole.wait():
            msg = "the run without interruption failed"
            raise AssertionError(msg)
        duration = time.perf_counter() - begin
        checkpoint, output = directory / "killed.pt", directory / "killed.json"
        seen: list[int] = []
        safe = 0
        while len(seen) < kills:
            worker = start(directory, "killed", epochs)
            end = time.perf_counter() + randomness.uniform(0, 0.6 * duration)
            while worker.poll() is None and time.perf_counter() < end:
                time.sleep(0.005)
            if worker.poll() is not None:
                if worker.returncode:
                    msg = f"a worker failed after {len(seen)} kills, at round {seen[-1]}"
                    raise AssertionError(msg)
                _compare(directory)
                checkpoint.unlink()
                output.unlink()
                safe = 0
                continue
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            if rounds_in(checkpoint) < safe:
                msg = f"{safe} rounds were safe, and after a kill only {rounds_in(checkpoint)} are"
                raise AssertionError(msg)
            safe = rounds_in(checkpoint)
            seen.append(safe)
            print(f"kill {len(seen)}: {seen[-1]} rounds are safe", flush=True)
        if start(directory, "killed", epochs).wait():
            msg = "the last worker failed"
            raise AssertionError(msg)
        _compare(directory)
    return seen


def _compare(directory: Path) -> None:
    whole, killed = (
        json.loads((directory / f"{name}.json").read_text()) for name in ("whole", "killed")
    )
    numbers = [list(run["weights"].values()) for run in (whole, killed)]
    if whole["rounds"] != killed["rounds"] or numbers[0] != numbers[1]:
        msg = "the run that was killed ends otherwise than the run without interruption"
        raise AssertionError(msg)


def main() -> None:
    """Kill, resume, compare, and print what was safe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.epochs)
        return
    seen = kill_and_resume(options.kills, options.epochs, options.seed)
    print(f"{len(seen)} kills; rounds that were safe: {seen}; the results are the same")


if __name__ == "__main__":
    main()
