"""A step of `fit` against a step of Pyro, of plain torch and of NumPyro's jitted ``lax.scan``.

Run with ``python benchmarks/training.py``; writes ``benchmarks/training.csv`` and fails if a bound
is missed. NumPyro is optional: ``pip install 'pyro-bmr[bench]'``.

All four do the same: a mean-field normal posterior over all weights and biases, unit normal
priors, one draw of the weights for each batch, Adam, float32, batches picked from shuffled data by
index. The data are random, for times do not depend on them. A time is that of a whole epoch
divided by its steps, in milliseconds. Each round runs the four one after the other, in an order
that rotates, on the same cores; a ratio is that of the medians of one round.

`fit` is called as users do; its function for the learning rate, which it asks at the beginning of
every epoch for all steps of it, looks at the clock. Pyro checks its arguments at every step, which
is its default. Compiling is timed in a fresh process without any cache, from the call of `fit` to
the first epoch.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from pyro_bmr.training.fitting import fit


@dataclass(frozen=True)
class Network:
    """What is trained, how long in each round, and how fast it should be.

    Parameters
    ----------
    widths : tuple of int
        Of the layers, inputs first; a network of one output is a regression.
    batch_size, rows : int
        The rows are a multiple of the batch.
    fit_epochs, epochs : int
        Of `fit`, which compiles only if there are a thousand steps, and of the others.
    bounds : dict of float
        By ratio: at least this if it is a speed-up over others, at most this if a slow-down.
    """

    widths: tuple[int, ...]
    batch_size: int
    rows: int
    fit_epochs: int
    epochs: int
    bounds: dict[str, float]
    lr: float = 1e-3

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.rows // self.batch_size

    def data(self) -> tuple[Tensor, Tensor]:
        """Return random inputs and targets, on torch's default device."""
        device = torch.get_default_device()
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(self.rows, self.widths[0], generator=generator)
            if self.widths[-1] == 1:
                y = torch.randn(self.rows, generator=generator)
            else:
                y = torch.randint(self.widths[-1], (self.rows,), generator=generator)
        return x.to(device), y.to(device)

    def model(self, language: Any, dist: Any, scale: Any, relu: Any) -> Callable[..., None]:
        """Return the model in Pyro or in NumPyro, which spell it alike."""

        def model(x: Any, y: Any) -> None:
            for i, shape in enumerate(pairwise(self.widths)):
                x = relu(x) if i else x
                prior = dist.Normal(0.0, 1.0)
                weight = language.sample(f"weight{i}", prior.expand(shape).to_event(2))
                x = x @ weight + language.sample(f"bias{i}", prior.expand(shape[1:]).to_event(1))
            if self.widths[-1] == 1:
                precision = language.sample("precision", dist.Gamma(1.0, 1.0))
                likelihood = dist.Normal(x[:, 0], precision**-0.5)
            else:
                likelihood = dist.Categorical(logits=x)
            with scale(scale=self.rows / len(y)), language.plate("data", len(y)):
                language.sample("y", likelihood, obs=y)

        return model

    def pyro_model(self) -> Callable[..., None]:
        """Return the model for Pyro and for `fit`."""
        return self.model(pyro, pyro.distributions, pyro.poutine.scale, torch.relu)


NETWORKS = {
    "13-50-1": Network((13, 50, 1), 16, 512, 60, 4, {"pyro / fit": 25, "fit / numpyro": 2}),
    "784-300-100-10": Network(
        (784, 300, 100, 10), 128, 6016, 22, 3, {"pyro / fit": 5, "fit / numpyro": 1}
    ),
}
SPEED_UPS = {"pyro / fit", "torch / fit"}
COMPILE_SECONDS = 20


def call_fit(network: Network) -> tuple[float, list[float]]:
    """Train by `fit`; return the seconds before the first epoch, and those of each epoch."""
    pyro.clear_param_store()
    model = network.pyro_model()
    clock = []

    def rate(_done: float) -> float:
        clock.append(time.perf_counter())
        return network.lr

    options = {"num_epochs": network.fit_epochs, "batch_size": network.batch_size, "lr": rate}
    data = network.data()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training without compiling")
        start = time.perf_counter()
        fit(model, AutoNormal(model), *data, **options, progress=False)
    epochs = clock[:: network.steps]
    return epochs[0] - start, [end - begin for begin, end in pairwise(epochs)]


def call_often(network: Network, epoch: Callable[[], None]) -> list[float]:
    """Call a function, and return the seconds that it takes after the first time."""
    clock = []
    for _ in range(network.epochs + 1):
        epoch()
        clock.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(clock)]


def pyro_epoch(network: Network) -> Callable[[], None]:
    """Return a function that trains for an epoch by `pyro.infer.SVI.step`."""
    pyro.clear_param_store()
    x, y = network.data()
    model = network.pyro_model()
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": network.lr}), Trace_ELBO())

    def epoch() -> None:
        for rows in torch.randperm(network.rows).split(network.batch_size):
            svi.step(x[rows], y[rows])

    return epoch


