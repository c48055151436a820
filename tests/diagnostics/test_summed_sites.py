"""Discrete sites are summed out of what is said of predictions, of the audit and of `compare`."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from mixtures import CHAIN, PAIRS, ROWS_APART, X, Y
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.diagnostics.draws import draw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
QUIET = {"num_samples": 40, "progress": False}


@pytest.mark.parametrize("name", ROWS_APART)
def test_log_likelihood_and_mean_are_those_of_the_sum_written_out(name):
    pair = ROWS_APART[name]
    guide = pair.guide(X, Y)
    with warnings.catch_warnings(action="error"):
        found = draw(pair.summed, guide, (X, Y), num_samples=30).observed["y"]
    expected = draw(pair.written_out, guide, (X, Y), num_samples=30).observed["y"]
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
    assert found.coupling is None


@config_enumerate
def labelled(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        logits = torch.stack(torch.broadcast_tensors(w[0] * k, w[1] + x[:, 0]), -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def test_probabilities_of_classes_are_summed():
    classes = (Y > 0).long()
    guide = AutoNormal(poutine.block(labelled, hide=["k"]), init_scale=0.5)
    guide(X, classes)
    draws = draw(labelled, guide, (X, classes), num_samples=5)
    site, w = draws.observed["y"], draws.latent["w"]
    k = torch.arange(3.0)
    logits = torch.stack(torch.broadcast_tensors(w[:, :1, None] * k, w[:, 1:, None] + X[:, :1]), -1)
    expected = (torch.tensor([0.2, 0.3, 0.5])[:, None] * logits.softmax(-1)).sum(-2)
    torch.testing.assert_close(site.probabilities, expected, rtol=1e-5, atol=1e-5)
    right = expected.gather(-1, classes.expand(5, -1)[..., None])[..., 0].log()
    torch.testing.assert_close(site.log_prob, right, rtol=1e-5, atol=1e-5)


def test_given_a_latent_of_the_row_the_discrete_site_is_drawn_as_that_tells():
    """`effect` is near 2 where k is 1, and y is k there too."""

    @config_enumerate
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            effect = pyro.sample("effect", dist.Normal(2 * k, 0.5))
            pyro.sample("y", dist.Normal(x @ w + effect + k, 1.0), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["k"]), init_scale=0.5)
    guide(X, Y)
    with pytest.warns(UserWarning, match=r"draws of 'y' take \['k'\] from their prior.*'effect'"):
        draws = draw(model, guide, (X, Y), num_samples=5)
    w, effect = draws.latent["w"], draws.latent["effect"]
    prior = torch.tensor([0.6, 0.4]) * torch.stack(
        [dist.Normal(2.0 * k, 0.5).log_prob(effect).exp() for k in (0, 1)], -1
    )
    chances = prior / prior.sum(-1, keepdim=True)
    each = dist.Normal((w @ X.mT + effect)[..., None] + torch.arange(2.0), 1.0)
    expected = (chances * each.log_prob(Y[:, None]).exp()).sum(-1).log()
    torch.testing.assert_close(draws.observed["y"].log_prob, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sites", "reason"),
    [
        ("shared", ["y"], r"rows of 'y' share the summed-out sites \['k'\]"),
        ("nested", ["y"], r"rows of 'y' share the summed-out sites \['k'\]"),
        ("chains", ["y0", "y1", "y2"], "'y0' depends on the same summed-out sites as"),
    ],
)
def test_where_rows_share_a_sum_there_is_no_log_likelihood(name, sites, reason):
    pair = PAIRS[name]
    guide = pair.guide(X, Y)
    with pytest.warns(UserWarning, match=f"log likelihood of .*{reason}"):
        data = bmr.to_arviz(pair.summed, guide, X, Y, num_samples=20)
    assert "log_likelihood" not in data
    assert sorted(data.posterior_predictive[one].name for one in sites) == sites
    comparison = bmr.compare((pair.summed, guide), X, Y, **QUIET)
    (scores,) = comparison.scores.values()
    assert "elpd_loo" not in scores
    assert any("no elpd_loo" in note for note in comparison.notes)


def test_a_row_by_itself_has_its_marginal_where_rows_share_a_sum():
    pair = PAIRS["chains"]
    guide = pair.guide(X, Y)
    draws = draw(pair.summed, guide, (X, Y), num_samples=6)
    chance = CHAIN[0] @ CHAIN @ CHAIN
    loc = (draws.latent["w"] @ X.mT).reshape(-1, 4, 3)[..., 2, None] + 2.0 * torch.arange(2)
    density = dist.Normal(loc, 1.0).log_prob(Y.reshape(4, 3)[:, 2, None])
    expected = (chance.log() + density).logsumexp(-1)
    torch.testing.assert_close(draws.observed["y2"].log_prob, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draws.observed["y2"].mean, (loc * chance).sum(-1))


@pytest.mark.parametrize("name", ["outliers", "two sites"])
def test_reduction_audit_and_comparison_are_those_of_the_sum_written_out(name):
    pair = ROWS_APART[name]
    guide = pair.guide(X, Y)
    results = [bmr.reduce(guide, X, Y, model=one) for one in (pair.summed, pair.written_out)]
    found, expected = results
    assert torch.equal(found.masks["w"], expected.masks["w"])
    assert found.realised == pytest.approx(expected.realised, abs=1e-3)
    assert found.realised < 0
    audits = [result.audit(X, Y, **QUIET) for result in results]
    totals = [(audit.total.realised, audit.total.error) for audit in audits]
    assert totals[0] == pytest.approx(totals[1], abs=1e-3)
    scores = [bmr.compare(result, X, Y, **QUIET).summary() for result in results]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3)
