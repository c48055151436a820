"""Two models, each trained by every guide family, on every device that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
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
    """A model, its data, and a trained guide."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    guide: Any

    def train(self, model: Any, guide: Any, steps: int, **optim_args: float) -> None:
        optim = pyro.optim.Adam({"lr": 0.02} | optim_args)
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(steps):
            svi.step(*self.args)


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


def make_functional(device):
    one = torch.ones((), device=device)

    def model(x, y=None):
        with pyro.plate("inputs", 4):
            weight = pyro.sample("weight", dist.Normal(0 * one, one))
        bias = pyro.sample("bias", dist.Laplace(0 * one, one))
        scale = pyro.sample("scale", dist.LogNormal(0 * one, one))
        mean = pyro.deterministic("mean", (x * weight.unsqueeze(-2)).sum(-1) + bias)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


MODELS = {"network": Network, "functional": make_functional}


def make_list(model):
    guide = AutoGuideList(model)
    noise = ["precision", "scale"]
    guide.append(AutoNormal(poutine.block(model, expose=noise)))
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=noise)))
    return guide


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoGuideList": make_list,
    "mean_field": lambda model: bmr.mean_field(model, gamma=["precision", "scale"]),
}


def make_case(model_name: str, guide_name: str, device: str = "cpu") -> Case:
    x = torch.randn(40, 4)
    y = x[:, 0] - 2 * x[:, 1] + 0.3 * torch.randn(40)
    args = (x.to(device), y.to(device))
    model = MODELS[model_name](device)
    case = Case(model, args, GUIDES[guide_name](model))
    case.train(model, case.guide, 80)
    return case


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=list(GUIDES))
def guide_name(request):
    return request.param


@pytest.fixture(params=list(MODELS))
def case(request, guide_name, device):
    return make_case(request.param, guide_name, device)
