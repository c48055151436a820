"""What a reduction remembers of the posterior before."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)

import pyro_bmr as bmr
from pyro_bmr.guides.common_noise import CommonNoise, draw_noise

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


def network(x):
    for i, size in enumerate((4, 3, 1)):
        w = pyro.sample(f"w{i}", dist.Normal(torch.zeros(size, x.shape[1]), 1.0).to_event(2))
        b = pyro.sample(f"b{i}", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        x = x.relu() @ w.mT + b
    return x


def test_what_produces_a_unit_comes_after_what_reads_it():
    guide = AutoNormal(network, init_scale=0.5)
    guide(torch.randn(5, 2))
    order = bmr.reduce(guide, groups=bmr.units).decision.order
    assert sorted(order) == ["b0", "b1", "b2", "w0", "w1", "w2"]
    assert order.index("w2") < order.index("w1") < order.index("w0")
    assert order.index("w2") < order.index("b1") and order.index("w1") < order.index("b0")
    nothing = bmr.reduce(guide, select=bmr.top_k(10**6))
    assert nothing.decision.order == ("w0", "b0", "w1", "b1", "w2", "b2")


@pytest.mark.parametrize("family", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_common_noise_is_that_of_matherons_rule(family):
    guide = family(model, init_loc_fn=init_to_value(values=VALUES), init_scale=0.5)
    guide()
    if family is AutoLowRankMultivariateNormal:
        guide.cov_factor.data.copy_(torch.randn(guide.cov_factor.shape))
    else:
        guide.scale_tril = torch.eye(5) + 0.5 * torch.randn(5, 5).tril(-1)
    gone = torch.tensor([False, True, False, True, False])
    masks = {"a": ~gone[:3], "b": ~gone[3:]}
    decision = bmr.reduce(guide, select=lambda _: masks).decision

    def draw(decision):
        _, guide, _ = decision.assemble()
        with CommonNoise(draw_noise(decision.couplings(), seed=0)):
            return torch.cat(list(guide().values())).detach()

    full, rest = draw(decision.restrict([])), draw(decision)
    covariance = guide.get_posterior().covariance_matrix.detach()
    gain = covariance[~gone][:, gone] @ covariance[gone][:, gone].inverse()
    torch.testing.assert_close(rest[~gone], full[~gone] - gain @ full[gone])
    assert (rest[gone] == 0).all()


def test_a_result_at_the_prompt_shows_its_table():
    guide = AutoNormal(model)
    guide()
    result = bmr.reduce(guide)
    assert repr(result) == str(result) and "pruned, ΔF" in repr(result)
