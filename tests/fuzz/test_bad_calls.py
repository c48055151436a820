"""Every public function, each of its arguments in turn a value of the wrong kind.

A call either works, or raises an error that says what came in and what was expected. A sample of
all calls runs by default, all of them where the environment variable FUZZ is set.
"""

import inspect
import math
import os
import random
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import nn

import pyro_bmr as bmr
from pyro_bmr import datasets, testing
from pyro_bmr.sklearn import PrunedRegressor

BAD = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "2.5": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "2**70": 2**70,
    "word": "word",
    "empty": "",
    "bytes": b"\xff",
    "list": [1, "a"],
    "tuple": (),
    "mapping": {"a": 1},
    "keyed by numbers": {1: None},
    "set": {"w"},
    "object": object(),
    "class": AutoNormal,
    "loss": Trace_ELBO,
    "function": lambda *args, **kwargs: None,
    "module": nn.MSELoss(),
    "generator": torch.Generator(),
    "tensor": torch.tensor([1.0, math.nan]),
    "no rows": torch.zeros(0, 4),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(20, 4, device="meta"),
    "complex": torch.zeros(20, dtype=torch.complex64),
    "words in an array": np.array(["a", "b"]),
    "frame": pd.DataFrame({"colour": ["red", "blue"]}),
    "date": pd.Timestamp("2020-01-01"),
    "path": Path("no") / "such" / "file",
}
SAMPLE = 400
QUIET = {"compile": False, "progress": False}


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def written(x, y=None):
    loc = pyro.param("loc", torch.zeros(4))
    pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))


def fit_estimator(
    hidden_layer_sizes=(),
    activation="relu",
    prior_scale=None,
    batch_size="auto",
    learning_rate_init=0.02,
    max_iter=1,
    max_rounds=0,
    num_samples=2,
    verbose=False,
):
    """Options of estimators, which are read where they are fitted."""
    PrunedRegressor(**locals()).fit(np.eye(4), np.arange(4.0))


