"""`reduce` against one bare compiled kernel of its formula, on the same tensors, in one run.

Run with ``make benchmark``; writes ``benchmarks/reduce.csv``.
The kernel turns what the guide optimises (location and unconstrained scale) into ΔF, in float64
inside as the package does; a second one starts from the scale itself, which is less work than
reading a guide. `reduce` reads the guide, checks it, runs the model for its priors, scores,
selects, adds up, and builds the pruned model and guide. Each runs several times in a row, in two
blocks; the minimum is what is least disturbed by other programs, above all by the host giving and
taking memory pages.
"""

import gc
import math
import statistics
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

STATUS = Path("/proc/self/status")


def network(layers, width):
    def model(x):
        for i in range(layers):
            prior = dist.Normal(0.0, 1.0).expand([width, width]).to_event(2)
            x = (x @ pyro.sample(f"w{i}", prior)).relu()
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))

    return model


def trained_guide(weights, layers):
    """Stand in for training: a mixture of dead and live weights."""
    width = math.isqrt(weights // layers)
    guide = AutoNormal(network(layers, width), init_scale=0.5)
    guide(torch.zeros(1, width))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in guide.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise.mul_(0.3 if "loc" in name else 1.0))
    return guide


def delta_f(loc, scale):
    loc, scale = loc.double(), scale.double()
    return (scale.log() + 0.5 * (loc / scale).square()).float()


def delta_f_from_parameters(loc, unconstrained):
    return delta_f(loc, torch.nn.functional.softplus(unconstrained))


def resident(key):
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def extra_memory(run):
    """Peak resident memory during a run, above what there was before, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = run()
    del result
    return resident("VmHWM") - before


def seconds(run):
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


@pytest.fixture(scope="module")
def reports():
    """Collect one row per case, and write them beside this file."""
    rows = []
    yield rows
    table = pd.DataFrame(rows).set_index(["weights", "layers"])
    table.to_csv(Path(__file__).with_name("reduce.csv"), float_format="%.3g")
    print(f"\n{table.T.to_string(float_format='{:.3g}'.format)}")


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("weights", [10_000_000, 100_000_000])
def test_reduce(benchmark, reports, weights, layers):
    guide = trained_guide(weights, layers)
    parameters = dict(guide.named_parameters())
    pairs = [
        (
            parameters[f"locs.w{i}_unconstrained"].detach(),
            parameters[f"scales.w{i}_unconstrained"].detach(),
        )
        for i in range(layers)
    ]
    constrained = [(loc, torch.nn.functional.softplus(raw)) for loc, raw in pairs]
    from_parameters = torch.compile(delta_f_from_parameters)
    from_scale = torch.compile(delta_f)
    runs = {
        "reduce": lambda: bmr.reduce(guide),
        "kernel, from parameters": lambda: [from_parameters(*pair) for pair in pairs],
        "kernel, from scales": lambda: [from_scale(*pair) for pair in constrained],
    }
    times = {name: [] for name in runs}
    for _ in range(2):
        for name, run in runs.items():
            run()
            times[name] += [seconds(run) for _ in range(5)]
    size = 4 * sum(loc.numel() for loc, _ in pairs)
    report = {"weights": size // 4, "layers": layers, "pruned": bmr.reduce(guide).sparsity}
    for kernel in ("kernel, from parameters", "kernel, from scales"):
        for statistic in (min, statistics.median):
            ratio = statistic(times["reduce"]) / statistic(times[kernel])
            report[f"times {kernel} ({statistic.__name__})"] = ratio
    report["seconds"] = min(times["reduce"])
    if STATUS.exists():
        report["memory, times scores"] = extra_memory(runs["reduce"]) / size
        assert report["memory, times scores"] <= 5
    assert report["times kernel, from parameters (min)"] <= 3
    reports.append(report)
    benchmark.extra_info.update(report)
    benchmark.pedantic(runs["reduce"], rounds=3, iterations=1)
