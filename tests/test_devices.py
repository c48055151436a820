"""Every verb on every device, and under a default device that is another one.

An accelerator is pretended where there is none. The tests on "cuda" need one.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from inspect import getsource
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from accelerator import pretended_accelerator
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch.utils._device import _device_constructors

import pyro_bmr as bmr

PACKAGE = Path(bmr.__file__).parent
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}
QUIET: dict[str, Any] = {"compile": False, "progress": False}
ROWS, INPUTS, HIDDEN = 12, 3, 2


def test_every_tensor_and_generator_is_made_on_a_device_that_is_named():
    """What is made without is where torch's default device is, and nobody knows which that is."""
    unnamed = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _makes_a_tensor(node) and not _names_device(node)
    ]
    assert not unnamed


def _makes_a_tensor(call: ast.Call) -> bool:
    """Tell whether a function of torch is called, or partially applied, that makes a tensor."""
    partially = ast.unparse(call.func) == "partial" and call.args
    module, _, name = ast.unparse(call.args[0] if partially else call.func).rpartition(".")
    return module == "torch" and name in FACTORIES


def _names_device(call: ast.Call) -> bool:
    # The device is the only argument of a generator.
    is_generator = ast.unparse(call.func) == "torch.Generator"
    return any(one.arg == "device" for one in call.keywords) or bool(is_generator and call.args)


