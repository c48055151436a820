"""Damaged and forged files: an error that says so, little memory, and nothing changed."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from damage import damage, forge
from peak import peak
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scale import random_source, times
from torch import nn

import pyro_bmr as bmr
from conftest import make_case
from pyro_bmr.files.plans import read_plan, write_plan


@dataclass
class Saved:
    """A result in a file, and the model to load it with."""

    model: Any
    args: tuple[Any, ...]
    result: Any


def of_case(name, guide, **options):
    case = make_case(name, guide)
    return Saved(case.model, case.args, case.reduce(**options))


def switched():
    saved = of_case("functional", "AutoNormal")
    prior = {"weight": bmr.Gaussian(0.0, 0.1)}
    select = bmr.by_evidence(margin=-1e9)
    result = bmr.reduce(saved.result.guide, reduced_prior=prior, select=select)
    return Saved(saved.model, saved.args, result)


def pooled():
    """Centers, with weights in a correlated guide, and plates."""

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("w", dist.Normal(mean, 0.1))

    guide = AutoMultivariateNormal(model)
    guide()
    prior = {"w": bmr.Spike("prior")}
    result = bmr.reduce(guide, reduced_prior=prior, select=bmr.by_evidence(margin=-1e9))
    return Saved(model, (), result)


def own_tensors():
    """A layer that is not Bayesian, and `pyro.param`."""
    net = nn.Linear(4, 1)

    def model(x):
        shift = pyro.param("shift", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(0.0, scale).expand([4]).to_event(1))
        return x @ w + net(x)[:, 0] + shift

    x = torch.ones(5, 4)
    model(x)
    guide = AutoNormal(model)
    guide(x)
    return Saved(model, (x,), bmr.reduce(guide, select=bmr.top_k(2)))


def compacted():
    """Sizes that the program writes out, and a smaller buffer and entry of the store."""
    layer = nn.Module()
    layer.register_buffer("shift", torch.zeros(3))

    def model(x):
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), torch.ones(4, 3)).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return (torch.tanh(x @ w + layer.shift) * scale) @ v

    x = torch.randn(5, 4)
    guide = AutoNormal(model)
    guide(x)
    result = bmr.reduce(guide, x, select=lambda _: {"v": torch.tensor([True, False, True])})
    return Saved(model, (x,), result.compact(x))


SAVED = {
    "network": lambda: of_case("network", "AutoNormal"),
    "dense": lambda: of_case("functional", "AutoMultivariateNormal"),
    "low rank": lambda: of_case("network", "AutoLowRankMultivariateNormal"),
    "gamma": lambda: of_case("network", "mean_field"),
    "switched": switched,
    "pooled": pooled,
    "own tensors": own_tensors,
    "compacted": compacted,
}


def state(model):
    """All that a refused file must leave alone."""
    tensors = [t for _, t in pyro.get_param_store().named_parameters()]
    modules = [model] if isinstance(model, nn.Module) else find_modules(model)
    tensors += [t for module in modules for t in (*module.parameters(), *module.buffers())]
    values = [tensor.detach().clone() for tensor in (*tensors, torch.get_rng_state())]
    return sorted(pyro.get_param_store()), [*map(id, tensors)], values


def find_modules(model):
    cells = [cell.cell_contents for cell in model.__closure__ or ()]
    return [one for one in cells if isinstance(one, nn.Module)]


def try_file(saved, path, *, forged, given):
    """Load; a file that is not refused was forged, and what it holds can be used."""
    names, identities, values = state(saved.model)
    try:
        loaded = bmr.load(path, saved.model, *(saved.args if given else ()))
    except ValueError as error:
        assert "Expected" in str(error)
        after = state(saved.model)
        assert after[:2] == (names, identities)
        assert all(a.equal(b) or (a != a).any() for a, b in zip(after[2], values, strict=True))
        return True
    assert forged, "a damaged file was loaded"
    assert str(loaded) and len(loaded.summary()) >= 0
    with torch.no_grad(), pyro.validation_enabled(False):
        draw = loaded.guide(*saved.args)
    assert draw.keys() == loaded.guide.median().keys()
    return False


@pytest.mark.parametrize("kind", SAVED)
def test_damaged(kind, tmp_path):
    saved = SAVED[kind]()
    path, random = tmp_path / "result.bmr", random_source(f"{kind} damaged")
    saved.result.save(path)
    whole, before = path.read_bytes(), peak()
    for _ in range(times(3)):
        damaged = damage(whole, random)
        if damaged != whole:
            path.write_bytes(damaged)
            assert try_file(saved, path, forged=False, given=random.random() < 0.5)
    assert peak() - before < 200


@pytest.mark.parametrize("kind", SAVED)
def test_forged(kind, tmp_path):
    """With the checksum that fits."""
    saved = SAVED[kind]()
    path, random = tmp_path / "result.bmr", random_source(f"{kind} forged")
    saved.result.save(path)
    plan, before = read_plan(path), peak()
    with pyro.get_param_store().scope():
        for _ in range(times(6)):
            write_plan(path, forge(plan, random))
            try_file(saved, path, forged=True, given=random.random() < 0.5)
    assert peak() - before < 200
