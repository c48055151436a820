"""What a reduction says of scores that decide nothing and of posteriors that cannot be right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_bmr as bmr


def model_of(prior):
    return lambda: pyro.sample("w", prior.to_event(1))


def dense(loc, scale, prior):
    guide = AutoMultivariateNormal(model_of(prior))
    guide()
    guide.loc.data.copy_(loc)
    guide.scale = scale
    return guide


def diagonal(loc, scale, prior):
    guide = AutoDiagonalNormal(model_of(prior))
    guide()
    guide.loc.data.copy_(loc)
    guide.scale = scale
    return guide


def independent(loc, scale, prior):
    guide = AutoNormal(model_of(prior))
    guide()
    guide.locs.w, guide.scales.w = loc, scale
    return guide


GUIDES = {"AutoNormal": independent, "AutoDiagonalNormal": diagonal, "AutoMultivariate": dense}


@pytest.fixture(params=GUIDES)
def make(request):
    return GUIDES[request.param]


def test_elements_are_counted_by_what_is_doubtful_of_them(make):
    loc = torch.tensor([0.0, 0.0, 0.02, 0.0, 3.0, 0.0])
    scale = torch.tensor([2.0, 2.02, 1.97, 0.5, 0.5, 2.6])
    result = bmr.reduce(make(loc, scale, dist.Normal(torch.zeros(6), 2.0)))
    row = result.summary().loc["w"]
    assert (row["undecided"], row["wide"], row["unscored"]) == (3, 1, 0)
    assert row["note"] == "1 wider than the prior; 3 undecided"
    assert result.undecided == {"w": 3}
    assert "3 undecided" in str(result)


def test_what_was_pruned_before_is_not_counted_again(make):
    loc, scale = torch.zeros(4), torch.tensor([1.0, 1.0, 1.5, 0.5])
    guide = make(loc, scale, dist.Normal(torch.zeros(4), 1.0))
    keep = torch.tensor([False, True, False, True])
    first = bmr.reduce(guide, select=lambda scores: {"w": keep})
    assert first.summary().loc["w", ["undecided", "wide"]].tolist() == [2, 1]
    second = bmr.reduce(first.guide)
    assert second.summary().loc["w", ["undecided", "wide"]].tolist() == [1, 0]


def test_priors_that_are_not_gaussian_have_no_width(make):
    prior = dist.Laplace(torch.zeros(3), 1.0)
    row = bmr.reduce(make(torch.zeros(3), torch.full((3,), 9.0), prior)).summary().loc["w"]
    assert row["wide"] == 0


def test_elements_without_a_prior_are_counted_and_nothing_is_nan(make):
    prior = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, False]))
    result = bmr.reduce(make(torch.zeros(3), torch.full((3,), 0.5), prior))
    row = result.summary().loc["w"]
    assert row["unscored"] == 2
    assert "2 without a prior, kept" in row["note"]
    assert result.masks["w"].tolist() == [False, True, True]
    assert math.isfinite(result.delta_f)
    presence = bmr.presence(make(torch.zeros(3), torch.full((3,), 0.5), prior)).probability["w"]
    assert presence.tolist() == pytest.approx([1 / 3, 1.0, 1.0])


def test_each_element_is_compared_with_its_own_prior(make):
    prior = dist.Normal(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]))
    result = bmr.reduce(make(torch.full((3,), 2.0), torch.full((3,), 0.9), prior))
    assert result.summary().loc["w", "wide"] == 1


def twins(family):
    """Two weights of which each seems superfluous; dropping both is a disaster."""
    if family == "low rank":
        guide = AutoLowRankMultivariateNormal(
            model_of(dist.Normal(torch.zeros(3).double(), 1.0)), rank=1
        )
        guide()
        guide.loc.data.copy_(torch.tensor([0.5, 0.5, 2.0]))
        guide.scale = torch.full((3,), 0.02).double()
        guide.cov_factor.data.copy_(torch.tensor([[35.0], [-35.0], [0.0]]))
        return guide
    guide = AutoMultivariateNormal(model_of(dist.Normal(torch.zeros(3).double(), 1.0)))
    guide()
    guide.loc.data.copy_(torch.tensor([0.5, 0.5, 2.0]))
    guide.scale = torch.tensor([0.7, 0.02, 0.3]).double()
    tril = torch.eye(3).double()
    tril[1, 0] = -0.7 / 0.02
    guide.scale_tril = tril
    return guide


@pytest.mark.parametrize("family", ["dense", "low rank"])
def test_a_reduction_says_what_naive_dropping_would_have_cost(family):
    guide = twins(family)
    result = bmr.reduce(guide)
    naive = bmr.reduce(guide, select=lambda s: {"w": s.delta_f["w"] > 0})
    assert result.delta_f < 0
    assert naive.delta_f > 100
    assert result.naive_delta_f == pytest.approx(naive.delta_f)
    assert naive.naive_delta_f == pytest.approx(naive.delta_f)
    assert f"ΔF = {naive.delta_f:+.2f} nats" in str(result)
    assert "own ΔF" not in str(naive)


def test_without_correlation_there_is_nothing_naive():
    prior = dist.Normal(torch.zeros(2), 1.0)
    result = bmr.reduce(independent(torch.zeros(2), torch.full((2,), 0.5), prior))
    assert result.naive_delta_f is None
    assert "own ΔF" not in str(result)
