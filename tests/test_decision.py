"""What a reduction remembers of the posterior before."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyro_bmr as bmr

VALUES = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, -1.0])}


def model():
    pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_one_site_at_a_time(family):
    guide = family(model, init_loc_fn=init_to_value(values=VALUES), init_scale=0.5)
    guide()
    decision = bmr.reduce(guide, select=bmr.top_k(0)).decision
    _, full, none = decision.restrict([]).assemble()
    _, half, _ = decision.restrict(["b"]).assemble()
    assert {name: bool(mask.any()) for name, mask in none.items()} == {"a": True, "b": True}
    for name, value in guide.median().items():
        torch.testing.assert_close(full.median()[name], value)
    assert (half.median()["b"] == 0).all() and (half.median()["a"] != 0).all()


def test_a_guide_that_was_trained_since():
    guide = AutoNormal(model)
    guide()
    decision = bmr.reduce(guide).decision
    decision.check_unchanged()
    with torch.no_grad():
        guide.locs.a += 1e-3
    with pytest.raises(ValueError, match="trained on since"):
        decision.check_unchanged()
