"""Models, trained by guides of every family, on every device that there is."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import tyxe_guide
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import HMC, MCMC, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_bmr as bmr

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@dataclass(frozen=True)
class Case:
    """A model, its data, and a trained guide or a finished MCMC; ``summed`` are values of rows."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    guide: Any
    given: tuple[Any, ...]
    told: dict[str, Any]
    groups: Any = bmr.elements
    elbo: Callable[[], Any] = Trace_ELBO
    summed: tuple[dict[str, torch.Tensor], ...] = ({},)

    def train(self, model: Any, guide: Any, steps: int, **optim_args: float) -> None:
        optim = pyro.optim.Adam({"lr": 0.02} | optim_args)
        svi = SVI(model, guide, optim, self.elbo())
        for _ in range(steps):
            svi.step(*self.args)

    def reduce(self, **options: Any) -> bmr.Reduction:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="moment matching")
            return bmr.reduce(self.guide, *self.given, **self.told, groups=self.groups, **options)

    def trace(self) -> Any:
        """One draw of all latent sites."""
        if not isinstance(self.guide, MCMC):
            # Messengers run the model, and so show its observed sites.
            latent = poutine.block(self.guide, hide_fn=lambda msg: msg.get("is_observed", False))
            return poutine.trace(latent).get_trace(*self.args)

        def draw() -> None:
            for name, values in self.guide.get_samples().items():
                pyro.sample(name, dist.Delta(values[0]).to_event(values[0].dim()))

        return poutine.trace(draw).get_trace()

    def state(self) -> dict[str, torch.Tensor]:
        """What a reduction must not change of the guide and of the param store."""
        states = [dict(pyro.get_param_store().items())]
        if isinstance(self.guide, nn.Module):
            states.append(self.guide.state_dict())
        if isinstance(self.guide, MCMC):
            states.append(self.guide.get_samples())
        return {n: v.detach().clone() for state in states for n, v in state.items()}


class Network(PyroModule):
    """4-5-1, with a batch norm whose buffers a run would update."""

    def __init__(self, device: str) -> None:
        super().__init__()
        zero, one = torch.zeros((), device=device), torch.ones((), device=device)
        self.fc1 = PyroModule[nn.Linear](4, 5, device=device)
        self.norm = nn.BatchNorm1d(5, affine=False, device=device)
        self.fc2 = PyroModule[nn.Linear](5, 1, device=device)
        for layer in (self.fc1, self.fc2):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(zero, one).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))
        self.precision = PyroSample(dist.Gamma(one, one))

    def forward(self, x, y=None):
        mean = self.fc2(self.norm(self.fc1(x)).relu()).squeeze(-1)
        scale = self.precision.rsqrt()
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def regress(x, one):
    with pyro.plate("inputs", 4):
        weight = pyro.sample("weight", dist.Normal(0 * one, one))
    bias = pyro.sample("bias", dist.Laplace(0 * one, one))
    scale = pyro.sample("scale", dist.LogNormal(0 * one, one))
    return (x * weight.unsqueeze(-2)).sum(-1) + bias, scale


def make_functional(device):
    one = torch.ones((), device=device)

    def model(x, y=None):
        loc, scale = regress(x, one)
        mean = pyro.deterministic("mean", loc)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def make_outliers(device):
    """As the functional one, with rows that are outliers; which ones is summed out."""
    one = torch.ones((), device=device)

    def model(x, y=None):
        mean, scale = regress(x, one)
        with pyro.plate("data", len(x)):
            fn, infer = dist.Bernoulli(0.1 * one), {"enumerate": "parallel"}
            outlier = pyro.sample("outlier", fn, infer=infer)
            return pyro.sample("y", dist.Normal(mean, scale + 3 * outlier), obs=y)

    return model


def make_hierarchy(device):
    one = torch.ones((), device=device)

    def model(x, y=None):
        location = pyro.sample("location", dist.Normal(0 * one, one))
        spread = pyro.sample("spread", dist.LogNormal(0 * one, one))
        with pyro.plate("inputs", 4):
            weight = pyro.sample("weight", dist.Normal(location, spread))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal((x * weight.unsqueeze(-2)).sum(-1), one), obs=y)

    return poutine.reparam(model, {"weight": LocScaleReparam(0.0)})


MODELS = {
    "network": Network,
    "functional": make_functional,
    "enumerated": make_outliers,
    "reparameterised": make_hierarchy,
}


