"""What is data and what is computed: reparameterised sites, `pyro.deterministic`, point masses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam, SplitReparam, TransformReparam

import pyro_bmr as bmr
from pyro_bmr.programs.site_kinds import is_computed, is_data, is_latent, is_likelihood

torch.manual_seed(0)
COUNTY, Y = torch.arange(40) % 4, 1.0 + torch.randn(40)


def multilevel(prior):
    def model(county, y=None):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("counties", 4):
            a = pyro.sample("a", prior(s))
        with pyro.plate("obs", len(county)):
            pyro.sample("y", dist.Normal(1 + a[..., county], 1.0), obs=y)

    return model


def scaled(s):
    affine = dist.transforms.AffineTransform(0.0, s)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0), [affine])


CENTRED = multilevel(lambda s: dist.Normal(0.0, s))


def by_hand(county, y=None):
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("counties", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    a = pyro.deterministic("a", s * z)
    with pyro.plate("obs", len(county)):
        pyro.sample("y", dist.Normal(1 + a[county], 1.0), obs=y)


def split(county, y=None):
    a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("obs", len(county)):
        pyro.sample("y", dist.Normal(1 + a[county], 1.0), obs=y)


MODELS = {
    "LocScaleReparam": poutine.reparam(CENTRED, {"a": LocScaleReparam(0.0)}),
    "half centred": poutine.reparam(CENTRED, {"a": LocScaleReparam(0.5)}),
    "TransformReparam": poutine.reparam(multilevel(scaled), {"a": TransformReparam()}),
    "SplitReparam": poutine.reparam(split, {"a": SplitReparam([1, 3], -1)}),
    "by hand": by_hand,
}


def reduced(model):
    guide = AutoNormal(model, init_scale=0.2)
    guide(COUNTY, Y)
    return bmr.reduce(guide, COUNTY, Y)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_computed_site_is_of_the_posterior(model):
    result = reduced(model)
    data = result.to_arviz(COUNTY, Y, num_samples=30, prior=False)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert list(data[group].data_vars) == ["y"]
    assert data["posterior"]["a"].shape == (1, 30, 4)
    assert result.to_module()(COUNTY).shape == (40,)
    assert result.to_module(output="a")().shape == (4,)


@pytest.mark.parametrize("name", ["LocScaleReparam", "TransformReparam"])
def test_the_same_numbers_as_by_hand(name):
    found = []
    for model in (MODELS[name], by_hand):
        pyro.clear_param_store()
        guide = AutoNormal(model, init_scale=0.2)
        guide(COUNTY, Y)
        for parameter in guide.locs.parameters():
            parameter.data.fill_(0.3)
        table = bmr.compare((model, guide), COUNTY, Y, num_samples=60, loo=False).summary()
        found.append(torch.as_tensor(table.select_dtypes("number").to_numpy()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["LocScaleReparam", "half centred", "TransformReparam"])
def test_batches_and_their_scale(name):
    """Only the data are scaled up; F of batches has the mean of F of all rows."""
    pyro.clear_param_store()
    model = MODELS[name]
    guide = AutoNormal(model, init_scale=1e-4)
    guide(COUNTY, Y)
    options = {"num_epochs": 1, "lr": 1e-9}
    whole = bmr.fit(model, guide, COUNTY, Y, **options)
    parts = bmr.fit(model, guide, COUNTY, Y, batch_size=10, **options)
    assert parts[-1] == pytest.approx(whole[-1], rel=1e-3)


def test_a_model_without_data_observes_nothing():
    def model(county):
        poutine.reparam(CENTRED, {"a": LocScaleReparam(0.0)})(county)

    guide = AutoNormal(poutine.block(model, hide=["y"]))
    guide(COUNTY)
    with pytest.raises(ValueError, match="observes nothing"):
        bmr.fit(model, guide, COUNTY, num_epochs=1)
    result = bmr.reduce(guide, COUNTY)
    assert any("observes nothing" in note for note in result.notes)


def kinds(program):
    nodes = poutine.trace(program).get_trace().nodes
    tests = {"latent": is_latent, "data": is_data, "computed": is_computed}
    tests["likelihood"] = is_likelihood
    return {
        name: {kind for kind, test in tests.items() if test(node)}
        for name, node in nodes.items()
        if node["type"] == "sample"
    }


def test_kinds_of_statements():
    def program():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * x)
        pyro.factor("penalty", -x.square())
        pyro.sample("exact", dist.Delta(x), obs=torch.tensor(0.5))
        with pyro.plate("rows", 3, subsample_size=2):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2))

    assert kinds(program) == {
        "x": {"latent"},
        "twice": {"computed"},
        "penalty": {"likelihood"},
        "exact": {"data", "likelihood"},
        "rows": set(),
        "y": {"data", "likelihood"},
    }


def test_kinds_inside_a_plate_of_particles():
    """A plate around it expands the point mass, which then is another tensor."""

    def program():
        with pyro.plate("particles", 5, dim=-3):
            MODELS["LocScaleReparam"](COUNTY, Y)

    found = kinds(program)
    assert (found["a"], found["a_decentered"]) == ({"computed"}, {"latent"})
    assert found["y"] == {"data", "likelihood"}


def test_an_observation_of_a_point_mass_is_data():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)
            pyro.sample("exact", dist.Delta(x), obs=x.clone())

    x = torch.arange(6.0)
    guide = AutoNormal(model)
    guide(x, x)
    data = bmr.to_arviz(model, guide, x, x, num_samples=10)
    assert set(data["observed_data"].data_vars) == {"y", "exact"}


def test_units_of_reparameterised_weights():
    """What nothing but the point mass reads is read by nothing, and the smaller program agrees."""
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    y = x[:, 0]

    def network(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 6), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w) @ v, 0.3), obs=y)

    model = poutine.reparam(network, {name: LocScaleReparam(0.0) for name in ("w", "v")})
    guide = AutoNormal(model, init_scale=0.1)
    guide(x, y)
    result = bmr.reduce(guide, x, y, groups=bmr.units, select=bmr.top_k(2))
    small = result.compact(x, y)
    assert small.guide.median()["w_decentered"].shape == (4, 2)
    torch.testing.assert_close(small.to_module()(x), result.to_module()(x))