class Problem:
    """A network of tanh units and a regression, and their data, on a device."""

    def __init__(self, device: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.folder = device, folder
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(ROWS, INPUTS, generator=generator, device="cpu")
        noise = torch.randn(ROWS, generator=generator, device="cpu")
        self.x = x.to(device, dtype)
        self.y = (1.5 * x[:, 0] + 0.3 * noise).to(device, dtype)
        self.one = torch.ones((), device=device, dtype=dtype)
        self.guide, self.joint = AutoNormal(self.network), AutoMultivariateNormal(self.linear)
        self.data = self.x, self.y
        self.guide(*self.data)
        self.joint(*self.data)

    def normal(self, *shape: int) -> Any:
        return dist.Normal(0 * self.one, self.one).expand(shape).to_event(len(shape))

    def observe(self, mean: torch.Tensor, scale: Any, y: Any) -> torch.Tensor:
        with pyro.plate("data", len(mean), device=self.device):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    def network(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        first = pyro.sample("first", self.normal(INPUTS, HIDDEN))
        bias = pyro.sample("bias", self.normal(HIDDEN))
        second = pyro.sample("second", self.normal(HIDDEN, 1))
        noise = pyro.sample("noise", dist.LogNormal(0 * self.one, self.one))
        mean = (torch.tanh(x @ first + bias) @ second).squeeze(-1)
        return self.observe(pyro.deterministic("mean", mean), noise, y)

    def linear(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.observe(x @ pyro.sample("w", self.normal(INPUTS)), 0.5 * self.one, y)

    def hierarchy(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        location = pyro.sample("location", dist.Normal(0 * self.one, self.one))
        spread = pyro.sample("spread", dist.LogNormal(0 * self.one, self.one))
        with pyro.plate("inputs", INPUTS, device=self.device):
            w = pyro.sample("w", dist.Normal(location, spread))
        return self.observe((x * w.unsqueeze(-2)).sum(-1), 0.5 * self.one, y)

    def mixture(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        w = pyro.sample("w", self.normal(INPUTS))
        mean = (x * w.unsqueeze(-2)).sum(-1)
        with pyro.plate("data", len(x), device=self.device):
            fn, infer = dist.Bernoulli(0.1 * self.one), {"enumerate": "parallel"}
            outlier = pyro.sample("outlier", fn, infer=infer)
            return pyro.sample("y", dist.Normal(mean, 0.5 + 3 * outlier), obs=y)

    def rows(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        w = pyro.sample("w", self.normal(INPUTS))
        with self.plate(x) as rows:
            effect = pyro.sample("effect", dist.Normal(0 * self.one, self.one))
            mean = (x * w.unsqueeze(-2)).sum(-1)[..., rows] + effect
            seen = None if y is None else y[rows]
            return pyro.sample("y", dist.Normal(mean, 0.5 * self.one), obs=seen)

    def plate(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return pyro.plate("data", len(x), subsample_size=6, device=self.device)

    def written(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        start = torch.full((INPUTS,), 0.1, device=self.device, dtype=self.x.dtype)
        scale = pyro.param("written scale", start, constraint=constraints.positive)
        pyro.sample("w", dist.Normal(pyro.param("written loc", start), scale).to_event(1))

    def reduce(self, **options: Any) -> bmr.Reduction:
        """Reduce as is predicted: without targets there is nothing to measure."""
        return bmr.reduce(self.guide, self.x, **options)

    def smaller(self) -> bmr.Reduction:
        """Without the last unit and the last input."""

        def select(scores: Any) -> dict[str, torch.Tensor]:
            masks = {name: torch.ones_like(kept) for name, kept in scores.kept.items()}
            masks["first"][:, -1] = masks["first"][-1] = False
            masks["bias"][-1] = masks["second"][-1] = False
            return masks

        return self.reduce(select=select)

    def pairs(self) -> dict[str, Any]:
        return {"full": (self.network, self.guide), "reduced": self.smaller()}

    def draws(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        draws = 0.3 * torch.randn(200, INPUTS, generator=generator, device="cpu")
        return {"w": draws.to(self.x)}

    def path(self, name: str) -> Path:
        return self.folder / name


@cache
def trained() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train on the CPU, and return the states of both guides."""
    options = {"num_epochs": 60, "lr": 0.05, "seed": 0, **QUIET}
    with pyro.get_param_store().scope():
        problem = Problem("cpu", Path())
        bmr.fit(problem.network, problem.guide, *problem.data, **options)
        bmr.fit(problem.linear, problem.joint, *problem.data, **options)
    return problem.guide.state_dict(), problem.joint.state_dict()


def make_problem(device: str, folder: Path, dtype: torch.dtype = torch.float32) -> Problem:
    problem = Problem(device, folder, dtype)
    for guide, state in zip((problem.guide, problem.joint), trained(), strict=True):
        guide.load_state_dict(state)
    return problem


def train(problem: Problem, **options: Any) -> None:
    guide = AutoNormal(problem.network)
    guide(*problem.data)
    options = {"num_epochs": 2, **QUIET, **options}
    assert len(bmr.fit(problem.network, guide, *problem.data, seed=0, **options)) == 2
    assert all(value.device == problem.x.device for value in guide.state_dict().values())


def reduce(problem: Problem, **options: Any) -> None:
    check(problem, problem.reduce(**options))


def reduce_measured(problem: Problem, **options: Any) -> None:
    check(problem, bmr.reduce(problem.guide, *problem.data, **options))


def reduce_jointly(problem: Problem, **options: Any) -> None:
    check(problem, bmr.reduce(problem.joint, problem.x, **options))


def reduce_model(problem: Problem, model: str) -> None:
    program = getattr(problem, model)
    seen = poutine.block(program, hide=["outlier"])
    guide = AutoNormal(seen, create_plates=problem.plate if model == "rows" else None)
    bmr.fit(program, guide, *problem.data, num_epochs=3, **QUIET)
    check(problem, bmr.reduce(guide, problem.x, model=program, select=drop_half))


def reduce_written(problem: Problem) -> None:
    bmr.fit(problem.linear, problem.written, *problem.data, num_epochs=2, **QUIET)
    check(problem, bmr.reduce(problem.written, problem.x, model=problem.linear))


def reduce_samples(problem: Problem) -> None:
    with pytest.warns(UserWarning, match="moment matching"):
        check(problem, bmr.reduce(problem.draws(), problem.x, model=problem.linear))


def check(problem: Problem, result: Any) -> None:
    """All of a result is on the device, and can be used, trained and printed."""
    device = problem.x.device
    assert all(mask.device == device for mask in result.masks.values())
    assert all(value.device == device for value in result.guide.state_dict().values())
    assert all(value.device == device for value in result.guide.median().values())
    bmr.fit(result.model, result.guide, *problem.data, num_epochs=1, **QUIET)
    assert repr(result)
    assert result._repr_html_()
    bmr.reduce(result.guide, problem.x)


def prune(problem: Problem) -> None:
    path, guides = problem.path("checkpoint"), [AutoNormal(problem.linear) for _ in range(2)]
    options = {"num_epochs": 2, "max_rounds": 2, "num_samples": 4, "seed": 0, "checkpoint": path}
    for guide in guides:
        guide(*problem.data)
    first, again = (
        bmr.prune(problem.linear, guide, *problem.data, lr=0.05, **options, **QUIET)
        for guide in guides
    )
    assert first.free_energy == again.free_energy
    check(problem, again)


def audit(problem: Problem) -> None:
    refit = partial(bmr.fit, num_epochs=1, **QUIET)
    found = problem.smaller().audit(
        *problem.data,
        num_samples=4,
        progress=False,
        refit=lambda model, guide: refit(model, guide, *problem.data),
    )
    assert repr(found)


def compare(problem: Problem) -> None:
    options = {"num_samples": 25, "test": problem.data, "progress": False}
    found = bmr.compare(problem.pairs(), *problem.data, **options)
    assert repr(found)
    assert found.differences() is not None


def to_arviz(problem: Problem) -> None:
    data = problem.smaller().to_arviz(*problem.data, num_samples=5)
    assert data.posterior["first"].shape[-2:] == (INPUTS, HIDDEN)


def presence(problem: Problem) -> None:
    for prior in (0.5, bmr.LearnedPrior()):
        found = bmr.presence(problem.joint, *problem.data, prior=prior, num_samples=50)
        assert found.probability["w"].device == problem.x.device
        assert repr(found)
    bmr.presence(problem.guide, *problem.data, num_samples=50)


def average(problem: Problem) -> None:
    for guide in (problem.joint, problem.guide):
        found = bmr.average(guide, *problem.data, num_samples=50)
        assert repr(found)
        name = next(iter(found.presence))
        for numbers in (found.interval(), found.covariance, found.draw(2)):
            assert numbers[name].device == problem.x.device
        assert 0 <= found.probability({name: 1.0}).value <= 1
        found.guide(*problem.data)


def compare_models(problem: Problem) -> None:
    models = {"full": {}, "none": {"*": False}, "chosen": bmr.by_evidence()}
    for guide in (problem.joint, problem.guide):
        found = bmr.compare_models(guide, models, *problem.data, families={"all": "*"}, prior=0.3)
        assert {t.device for t in found.mean.values()} == {problem.x.device}
        assert repr(found.within("all")) and len(found.parameters())
        assert {t.device for t in found.interval().values()} == {problem.x.device}
        bmr.plot_models(found)
        plt.close("all")


def tune_prior(problem: Problem) -> None:
    for guide in (problem.joint, problem.guide):
        for shared in ("site", "layer", bmr.elements):
            found = bmr.tune_prior(guide, *problem.data, shared=shared)
            assert repr(found)
            found.guide(*problem.data)


def compact(problem: Problem) -> None:
    result = problem.smaller()
    for one in (result.compact(problem.x), result.compact(problem.x, inputs=True)):
        assert all(value.device == problem.x.device for value in one.guide.state_dict().values())
        assert repr(one)
    assert repr(result.report(problem.x, num_samples=2))
    one.save(problem.path("compaction"))
    smaller = bmr.load(problem.path("compaction"), problem.network).to(problem.device)
    assert repr(smaller)


def modules(problem: Problem) -> None:
    result = problem.smaller()
    for num_samples in (None, 3):
        module = result.compact(problem.x).to_module(problem.x, num_samples=num_samples)
        assert module(problem.x).device == problem.x.device


def onnx(problem: Problem) -> None:
    problem.smaller().compact(problem.x).export_onnx(problem.path("net.onnx"), problem.x)


def files(problem: Problem) -> None:
    result = problem.smaller()
    result.save(problem.path("reduction"))
    check(problem, bmr.load(problem.path("reduction"), problem.network).to(problem.device))


def sparsities(problem: Problem) -> None:
    found = bmr.measure_sparsities(problem.joint, *problem.data, num_points=3, num_samples=4)
    bmr.plot_sparsities(found)


def measure(problem: Problem) -> None:
    for estimator in (None, bmr.LocalELBO(), bmr.MomentsELBO()):
        pair = problem.network, problem.guide
        bmr.free_energy(*pair, *problem.data, estimator=estimator, num_samples=4)


def plot_result(problem: Problem) -> None:
    result = problem.reduce()
    bmr.plot_delta_f(result)
    bmr.plot_delta_f(problem.reduce(groups=label_inputs), by="layer")
    bmr.plot_criteria(result)
    bmr.plot_element(result, "second", (0, 0))
    bmr.plot_weights(result, "bias")
    shrunk = problem.reduce(reduced_prior=bmr.Laplace(0.1), select=bmr.top_k(2))
    bmr.plot_element(shrunk, "second", (0, 0))


def plot_predictions(problem: Problem) -> None:
    pairs = {"full": (problem.linear, problem.joint)}
    bmr.plot_predictions(pairs, problem.x, along=problem.x[:, 0], data=(problem.x[:, 0], problem.y))


def baselines(problem: Problem) -> None:
    for select in (bmr.baselines.snr, bmr.baselines.spr, bmr.baselines.magnitude):
        assert 0 < problem.reduce(select=select(0.5)).sparsity < 1
    assert 0 < problem.reduce(select=bmr.baselines.random(0.5)).sparsity < 1


def evidence(problem: Problem) -> None:
    three = [torch.full_like(problem.x, scale) for scale in (0.1, 1.0, 0.5)]
    posterior, prior, reduced = (dist.Normal(torch.zeros_like(s), s) for s in three)
    assert bmr.delta_f(posterior, prior, reduced).device == problem.x.device
    gammas = [dist.Gamma(1 + s, 1 + s) for s in three]
    assert bmr.delta_f(*gammas).device == problem.x.device


def bayesian_network(problem: Problem) -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, 2, device="cpu"),
        torch.nn.ReLU(),
        torch.nn.Linear(2, 1, device="cpu"),
    ).to(problem.x)
    model = bmr.bayesianize(net)
    guide = AutoNormal(model, init_loc_fn=bmr.init_to_pretrained(model))
    guide(problem.x)
    assert bmr.reduce(guide).masks["0.weight"].device == problem.x.device


def label_inputs(name: str, shape: torch.Size) -> torch.Tensor | None:
    return torch.arange(INPUTS, device="cpu")[:, None] if name == "first" else None


def drop_half(scores: Any) -> Any:
    return {name: scores.kept[name] & (one > one.median()) for name, one in scores.delta_f.items()}


def shrink(problem: Problem) -> None:
    scale = 0.1 * problem.one
    for reduced in (bmr.Gaussian(0 * scale, scale), bmr.Laplace(scale), bmr.Spike(loc=scale)):
        prior = {name: reduced for name in ("first", "bias", "second")}
        reduce(problem, reduced_prior=prior, select=bmr.top_k(4))
    reduce_jointly(problem, reduced_prior=bmr.Gaussian(0 * scale, scale), select=bmr.top_k(1))
    reduce_jointly(problem, reduced_prior=bmr.Spike(loc=scale))
    guide = AutoNormal(problem.hierarchy)
    guide(*problem.data)
    check(problem, bmr.reduce(guide, problem.x, reduced_prior={"w": bmr.Spike("prior")}))


def positive(problem: Problem) -> None:
    reduce_measured(problem, sites=["noise", "second"])


VERBS: dict[str, Callable[[Problem], None]] = {
    "fit": train,
    "fit in batches": partial(train, batch_size=10),
    "fit, local": partial(train, estimator="local"),
    "fit, moments": partial(train, estimator="moments"),
    "reduce": reduce,
    "reduce, measured": reduce_measured,
    "own selection": partial(reduce, select=drop_half),
    "baselines": baselines,
    "units": partial(reduce, groups=bmr.units),
    "units and elements": partial(reduce_measured, groups=[bmr.units, bmr.elements]),
    "inputs": partial(reduce, groups=bmr.inputs),
    "own groups": partial(reduce, groups=label_inputs),
    "jointly": reduce_jointly,
    "jointly, exhaustive": partial(reduce_jointly, select=bmr.exhaustive()),
    "jointly, by_blocks": partial(reduce_jointly, select=bmr.by_blocks()),
    "jointly, groups": partial(
        reduce_jointly, groups=lambda name, shape: torch.arange(3, device="cpu") // 2
    ),
    "shrink": shrink,
    "positive": positive,
    "hierarchy": partial(reduce_model, model="hierarchy"),
    "mixture": partial(reduce_model, model="mixture"),
    "sub-sampling": partial(reduce_model, model="rows"),
    "hand-written": reduce_written,
    "samples": reduce_samples,
    "prune": prune,
    "audit": audit,
    "compare": compare,
    "to_arviz": to_arviz,
    "presence": presence,
    "average": average,
    "compare_models": compare_models,
    "tune_prior": tune_prior,
    "compact": compact,
    "to_module": modules,
    "export_onnx": onnx,
    "save and load": files,
    "measure_sparsities": sparsities,
    "free_energy": measure,
    "plots": plot_result,
    "plot_predictions": plot_predictions,
    "delta_f": evidence,
    "bayesianize": bayesian_network,
}


@contextmanager
def another_default() -> Iterator[None]:
    """Let what is made without device= have no values."""
    with torch.device("meta"):
        yield


PLACES = {
    "cpu, another default": ("cpu", nullcontext, another_default),
    "accelerator": ("meta", pretended_accelerator, nullcontext),
    "cuda": ("cuda", nullcontext, nullcontext),
    "cuda by default": ("cuda", nullcontext, partial(torch.device, "cuda")),
}
TRAINED = {"fit in batches", "reduce, measured", "units", "units and elements", "inputs"}
TRAINED |= {"hierarchy", "mixture", "sub-sampling"}
COUNTS_THERE = 'device="cpu"' not in getsource(torch.optim.Adam._init_group)
# A pretended accelerator has no graphs that are captured, of which these are made.
CAPTURED = {
    "units",
    "units and elements",
    "inputs",
    "compact",
    "to_module",
    "export_onnx",
    "hierarchy",
    "mixture",
    "sub-sampling",
}
IN_EVERY_RUN = CAPTURED | {"fit in batches", "reduce, measured", "plot_predictions"}
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "place",
    [pytest.param(name, marks=GPU if "cuda" in name else []) for name in PLACES],
)
def test_every_verb_works(verb, place, tmp_path):
    device, throughout, during = PLACES[place]
    if device == "cpu" and verb in TRAINED and COUNTS_THERE:
        pytest.skip("this torch's Adam counts its steps on the default device")
    if place == "accelerator" and verb in CAPTURED:
        pytest.skip("captures a graph")
    if device == "cpu" and verb not in IN_EVERY_RUN and "FUZZ" not in os.environ:
        pytest.skip("runs on the accelerator; here with make fuzz")
    trained()
    with throughout():
        problem = make_problem(device, tmp_path)
        with during():
            VERBS[verb](problem)
    plt.close("all")


SHORT = {
    "fit": "",
    "reduce, measured": "",
    "to_arviz": "",
    "compact": "",
    "plot_predictions": "",
    "jointly": "torch.float32 or torch.float64",
    "export_onnx": "ONNX Runtime cannot run",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verb", SHORT)
def test_other_dtypes_work_or_are_refused_by_name(verb, dtype, tmp_path):
    problem = make_problem("cpu", tmp_path, dtype)
    refused = dtype == torch.bfloat16 and SHORT[verb]
    with pytest.raises((RuntimeError, ValueError), match=refused) if refused else nullcontext():
        VERBS[verb](problem)
    plt.close("all")


@pytest.mark.parametrize("inside", [True, False], ids=["in the model", "around the verb"])
@pytest.mark.parametrize("verb", ["fit", "fit, local", "fit, moments", "reduce, measured", "prune"])
def test_autocast_changes_nothing_but_precision(verb, inside, tmp_path):
    problem = make_problem("cpu", tmp_path)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    if inside:
        problem.network, problem.linear = map(autocast, (problem.network, problem.linear))
    with nullcontext() if inside else autocast:
        VERBS[verb](problem)


class Net(PyroModule):
    """A regression whose weights, and nothing else, are where the module is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(INPUTS, device=device))

    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(INPUTS), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ (w + self.offset), 1.0), obs=y)


MIXED: dict[str, Callable[..., Any]] = {
    "fit": lambda model, guide, *data: bmr.fit(model, guide, *data, num_epochs=1, **QUIET),
    "prune": lambda model, guide, *data: bmr.prune(model, guide, *data, num_epochs=1, **QUIET),
    "reduce": lambda model, guide, *data: bmr.reduce(guide, *data, model=model),
    "presence": lambda model, guide, *data: bmr.presence(guide, *data, model=model),
    "tune_prior": lambda model, guide, *data: bmr.tune_prior(guide, *data, model=model),
    "free_energy": bmr.free_energy,
    "compare": lambda model, guide, *data: bmr.compare((model, guide), *data, progress=False),
    "to_arviz": bmr.to_arviz,
}


@pytest.mark.parametrize("verb", MIXED)
def test_what_is_on_several_devices_is_named(verb):
    x, y = torch.randn(6, INPUTS), torch.randn(6)
    model = Net("cpu")
    guide = AutoNormal(model)
    guide(x, y)
    with pytest.raises(RuntimeError, match="got the model on meta, the guide on cpu"):
        MIXED[verb](Net("meta"), guide, x, y)
    if verb == "prune":
        return  # which reads all data before, for its checkpoint
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        MIXED[verb](model, guide, x.to("meta"), y)