NOISE = ["precision", "scale"]
FIRST = ["fc1.weight", "fc1.bias", "weight"]
SECOND = ["fc2.weight", "fc2.bias", "bias"]


def make_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=NOISE)))
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=NOISE)))
    return guide


def only(model, names):
    """Hide other sample sites; poutine.block(expose=) would hide a messenger's parameters too."""
    return poutine.block(
        model, hide_fn=lambda msg: msg["type"] == "sample" and msg["name"] not in names
    )


def make_nested(model):
    inner = AutoGuideList(poutine.block(model, expose=FIRST + NOISE))
    inner.append(AutoStructured(poutine.block(model, expose=FIRST)))
    inner.append(tyxe_guide.AutoNormal(poutine.block(model, expose=NOISE)))
    guide = AutoGuideList(model)
    guide.append(inner)
    guide.append(AutoNormalMessenger(only(model, SECOND)))
    return guide


def make_regressive(model):
    """Not for priors that are not Normal, which an affine map does not make Normal."""
    normal = FIRST + ["fc2.weight", "fc2.bias"]
    guide = AutoGuideList(model)
    guide.append(AutoRegressiveMessenger(only(model, normal)))
    guide.append(AutoNormal(poutine.block(model, expose=["bias", *NOISE])))
    return guide


def write_guide(model):
    """Return a function of `pyro.sample` and `pyro.param` statements."""

    def normal(name, like, *shape):
        loc = pyro.param(f"{name}_loc", lambda: 0.1 * torch.randn(shape).to(like))
        start = torch.full(shape, 0.1).to(like)
        return loc, pyro.param(f"{name}_scale", start, constraint=constraints.positive)

    def of_network(x, y=None):
        for name, shape in {
            "fc1.weight": (5, 4),
            "fc1.bias": (5,),
            "fc2.weight": (1, 5),
            "fc2.bias": (1,),
        }.items():
            pyro.sample(name, dist.Normal(*normal(name, x, *shape)).to_event(len(shape)))
        start = torch.tensor(9.0).to(x)
        concentration = pyro.param("concentration", start, constraint=constraints.positive)
        rate = pyro.param("rate", start, constraint=constraints.positive)
        pyro.sample("precision", dist.Gamma(concentration, rate))

    def of_functional(x, y=None):
        with pyro.plate("inputs", 4):
            pyro.sample("weight", dist.Normal(*normal("weight", x, 4)))
        pyro.sample("bias", dist.Normal(*normal("bias", x)))
        pyro.sample("scale", dist.LogNormal(*normal("scale", x)))

    return of_network if isinstance(model, Network) else of_functional


def make_point(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=NOISE)))
    guide.append(AutoDelta(poutine.block(model, expose=NOISE)))
    return guide


def write_mixed(model, amortised=False):
    """Return a guide whose noise is neither Gaussian nor Gamma, or tempered and from the data."""
    name = "precision" if isinstance(model, Network) else "scale"
    gaussians = write_guide(model)

    def guide(x, y=None):
        with poutine.block(hide=[name]):
            gaussians(x, y)
        start = torch.tensor(1.0).to(x)
        rate = pyro.param("mixed", start, constraint=constraints.positive)
        if amortised:
            with poutine.scale(scale=0.5):
                loc = x.mean() * rate.log()
                pyro.sample(name, dist.LogNormal(loc, 0.1 * torch.ones_like(loc)))
        else:
            pyro.sample(name, dist.Weibull(rate, 9 * torch.ones_like(rate)))

    return guide


def make_mcmc(model):
    kernel = HMC(model, step_size=0.05, num_steps=4)
    return MCMC(kernel, 60, warmup_steps=30, disable_progbar=True)


@dataclass(frozen=True)
class Family:
    """How a guide is made, what `reduce` has to be told, and what follows its training."""

    make: Callable[[Any], Any]
    told: tuple[str, ...] = ()
    finish: Callable[..., Any] = lambda guide, *args: guide
    steps: int = 80
    not_for: str = ""