@cache
def known():
    """What calls start from."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator)
    y = 2 * x[:, 0] + 0.3 * torch.randn(20, generator=generator)
    start = init_to_value(values={"w": torch.tensor([2.0, 0.0, 0.0, 0.1])})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.1)
    guide(x, y)
    net = bmr.bayesianize(nn.Linear(4, 2))
    layers = AutoNormal(net)
    layers(x)
    result = bmr.reduce(guide, x, y)
    wide = bmr.reduce(layers, select=bmr.top_k(5))
    few = {"num_samples": 4}
    fast = {"num_epochs": 1, **QUIET}
    rounds = bmr.prune(model, AutoNormal(model), x, y, **fast, **few, max_rounds=1)
    three = (bmr.Diagonal(torch.zeros(2), torch.ones(2)),) * 3
    dense = bmr.Dense(torch.zeros(2), torch.eye(2))
    subjects = [
        bmr.Posterior([i / 10], scale=[0.2], prior_scale=1.0, names=["A(1,1)"]) for i in range(6)
    ]
    design = np.c_[np.ones(6), np.arange(6.0)]
    group = bmr.group_level(subjects, design)
    of_guide = {"guide": guide, "*x": x, "*y": y}
    of_pair = {"model": model, **of_guide}
    of_pairs = {"pairs": (model, guide), "*x": x, "*y": y}
    data = {"*x": x, "*y": y}
    real = {"w": {"fn": SimpleNamespace(support=dist.constraints.real)}}
    of_numpyro = {
        "guide": SimpleNamespace(prefix="auto", prototype_trace=real),
        "params": {"w_auto_loc": np.zeros(2), "w_auto_scale": np.ones(2)},
    }
    of_laplace = SimpleNamespace(
        **{"model": (line := nn.Linear(2, 1, bias=False)), "params": [line.weight]},
        **{"mean": torch.zeros(2), "posterior_precision": torch.full((2,), 3.0)},
        **{"prior_mean": torch.zeros(()), "prior_precision_diag": torch.ones(2)},
        **{"n_data": 9, "backend": None},
    )
    scores = [bmr.by_evidence, bmr.exhaustive]
    calls = {
        bmr.fit: {**of_pair, **fast},
        bmr.prune: {**of_pair, **fast, **few, "max_rounds": 1},
        bmr.reduce: of_guide,
        bmr.free_energy: {**of_pair, **few},
        bmr.to_arviz: {**of_pair, **few},
        bmr.to_module: of_pair,
        bmr.presence: of_guide,
        bmr.average: of_guide,
        bmr.compare_models: {"guide": guide, "models": {"full": {}}, "*x": x, "*y": y},
        bmr.model_grid: {"inputs": {"all": {}, "none": {"w": False}}},
        bmr.tune_prior: of_guide,
        bmr.measure_sparsities: {**of_guide, **few, "num_points": 2},
        bmr.compare: {**of_pairs, **few, "loo": False, "progress": False},
        bmr.plot_predictions: {**of_pairs, **few},
        bmr.measure_costs: {**of_pairs, "num_samples": 2, "seconds": 0.0},
        bmr.read_factors: {"guide": guide},
        bmr.group_level: {"posteriors": subjects, "design": design},
        bmr.GroupPrior: {},
        group.leave_one_out: {},
        group.leave_one_out().plot: {},
        bmr.delta_f: dict(zip(("posterior", "prior", "reduced"), three, strict=True)),
        bmr.reduced_posterior: dict(zip(("posterior", "prior", "reduced"), three, strict=True)),
        fit_estimator: {},
        bmr.bayesianize: {"module": nn.Linear(4, 2)},
        bmr.init_to_pretrained: {"net": net},
        bmr.mean_field: {"model": model, "gamma": ()},
        bmr.AutoGamma: {"model": lambda: pyro.sample("tau", dist.Gamma(1.0, 1.0))},
        bmr.apply_masks: {"module": nn.Linear(4, 2), "masks": {"weight": torch.ones(2, 4) > 0}},
        bmr.load: {"path": "nothing.bmr", "model": model},
        bmr.Posterior: {"mean": torch.zeros(4), "covariance": torch.eye(4), "prior_scale": 1.0},
        bmr.Posterior.from_samples: {"samples": {"w": torch.randn(99, 2, generator=generator)}},
        bmr.Posterior.from_numpyro: {**of_numpyro, "prior_scale": 1.0},
        bmr.Posterior.from_laplace: {"la": of_laplace},
        bmr.Posterior.from_bayesian_torch: {"module": nn.Linear(4, 2)},
        bmr.read_spm: {"path": "nothing.mat"},
        bmr.reduce_files: {"paths": "none.safetensors", "out": "none", "prior": dist.Normal(0, 1)},
        bmr.read_masks: {"path": "none.masks.safetensors"},
        bmr.export_onnx: {"program": (model, guide), "path": "network.onnx", "*x": x},
        **{selection: {} for selection in (*scores, bmr.by_blocks, bmr.by_free_energy)},
        bmr.top_k: {"n": 1},
        bmr.units: {},
        bmr.Gaussian: {"loc": 0.0, "scale": 1.0},
        bmr.Laplace: {"scale": 1.0},
        bmr.Spike: {},
        bmr.LearnedPrior: {},
        bmr.baselines.snr: {"fraction": 0.5},
        bmr.baselines.spr: {"fraction": 0.5},
        bmr.baselines.magnitude: {"fraction": 0.5},
        bmr.baselines.random: {"fraction": 0.5},
        bmr.nn.normal: {},
        bmr.nn.fan_in_normal: {},
        bmr.nn.learned_normal: {},
        bmr.extend.delta_f_of_all_subsets: {"posterior": dense, "log_prior": torch.zeros(2)},
        bmr.extend.log_density_at_zero: {"prior": dist.Normal(0.0, 1.0)},
        bmr.extend.PrunedModel: {"model": model, "masks": {"w": torch.ones(4) > 0}},
        testing.check_guide_family: {"guide": guide, "num_samples": 20},
        datasets.load: {"name": "diabetes"},
        datasets.load_splits: {"name": "boston"},
        datasets.load_mnist: {},
        datasets.load_cifar10: {},
        bmr.plot_criteria: {"result": result},
        bmr.plot_delta_f: {"result": result},
        bmr.plot_element: {"result": result, "site": "w", "index": 0},
        bmr.plots.plot_sites: {"result": result},
        bmr.plots.plot_presence: {"found": bmr.presence(guide)},
        bmr.plots.data: {"axes": None},
        bmr.plot_network: {"result": wide},
        bmr.plot_weights: {"result": wide, "site": "weight"},
        bmr.plot_rounds: {"result": rounds},
        bmr.plot_models: {"comparison": bmr.compare_models(guide, {"full": {}})},
        bmr.plot_sparsities: {"sparsities": bmr.measure_sparsities(guide, x, y, num_samples=2)},
        bmr.plot_reliability: {"comparison": None},
        result.audit: {**data, **few, "progress": False},
        result.to_arviz: {**data, **few},
        result.compact: {"*x": x},
        result.to_module: {"*x": x},
        result.report: {"*x": x, "num_samples": 2},
        result.export_onnx: {"path": "result.onnx", "*x": x},
        result.save: {"path": "result.bmr"},
        result.to: {"device": "cpu"},
    }
    return calls


def name(function):
    return getattr(function, "__qualname__", type(function).__name__)


def cells():
    """All calls: a function, the name of an argument, and the name of a bad value."""
    for function, given in known().items():
        parameters = inspect.signature(function).parameters.values()
        options = [one.name for one in parameters if one.kind not in {2, 4}]
        if function is bmr.prune:
            options += ["batch_size", "lr", "estimator", "clip_norm", "patience", "compile"]
        for argument in dict.fromkeys([*options, *(key for key in given if key[0] == "*")]):
            yield from ((function, argument, bad) for bad in BAD)


def call(function, argument, bad):
    given = {**known()[function], argument: BAD[bad]}
    parameters = inspect.signature(function).parameters.values()
    data = [given.pop(key) for key in list(given) if key[0] == "*"]
    named = [one.name for one in parameters if one.kind in {0, 1} and one.name in given]
    ahead = named if data else named[:1]
    return function(*(given.pop(key) for key in ahead), *data, **given)


def fault(function, argument, bad):
    """What is unclear about the outcome of a call; nothing if it works or says what is wrong."""
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(function, argument, bad)
    except FileNotFoundError:
        return ""
    except Exception as error:
        told = [str(error), *getattr(error, "__notes__", ())]
        clear = any("Expected" in one for one in told)
        return "" if clear else f"{type(error).__name__}: {told[0][:110]!r}"
    return ""


def test_bad_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRO_BMR_DATA", str(tmp_path))
    every = list(cells())
    if "FUZZ" not in os.environ:
        every = random.Random(0).sample(every, SAMPLE)
    faults = [
        f"{name(function)}({argument}={bad}): {told}"
        for function, argument, bad in every
        if (told := fault(function, argument, bad))
    ]
    assert not faults, f"{len(faults)} of {len(every)}:\n" + "\n".join(faults)
