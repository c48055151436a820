"""Probabilities of presence: against Bayes' rule by hand, enumeration, and quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.poutine import block
from scipy.integrate import quad

import pyro_bmr as bmr
from pyro_bmr.averaging.subset_sampling import walk
from pyro_bmr.mathematics.evidence import delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets, subset_members


def mean_field(loc, scale, prior=None):
    """An AutoNormal guide with these parameters, for a site "w"."""
    prior = dist.Normal(torch.zeros_like(loc), 1.0) if prior is None else prior
    guide = AutoNormal(lambda: pyro.sample("w", prior.to_event(1)))
    guide()
    guide.locs.w, guide.scales.w = loc, scale
    return guide


def full_covariance(posterior):
    guide = AutoMultivariateNormal(model_of(len(posterior.loc)))
    guide()
    scale = posterior.scale_tril.diagonal()
    guide.loc.data.copy_(posterior.loc)
    guide.scale, guide.scale_tril = scale, posterior.scale_tril / scale[:, None]
    return guide


def low_rank(posterior):
    rank = posterior.cov_factor.shape[-1]
    guide = AutoLowRankMultivariateNormal(model_of(len(posterior.loc)), rank=rank)
    guide()
    scale = posterior.cov_diag.sqrt()
    guide.loc.data.copy_(posterior.loc)
    guide.scale = scale
    guide.cov_factor.data.copy_(posterior.cov_factor / scale[:, None])
    return guide


def model_of(count):
    def model():
        half = count // 2
        pyro.sample("a", dist.Normal(torch.zeros(half).double(), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(count - half).double(), 1.0).to_event(1))

    return model


def correlated(count, strength=1.0):
    root = 0.3 * torch.randn(count, count + 3, dtype=torch.float64)
    tril = torch.linalg.cholesky(root @ root.mT + 0.02 * torch.eye(count))
    return Dense(strength * torch.randn(count, dtype=torch.float64), tril)


def joint(result):
    return torch.cat([result.probability["a"], result.probability["b"]])


def enumerate_by_chain(posterior, log_odds):
    """Every subset's joint removal by itself, and Bayes' rule over them."""
    count = len(posterior.loc)
    log_prior = torch.full((count,), -0.5 * math.log(2 * math.pi), dtype=torch.float64)
    drop = subset_members(torch.arange(2**count), count)
    score = [delta_f_spike_chain(posterior.split(d)[0], log_prior[d]).sum() for d in drop]
    log_weight = -torch.stack(score) + log_odds * (~drop).sum(-1)
    return log_weight.softmax(0) @ (~drop).double()


@pytest.mark.parametrize("prior", [0.5, 0.1])
def test_an_independent_element_is_present_by_bayes_rule(prior):
    """Evidence of present and absent by integrating likelihood times prior numerically."""
    loc, scale = torch.tensor([0.0, 0.4, -1.5]).double(), torch.tensor([0.9, 0.3, 0.5]).double()
    found = bmr.presence(mean_field(loc, scale), prior=prior).probability["w"]
    for m, s, p in zip(loc.tolist(), scale.tolist(), found.tolist(), strict=True):
        precision = 1 / s**2 - 1

        def likelihood(w, m=m, s=s, precision=precision):
            # Up to a factor, posterior over prior.
            return math.exp(-0.5 * precision * w**2 + w * m / s**2)

        def weighted(w, likelihood=likelihood):
            return likelihood(w) * math.exp(-0.5 * w**2) / math.sqrt(2 * math.pi)

        present, _ = quad(weighted, m - 12 * s, m + 12 * s)
        odds = present / likelihood(0.0) * prior / (1 - prior)
        assert p == pytest.approx(odds / (1 + odds), rel=1e-8)


def test_what_was_pruned_before_is_absent_and_what_cannot_go_is_present():
    mask = torch.tensor([True, True, False])
    prior = dist.Normal(torch.zeros(3), 1.0).mask(mask)
    guide = mean_field(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0.5, 0.5, 0.5]), prior)
    first = bmr.reduce(guide, select=lambda s: {"w": torch.tensor([False, True, True])})
    found = bmr.presence(first.guide)
    assert found.probability["w"].tolist() == pytest.approx([0.0, 1 / 3, 1.0])
    assert found.expected_kept == pytest.approx(4 / 3)
    assert "w" in str(found)


def test_correlated_elements_are_summed_over_all_subsets():
    posterior = correlated(7)
    found = bmr.presence(full_covariance(posterior), prior=0.3)
    expected = enumerate_by_chain(posterior, math.log(0.3 / 0.7))
    torch.testing.assert_close(joint(found), expected)
    assert found.methods == {"a": "128 subsets", "b": "128 subsets"}
    assert not found.standard_error


def test_twins_share_their_presence():
    """Of two collinear weights one must be there; naively, by its own score, neither is."""
    tril = torch.tensor([[0.7, 0.0], [-0.699, 0.03]]).double()
    guide = full_covariance(Dense(torch.tensor([0.5, 0.5]).double(), tril))
    alone = torch.cat(list(bmr.reduce(guide).scores.values()))
    assert (alone < 0).all()
    probability = joint(bmr.presence(guide))
    assert probability.sum() >= 1
    assert (probability > 0.5).all()


@pytest.mark.parametrize("family", ["dense", "low rank"])
def test_a_walk_visits_subsets_as_often_as_their_evidence_says(family):
    count = 10
    posterior = correlated(count)
    if family == "low rank":
        loc, factor = 0.7 * torch.randn(count).double(), 0.5 * torch.randn(count, 2).double()
        posterior = LowRank(loc, factor, 0.1 + 0.3 * torch.rand(count).double())
    log_prior = torch.full((count,), -0.6).double()
    log_odds = 0.3 * torch.randn(count).double()
    delta_f = delta_f_of_all_subsets(posterior, log_prior)
    kept = ~subset_members(torch.arange(2**count), count)
    exact = (kept.double() @ log_odds - delta_f).softmax(0) @ kept.double()
    total, present, counted = 0.0, torch.zeros(count).double(), torch.zeros(count).double()
    for step, visit in enumerate(walk(posterior, log_prior, log_odds, 2500, seed=1)):
        index = ((~visit.kept).long() << torch.arange(count)).sum(-1)
        torch.testing.assert_close(visit.delta_f, delta_f[index])
        if step >= 200:
            total += visit.weight.sum()
            present += visit.weight @ visit.presence
            counted += visit.weight @ visit.kept.double()
    torch.testing.assert_close(present / total, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(counted / total, exact, rtol=0, atol=0.06)


@pytest.mark.parametrize("family", [full_covariance, low_rank])
def test_more_than_16_elements_are_sampled_within_the_error_that_is_reported(family):
    """Two independent blocks of 9 and 9: together sampled, apart enumerated."""
    if family is full_covariance:
        blocks = [correlated(9), correlated(9)]
        tril = torch.block_diag(*(b.scale_tril for b in blocks))
        posterior = Dense(torch.cat([b.loc for b in blocks]), tril)
    else:
        blocks = [
            LowRank(
                0.7 * torch.randn(9).double(),
                0.4 * torch.randn(9, 1).double(),
                0.1 + 0.3 * torch.rand(9).double(),
            )
            for _ in range(2)
        ]
        posterior = LowRank(
            torch.cat([b.loc for b in blocks]),
            torch.block_diag(*(b.cov_factor for b in blocks)),
            torch.cat([b.cov_diag for b in blocks]),
        )
    found = bmr.presence(family(posterior), num_samples=2000, seed=3)
    exact = torch.cat([enumerate_by_chain(b, 0.0) for b in blocks])
    error = torch.cat([found.standard_error["a"], found.standard_error["b"]])
    assert found.methods["a"] == "4 walks of 2,000"
    assert (error > 0).all()
    assert (error < 0.03).all()
    deviation = (joint(found) - exact).abs() / error
    assert deviation.max() < 5
    assert deviation.square().mean() < 3
    again = bmr.presence(family(posterior), num_samples=2000, seed=3)
    assert torch.equal(joint(again), joint(found))


def test_a_walk_crosses_between_twins():
    """Nine pairs of which one must be there each: flips pass through both being there."""
    tril = torch.tensor([[0.7, 0.0], [-0.6993, 0.0313]]).double()
    loc = torch.full((9, 2), 0.5).double() + 0.2 * torch.randn(9, 2).double()
    blocks = [Dense(pair, tril) for pair in loc]
    posterior = Dense(loc.reshape(-1), torch.block_diag(*[tril] * 9))
    found = bmr.presence(full_covariance(posterior))
    exact = torch.cat([enumerate_by_chain(b, 0.0) for b in blocks])
    error = torch.cat([found.standard_error["a"], found.standard_error["b"]])
    assert (error < 0.04).all()
    assert ((joint(found) - exact).abs() < 5 * error).all()


def test_a_learned_prior_is_the_fixed_point_of_its_equation():
    loc = torch.cat([torch.zeros(80), torch.full((20,), 2.0)]).double()
    guide = mean_field(loc, torch.full((100,), 0.3).double())
    found = bmr.presence(guide, prior=bmr.LearnedPrior(alpha=2.0, beta=3.0))
    delta_f = bmr.reduce(guide).scores["w"]
    zeta = torch.tensor(found.log_odds["w"], dtype=torch.float64)
    present = torch.sigmoid(delta_f + zeta).sum()
    again = torch.digamma(2.0 + present) - torch.digamma(3.0 + 100 - present)
    assert zeta.item() == pytest.approx(again.item(), abs=1e-9)
    torch.testing.assert_close(found.probability["w"], torch.sigmoid(delta_f + zeta))


def test_a_learned_prior_is_the_mode_of_the_variational_bound():
    """The bound over q(z) q(pi) at its fixed point is higher than next to it."""
    guide = mean_field(torch.linspace(-1.5, 1.5, 30).double(), torch.full((30,), 0.5).double())
    delta_f = bmr.reduce(guide).scores["w"]
    best = bmr.presence(guide, prior=bmr.LearnedPrior()).log_odds["w"]

    def bound(zeta):
        # For each q(z) of the family the best Beta is that with these counts.
        q = torch.sigmoid(delta_f + zeta)
        entropy = -(q * q.log() + (1 - q) * (1 - q).log()).sum()
        evidence = torch.lgamma(1 + q.sum()) + torch.lgamma(1 + (1 - q).sum())
        return (q * delta_f).sum() + entropy + evidence

    for step in (-0.05, 0.05):
        assert bound(torch.tensor(best).double()) > bound(torch.tensor(best + step).double())


def test_a_prior_can_be_shared_by_all_sites_and_all_factors():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, expose=["a"]), init_scale=0.3))
    guide.append(AutoMultivariateNormal(block(model, expose=["b"]), init_scale=0.3))
    guide()
    by_site = bmr.presence(guide, prior=bmr.LearnedPrior(shared="site")).log_odds
    shared = bmr.presence(guide, prior=bmr.LearnedPrior(shared="model"))
    assert by_site["a"] != by_site["b"]
    assert shared.log_odds["a"] == shared.log_odds["b"]
    present = torch.tensor(shared.expected_kept, dtype=torch.float64)
    again = torch.digamma(1 + present) - torch.digamma(1 + 7 - present)
    assert shared.log_odds["a"] == pytest.approx(again.item(), abs=1e-9)


def test_a_learned_prior_of_sampled_elements_comes_near_its_fixed_point():
    posterior = correlated(18, strength=0.5)
    found = bmr.presence(full_covariance(posterior), prior=bmr.LearnedPrior(shared="model"))
    present = torch.tensor(found.expected_kept)
    again = torch.digamma(1 + present) - torch.digamma(1 + 18 - present)
    assert found.log_odds["a"] == pytest.approx(again.item(), abs=0.1)


def test_nothing_outside_is_touched():
    guide = full_covariance(correlated(18))
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    before = torch.get_rng_state()
    bmr.presence(guide, num_samples=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.get_param_store().keys() == store.keys()
    assert all(torch.equal(v, store[n]) for n, v in pyro.get_param_store().items())


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, "learned", None])
def test_an_impossible_prior_is_an_error_that_says_what_to_give(prior):
    with pytest.raises(ValueError, match=r"LearnedPrior"):
        bmr.presence(mean_field(torch.zeros(2), torch.ones(2)), prior=prior)


def test_impossible_options_are_errors():
    with pytest.raises(ValueError, match="positive"):
        bmr.LearnedPrior(alpha=0.0)
    with pytest.raises(ValueError, match="'site' or 'model'"):
        bmr.LearnedPrior(shared="layer")
    with pytest.raises(ValueError, match="num_samples"):
        bmr.presence(mean_field(torch.zeros(2), torch.ones(2)), num_samples=3)


def test_priors_go_by_element_and_pattern():
    mean = xr.DataArray(
        [[0.0, 0.1], [0.2, 0.3]],
        coords={"to": ["V1", "V2"], "side": ["l", "r"]},
        dims=("to", "side"),
        name="A",
    )
    posterior = bmr.Posterior({"A": mean, "b": 0.1}, scale=0.3, prior_scale=1.0)

    def expected(pi, at):
        precision = 1 / 0.3**2
        ratio = np.exp(-(at**2) * precision / 2) / 0.3
        return pi / (pi + (1 - pi) * ratio)

    def found(prior):
        told = bmr.presence(posterior, prior=prior).probability
        return told["A"].numpy().reshape(-1), float(told["b"])

    for prior, pi in (
        ({"A[V1,l]": 0.9}, [0.9, 0.5, 0.5, 0.5]),
        ({"A*": 0.8, "A[V1,l]": 0.1}, [0.1, 0.8, 0.8, 0.8]),
        ({"A[V1,l]": 0.1, "A*": 0.8}, [0.8, 0.8, 0.8, 0.8]),
        ({"A[*,r]": 0.2}, [0.5, 0.2, 0.5, 0.2]),
        ({"A": [0.2, 0.7], "A[V2,r]": 0.4}, [0.2, 0.7, 0.2, 0.4]),
    ):
        elements, scalar = found(prior)
        np.testing.assert_allclose(
            elements, expected(np.array(pi), mean.values.reshape(-1)), rtol=1e-6
        )
        np.testing.assert_allclose(scalar, expected(0.5, np.array(0.1)), rtol=1e-6)
    averaged = bmr.average(posterior, prior={"A[V1,l]": 0.9}).presence["A"].reshape(-1)
    np.testing.assert_allclose(averaged, found({"A[V1,l]": 0.9})[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"Did you mean .*'A\[V1,l\]'"):
        bmr.presence(posterior, prior={"A[V3,l]": 0.9})
    with pytest.raises(ValueError, match="broadcasts"):
        bmr.presence(posterior, prior={"A[V1,l]": [0.9, 0.8]})
