"""A file that is refused changes nothing, and takes no memory; `tests/fuzz` has many more."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.files.plans import read_plan, write_plan

X = torch.linspace(-1, 1, 20).reshape(5, 4)


def interrupted(*_args):
    raise KeyboardInterrupt


def make(prior=dist.Normal, outputs=1):
    net = nn.Sequential(nn.Linear(4, outputs), nn.BatchNorm1d(outputs))

    def model(x):
        shift = pyro.param("shift", torch.zeros(()))
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        w = pyro.sample("w", prior(0.0, 1.0).expand([4]).to_event(1))
        return x @ w * scale + net(x)[:, 0] + shift

    return net, model


@pytest.fixture
def path(tmp_path):
    _, model = make()
    guide = AutoNormal(model)
    guide(X)
    model(X)
    bmr.reduce(guide, select=bmr.top_k(2)).save(tmp_path / "result.bmr")
    return tmp_path / "result.bmr"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"prior": dist.Laplace}, ValueError, "priors differ"),
        ({"prior": interrupted}, KeyboardInterrupt, None),
        ({"outputs": 2}, ValueError, "parameters and buffers differ"),
    ],
)
def test_nothing_changes(path, how, error, match, known):
    """Entries of the param store neither, nor does one that was not there come."""
    net, model = make(**how)
    pyro.clear_param_store()
    if known:
        pyro.param("shift", torch.tensor(7.0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    with pytest.raises(error, match=match):
        bmr.load(path, model, X)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert dict(pyro.get_param_store().items()) == ({"shift": 7.0} if known else {})
    assert torch.equal(torch.get_rng_state(), generator)


def test_sizes_are_compared_before_anything_is_made(tmp_path):
    """Of a location of 10^6 elements, the covariance would take 4 TB."""

    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))

    guide = AutoMultivariateNormal(model)
    guide()
    bmr.reduce(guide).save(tmp_path / "a")
    plan = read_plan(tmp_path / "a")
    plan["guide"]["factors"][0]["state"]["loc_unconstrained"] = torch.zeros(10**6)
    write_plan(tmp_path / "a", plan)
    with pytest.raises(ValueError, match=r"loc_unconstrained, expected the shape \(\d,\)"):
        bmr.load(tmp_path / "a", model)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (["kind"], "sculpture", "'sculpture' at /kind, expected one of"),
        (["guide", "factors", 0, "kind"], 3, "got 3 at /guide/factors/0/kind, expected one of"),
        (["rows", 0, "kept"], -1, "got -1 at /rows/0/kept, expected a number that is not"),
        (["masks", "w"], torch.ones(4), "torch.float32 at /masks/w, expected booleans"),
        (["handlers", 0, "masks", "w"], torch.ones(4) > 0, "state/mask, expected the mask of 'w'"),
        (
            ["guide", "factors", 0, "state", "loc_unconstrained"],
            torch.full((4,), torch.nan),
            "loc_unconstrained, expected finite numbers",
        ),
        (["handlers"], [], "at /handlers, expected 'pruned' first"),
        (["more"], 1, "at the top, expected the keys"),
    ],
)
def test_forged_structure(path, place, value, match):
    plan = home = read_plan(path)
    for key in place[:-1]:
        home = home[key]
    home[place[-1]] = value
    write_plan(path, plan)
    with pytest.raises(ValueError, match=f"could not be read .*{match}.*Expected a file that"):
        bmr.load(path, make()[1])


def test_any_bit_of_the_header(path):
    """The version too, which says nothing about the result."""
    whole = path.read_bytes()
    start = whole.index(b"version")
    for place in range(start, start + 24):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="could not be read"):
            bmr.load(path, make()[1])