def torch_epoch(network: Network) -> Callable[[], None]:
    """Return a function that trains for an epoch by torch as it is."""
    x, y = network.data()
    shapes = [s for shape in pairwise(network.widths) for s in (shape, shape[1:])]
    is_regression = network.widths[-1] == 1
    shapes += [()] if is_regression else []
    locs = [(0.1 * torch.randn(shape)).requires_grad_() for shape in shapes]
    raw_scales = [torch.full(shape, -2.25).requires_grad_() for shape in shapes]
    adam = torch.optim.Adam([*locs, *raw_scales], lr=network.lr)
    half_log_tau = 0.5 * math.log(2 * math.pi)

    def free_energy(x: Tensor, y: Tensor) -> Tensor:
        scales = [softplus(raw) for raw in raw_scales]
        draws = [m + s * torch.randn_like(m) for m, s in zip(locs, scales, strict=True)]
        posteriors = list(zip(locs, scales, strict=True))
        if is_regression:  # The posterior of the precision is log-normal, its prior Gamma(1, 1).
            m, s = posteriors.pop()
            log_precision = draws.pop()
            divergence = (m + 0.5 * s * s).exp() - m - s.log() - half_log_tau - 0.5
        else:
            divergence = 0.0
        for m, s in posteriors:
            divergence = divergence + (0.5 * (m * m + s * s - 1) - s.log()).sum()
        for i in range(0, len(draws), 2):
            x = torch.addmm(draws[i + 1], x.relu() if i else x, draws[i])
        if not is_regression:
            return network.rows * cross_entropy(x, y) + divergence
        surprise = 0.5 * (log_precision.exp() * (y - x[:, 0]).square() - log_precision)
        return network.rows * (surprise.mean() + half_log_tau) + divergence

    def epoch() -> None:
        losses = []
        for rows in torch.randperm(network.rows).split(network.batch_size):
            loss = free_energy(x[rows], y[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.detach())
        float(torch.stack(losses).mean())

    return epoch


def numpyro_epoch(network: Network) -> Callable[[], None]:
    """Return a function that trains for an epoch by NumPyro, in one compiled loop."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_uniform

    x, y = (jax.numpy.array(values.numpy(force=True)) for values in network.data())
    model = network.model(numpyro, numpyro.distributions, numpyro.handlers.scale, jax.nn.relu)
    guide = autoguide.AutoNormal(model, init_loc_fn=init_to_uniform(radius=0.1))
    svi = SVI(model, guide, numpyro.optim.Adam(network.lr), Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(0), x[: network.batch_size], y[: network.batch_size])
    orders = [torch.randperm(network.rows).view(-1, network.batch_size) for _ in range(10)]
    shuffles = cycle([jax.numpy.array(order.int().numpy(force=True)) for order in orders])

    @jax.jit
    def scan(state: Any, shuffle: Any) -> Any:
        return jax.lax.scan(lambda s, rows: svi.update(s, x[rows], y[rows]), state, shuffle)

    def epoch() -> None:
        nonlocal state
        state, losses = jax.block_until_ready(scan(state, next(shuffles)))
        float(losses.mean())

    return epoch


def rounds(network: Network, count: int) -> Iterator[dict[str, float]]:
    """Time all contenders, round by round.

    Yields
    ------
    dict of float
        By name, the milliseconds of a step, the ratios, and the seconds before `fit` trains.
    """
    contenders = {
        "fit": lambda: call_fit(network),
        "pyro": lambda: (0.0, call_often(network, pyro_epoch(network))),
        "torch": lambda: (0.0, call_often(network, torch_epoch(network))),
    }
    try:
        scan = numpyro_epoch(network)
        contenders["numpyro"] = lambda: (0.0, call_often(network, scan))
    except ImportError as error:
        print(f"without NumPyro: {error}; pip install 'pyro-bmr[bench]'", file=sys.stderr)
    names = list(contenders)
    for i in range(count):
        first = i % len(names)
        runs = {name: contenders[name]() for name in names[first:] + names[:first]}
        times = {name: 1e3 * median(runs[name][1]) / network.steps for name in names}
        row = {f"{name}, ms a step": value for name, value in times.items()}
        row |= {f"{name} / fit": times[name] / times["fit"] for name in ("pyro", "torch")}
        if "numpyro" in times:
            row["fit / numpyro"] = times["fit"] / times["numpyro"]
        yield row | {"start with cache, s": runs["fit"][0]}


def compile_seconds(name: str, threads: int) -> float:
    """Time compiling in a fresh process without a cache."""
    command = [sys.executable, __file__, "--threads", str(threads), "--compile", name]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return float(done.stdout)


def report(table: pd.DataFrame) -> bool:
    """Print for each bound whether it is met, and return whether all are."""
    all_met = True
    for name, network in NETWORKS.items():
        for quantity, bound in (network.bounds | {"compile, s": COMPILE_SECONDS}).items():
            if (name, quantity) not in table.index:
                print(f"{name}: {quantity} was not measured")
                continue
            value = table.loc[(name, quantity), "median"]
            at_least = quantity in SPEED_UPS
            met = value >= bound if at_least else value <= bound
            wanted = f"at {'least' if at_least else 'most'} {bound}"
            print(f"{name}: {quantity} is {value:.3g}, wanted {wanted}: {'' if met else 'NOT '}met")
            all_met &= met
    return all_met


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and cores, of all")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--compile", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if hasattr(os, "sched_setaffinity"):  # This is what JAX, imported later, goes by.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.compile:
        print(call_fit(NETWORKS[options.compile])[0])
        return
    tables = {}
    with Progress() as progress:
        for name, network in NETWORKS.items():
            seconds = compile_seconds(name, options.threads)
            runs = progress.track(rounds(network, options.rounds), options.rounds, description=name)
            quantities = pd.DataFrame(runs).agg(["median", "min", "max"]).T
            quantities.loc["compile, s"] = seconds
            tables[name] = quantities
    table = pd.concat(tables, names=["network", "quantity"])
    table.to_csv(options.output, float_format="%.4g")
    print(table.to_string(float_format="{:.3g}".format))
    sys.exit(0 if report(table) else 1)


if __name__ == "__main__":
    main()
