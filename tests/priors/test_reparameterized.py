"""Reparameterised sites: what is reduced is what the same model written by hand reduces."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam, TransformReparam

import pyro_bmr as bmr

torch.manual_seed(0)
COUNTY, U, Y = torch.arange(80) % 8, torch.randn(8), 1.0 + torch.randn(80)


def parents():
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    return g, pyro.sample("s", dist.LogNormal(0.0, 0.5))


def observe(a):
    with pyro.plate("obs", 80):
        pyro.sample("y", dist.Normal(1 + a[COUNTY], 1.0), obs=Y)


def centred():
    g, s = parents()
    with pyro.plate("counties", 8):
        a = pyro.sample("a", dist.Normal(g * U, s))
    observe(a)


def transformed():
    g, s = parents()
    with pyro.plate("counties", 8):
        affine = dist.transforms.AffineTransform(g * U, s)
        a = pyro.sample(
            "a", dist.TransformedDistribution(dist.Normal(torch.zeros(8), 1.0), [affine])
        )
    observe(a)


def by_hand(prior):
    def model():
        g, s = parents()
        with pyro.plate("counties", 8):
            z = pyro.sample("z", prior(g, s))
        observe(g * U + s * z)

    return model


PLAIN = by_hand(lambda _g, _s: dist.Normal(0.0, 1.0))
INDEPENDENT = {
    "non-centred": (poutine.reparam(centred, {"a": LocScaleReparam(0.0)}), "a_decentered"),
    "transform": (poutine.reparam(transformed, {"a": TransformReparam()}), "a_base"),
    "times zero": (by_hand(lambda g, s: dist.Normal(0 * g, s**0)), "z"),
    "difference": (by_hand(lambda g, s: dist.Normal(g - g, s / s)), "z"),
    "detached": (by_hand(lambda g, s: dist.Normal(0 * g.detach(), s.detach() ** 0)), "z"),
}
DEPENDENT = {
    "half centred": (poutine.reparam(centred, {"a": LocScaleReparam(0.5)}), "a_decentered"),
    "learnt": (poutine.reparam(centred, {"a": LocScaleReparam()}), "a_decentered"),
    "centred": (poutine.reparam(centred, {"a": LocScaleReparam(1.0)}), "a"),
    "detached": (by_hand(lambda g, _s: dist.Normal(g.detach(), 1.0)), "z"),
    "flat at the location": (by_hand(lambda g, _s: dist.Normal(g**2, 1.0)), "z"),
    "flat on one side": (by_hand(lambda g, _s: dist.Normal(torch.relu(g - 2), 1.0)), "z"),
}


def guide_of(model, family=AutoNormal):
    """At zero wherever it is unconstrained, so that all models have the same posterior."""
    guide = family(model, init_scale=0.2)
    guide()
    for name, parameter in guide.named_parameters():
        if name.startswith("loc"):
            parameter.data.zero_()
    return guide


@pytest.mark.parametrize(("model", "name"), INDEPENDENT.values(), ids=INDEPENDENT)
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_a_parent_in_the_graph_alone_is_none(model, name, family):
    expected = bmr.reduce(guide_of(PLAIN, family))
    pyro.clear_param_store()
    guide = guide_of(model, family)
    for found in (bmr.reduce(guide), bmr.reduce(guide, sites=["g", name])):
        assert found.delta_f == pytest.approx(expected.delta_f, abs=1e-4)
        assert set(found.masks) == {"g", name}
        assert torch.equal(found.masks["g"], expected.masks["g"])
        assert torch.equal(found.masks[name], expected.masks["z"])
        torch.testing.assert_close(found.scores[name], expected.scores["z"])


@pytest.mark.parametrize(("model", "name"), DEPENDENT.values(), ids=DEPENDENT)
def test_a_parent_in_value_is_one(model, name):
    guide = guide_of(model)
    result = bmr.reduce(guide)
    assert "g" not in result.masks
    assert f"the prior of '{name}' depends on it" in result.summary().loc["g", "note"]
    with pytest.raises(ValueError, match="so that their ΔF do not add up"):
        bmr.reduce(guide, sites=["g", name])


def measure(model):
    """F before and after a reduction, with the same random numbers for every model."""
    guide = guide_of(model)
    result = bmr.reduce(guide)
    found = []
    for pair in ((model, guide), (result.model, result.guide)):
        pyro.set_rng_seed(0)
        found.append(bmr.free_energy(*pair, num_samples=8)[0])
    return found


def test_measured_like_the_model_by_hand():
    expected = measure(PLAIN)
    pyro.clear_param_store()
    model, _ = INDEPENDENT["non-centred"]
    assert measure(model) == pytest.approx(expected, abs=1e-3)


def test_a_guide_of_the_centred_model_is_told_what_became_of_its_site():
    guide = guide_of(centred)
    model, _ = INDEPENDENT["non-centred"]
    with pytest.raises(ValueError, match="'a', which is now computed from others"):
        bmr.reduce(guide, model=model)
