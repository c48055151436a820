"""Steps of `fit` and `reduce` on a GPU, against what they could be there.

Run with ``python benchmarks/gpu.py``, or ``benchmarks/gpu.sh``, which also runs the tests that need
a GPU; writes ``benchmarks/gpu.csv`` and fails if a bound is missed. ``--device cpu`` tries it all
without a GPU, at sizes and numbers that mean nothing.

The networks, and what the contenders do, are those of ``training.py``; a time is the median over
epochs, in milliseconds a step. "Launched one by one" is `fit` without CUDA graphs. NumPyro takes
part where JAX has the device. `reduce` is compared with one compiled kernel of its formula on the
same tensors; a time is the smallest of ten, since what disturbs it only adds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.nn.functional import softplus
from training import Network, call_fit, call_often, numpyro_epoch, torch_epoch

import pyro_bmr as bmr
from pyro_bmr.training import compiled_steps

NETWORKS = {
    "13-50-1": Network((13, 50, 1), 16, 512, 60, 10, {}),
    "784-300-100-10": Network((784, 300, 100, 10), 128, 6016, 40, 10, {}),
    "784-1200-1200-10": Network((784, 1200, 1200, 10), 512, 16384, 40, 10, {}),
}
FIT = "fit, ms a step"
MOST = {("13-50-1", FIT): 0.09, ("784-1200-1200-10", "fit / numpyro"): 1.0}
WEIGHTS = 10_000_000, 100_000_000
# Of `reduce`: so many times what the kernel takes, and so many milliseconds.
MOST_TIMES, MOST_MORE = 3, 3.0


def measure_fit(network: Network) -> dict[str, float]:
    """Time a step of each contender, in milliseconds."""
    found = {FIT: _per_step(network, call_fit(network)[1])}
    with mock.patch.object(compiled_steps, "can_capture", lambda _: False):
        found["launched one by one"] = _per_step(network, call_fit(network)[1])
    found["torch"] = _per_step(network, call_often(network, torch_epoch(network)))
    if _has_numpyro():
        found["numpyro"] = _per_step(network, call_often(network, numpyro_epoch(network)))
        found["fit / numpyro"] = found[FIT] / found["numpyro"]
    return found


def measure_reduce(weights: int) -> dict[str, float]:
    """Time `reduce` and the kernel, in milliseconds."""
    width = math.isqrt(weights)
    guide = _trained(width)
    parameters = dict(guide.named_parameters())
    pair = [parameters[f"{kind}.w_unconstrained"].detach() for kind in ("locs", "scales")]
    kernel = torch.compile(_delta_f)
    return {
        "reduce, ms": _shortest(lambda: bmr.reduce(guide)),
        "kernel, ms": _shortest(lambda: kernel(*pair)),
        "copy, ms": _shortest(lambda: [one.clone() for one in pair]),
    }


def _trained(width: int) -> AutoNormal:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([width, width]).to_event(2))
        pyro.sample("y", dist.Normal((x @ w).sum(), 1.0), obs=torch.tensor(0.0))

    pyro.clear_param_store()
    guide = AutoNormal(model, init_scale=0.5)
    guide(torch.zeros(1, width))
    for name, parameter in guide.named_parameters():
        parameter.data.normal_().mul_(0.3 if "loc" in name else 1.0)
    return guide


def _delta_f(loc: Tensor, unconstrained: Tensor) -> Tensor:
    loc, scale = loc.double(), softplus(unconstrained).double()
    return (scale.log() + 0.5 * (loc / scale).square()).float()


def _per_step(network: Network, epochs: list[float]) -> float:
    return 1e3 * median(epochs) / network.steps


def _shortest(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(11):
        start = time.perf_counter()
        run()
        if torch.get_default_device().type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def _has_numpyro() -> bool:
    try:
        import jax
        import numpyro  # noqa: F401
    except ImportError:
        return False
    return bool(
        jax.default_backend() == {"cuda": "gpu"}.get(torch.get_default_device().type, "cpu")
    )


def find_missed(table: pd.DataFrame) -> Iterator[str]:
    """Say what is not within its bound."""
    for (row, name), bound in MOST.items():
        value = table.loc[row].get(name, math.nan)
        if math.isnan(value):
            print(f"{row}: {name} was not measured")
        elif value > bound:
            yield f"{row}: {name} is {value:.3g}, wanted at most {bound}"
    most = MOST_TIMES * table["kernel, ms"] + MOST_MORE
    for row in table.index[table["reduce, ms"] > most]:
        yield f"{row}: {table.loc[row, 'reduce, ms']:.3g} ms, wanted at most {most[row]:.3g} ms"


def main() -> None:
    """Measure all, print the table, and say which bounds are missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_default_device(options.device)
    warnings.filterwarnings("error", message="(training without compiling|each step is launched)")
    small = options.device == "cpu"
    rows = {}
    for name, network in NETWORKS.items():
        rows[name] = measure_fit(network)
        print(name, rows[name], flush=True)
    for weights in (10_000, 100_000) if small else WEIGHTS:
        name = f"reduce, {weights:,} weights"
        rows[name] = measure_reduce(weights)
        print(name, rows[name], flush=True)
    table = pd.DataFrame(rows).T.rename_axis("what")
    table.to_csv(options.output, float_format="%.4g")
    print(table.to_string(float_format="{:.3g}".format, na_rep=""))
    missed = list(find_missed(table))
    print("\n".join(missed) or "all bounds are met")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