GUIDES = {
    "AutoNormal": Family(AutoNormal),
    "AutoDiagonalNormal": Family(AutoDiagonalNormal),
    "AutoMultivariateNormal": Family(AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": Family(AutoLowRankMultivariateNormal),
    "AutoLaplaceApproximation": Family(
        AutoLaplaceApproximation,
        finish=lambda guide, *args: guide.laplace_approximation(*args),
        steps=500,
        # Before a batch norm the scale of weights is free, so that their MAP estimate is zero.
        not_for="network",
    ),
    "AutoStructured": Family(AutoStructured, ("args",)),
    "AutoGaussian": Family(AutoGaussian, ("args",)),
    "AutoNormalMessenger": Family(AutoNormalMessenger, ("args",)),
    "AutoHierarchicalNormalMessenger": Family(AutoHierarchicalNormalMessenger, ("args",)),
    "AutoRegressiveMessenger": Family(make_regressive),
    "AutoGuideList": Family(make_list),
    "nested AutoGuideList": Family(make_nested),
    "mean_field": Family(lambda model: bmr.mean_field(model, gamma=NOISE)),
    "TyXe": Family(tyxe_guide.AutoNormal),
    "hand-written": Family(write_guide, ("model", "args")),
    "AutoDelta beside AutoNormal": Family(make_point),
    "hand-written, other families": Family(write_mixed, ("model", "args")),
    "amortised and tempered": Family(partial(write_mixed, amortised=True), ("model", "args")),
    "MCMC": Family(make_mcmc),
}


@functools.cache
def trained(model_name: str, guide_name: str, device: str) -> Any:
    """Train once for all tests: a finished MCMC, or the state of a guide and the store."""
    case = new_case(model_name, guide_name, device)
    if isinstance(case.guide, MCMC):
        case.guide.run(*case.args)
        return case.guide
    with pyro.get_param_store().scope() as store:
        case.train(case.model, case.guide, GUIDES[guide_name].steps)
        state = case.guide.state_dict() if isinstance(case.guide, nn.Module) else None
    return state, store


def new_case(model_name: str, guide_name: str, device: str) -> Case:
    pyro.set_rng_seed(0)
    x = torch.randn(40, 4)
    y = x[:, 0] - 2 * x[:, 1] + 0.3 * torch.randn(40)
    args = (x.to(device), y.to(device))
    model, family, options = MODELS[model_name](device), GUIDES[guide_name], {}
    guided = model
    if model_name == "enumerated":
        guided = poutine.block(model, hide=["outlier"])
        values = (torch.zeros(40, device=device), torch.ones(40, device=device))
        options["summed"] = tuple({"outlier": value} for value in values)
        options["elbo"] = partial(TraceEnum_ELBO, max_plate_nesting=1)
    given = args if "args" in family.told else ()
    told = {"model": model} if "model" in family.told else {}
    return Case(model, args, family.make(guided), given, told, **options)


def make_case(model_name: str, guide_name: str, device: str = "cpu") -> Case:
    result = trained(model_name, guide_name, device)
    case = new_case(model_name, guide_name, device)
    if isinstance(result, MCMC):
        return replace(case, model=result.kernel.model, guide=result)
    state, store = copy.deepcopy(result)
    if state is None:
        pyro.get_param_store().set_state(store)
    else:
        case.guide(*case.args)
        case.guide.load_state_dict(state)
    return replace(case, guide=GUIDES[guide_name].finish(case.guide, *case.args))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=list(GUIDES))
def guide_name(request):
    return request.param


# Guides of independent, correlated and low-rank factors; the others have the same kinds.
KINDS = ["AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
OF_SOME = {
    "network by units": KINDS,
    "enumerated": [*KINDS, "hand-written", "AutoDelta beside AutoNormal"],
    "reparameterised": KINDS,
}


OF_CASES = [*MODELS, "network by units"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Try each law of each guide for a fifth of the models, and those of AutoNormal for all.

    The others are rare.
    """
    laws: dict[str, int] = {}
    for item in items:
        if item.path.name == "test_laws.py":
            params = item.callspec.params
            law = laws.setdefault(item.originalname, len(laws))
            place = law + list(GUIDES).index(params["guide_name"]) + OF_CASES.index(params["case"])
            if place % 5 and params["guide_name"] != "AutoNormal":
                item.add_marker(pytest.mark.rare)


@pytest.fixture(params=OF_CASES)
def case(request, guide_name, device):
    if guide_name not in OF_SOME.get(request.param, GUIDES):
        pytest.skip("the other guides have the same kinds of factors")
    if request.param == "network by units":
        return replace(make_case("network", guide_name, device), groups=bmr.units)
    if GUIDES[guide_name].not_for == request.param:
        pytest.skip(f"{guide_name} is not for the {request.param}")
    if guide_name == "AutoGaussian" and device != "cpu":
        pytest.skip("Pyro's AutoGaussian runs on the CPU only")
    return make_case(request.param, guide_name, device)
