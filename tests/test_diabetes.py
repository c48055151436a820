"""Inclusion probabilities on real data: exact evidences, a Gibbs sampler, and automatic relevance.

Linear regression on the ten standardised columns of scikit-learn's diabetes data, with known noise:
the posterior of the full model is exact, and one reduction of it must know all 1,024 models.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import multivariate_normal
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ARDRegression

import pyro_bmr as bmr

NOISE, SLAB = 0.7, 0.4


@pytest.fixture(scope="module")
def data():
    x, y = load_diabetes(return_X_y=True)
    x, y = ((t - t.mean(0)) / t.std(0) for t in (x, y))
    return x, y


def exact_guide(x, y, noise, slab):
    """The exact posterior of a linear regression, as a full-covariance guide."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    slab = torch.as_tensor(slab, dtype=torch.float64).expand(x.shape[1])

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(len(slab)).double(), slab).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    pyro.clear_param_store()
    guide = AutoMultivariateNormal(model)
    guide()
    covariance = (x.mT @ x / noise**2 + slab.pow(-2).diag()).inverse()
    tril = torch.linalg.cholesky(covariance)
    guide.loc.data.copy_(covariance @ x.mT @ y / noise**2)
    guide.scale = tril.diagonal()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


def log_evidence(x, y):
    """Of one model, by the determinant lemma in as many dimensions as it has columns."""
    ratio = (SLAB / NOISE) ** 2
    inner = np.eye(x.shape[1]) + ratio * x.T @ x
    quadratic = y @ y - ratio * (y @ x) @ np.linalg.solve(inner, x.T @ y)
    log_determinant = np.linalg.slogdet(inner)[1] + len(y) * math.log(2 * math.pi * NOISE**2)
    return -0.5 * (log_determinant + quadratic / NOISE**2)


def enumerate_models(x, y, prior):
    """Inclusion probabilities from the evidence of every model, each computed from scratch."""
    count = x.shape[1]
    keep = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
    log_odds = math.log(prior) - math.log1p(-prior)
    log_weight = np.array([log_evidence(x[:, k], y) + k.sum() * log_odds for k in keep])
    weight = np.exp(log_weight - log_weight.max())
    return weight @ keep / weight.sum()


def test_the_evidence_of_a_model_is_the_density_of_its_data(data):
    x, y = data
    for columns in ([0, 3, 4], [], list(range(10))):
        covariance = NOISE**2 * np.eye(len(y)) + SLAB**2 * x[:, columns] @ x[:, columns].T
        expected = multivariate_normal.logpdf(y, np.zeros(len(y)), covariance)
        assert log_evidence(x[:, columns], y) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("prior", [0.5, 0.2])
def test_one_fit_knows_the_inclusion_probabilities_of_all_1024_models(data, prior):
    found = bmr.presence(exact_guide(*data, NOISE, SLAB), prior=prior).probability["w"]
    np.testing.assert_allclose(found.numpy(), enumerate_models(*data, prior), atol=1e-11)


def test_a_gibbs_sampler_of_spike_and_slab_finds_the_same(data):
    """Draw each indicator and weight given the other weights: nothing here is integrated twice."""
    x, y = data
    generator = np.random.default_rng(0)
    gram, projection = x.T @ x, x.T @ y
    variance = 1 / (gram.diagonal() / NOISE**2 + 1 / SLAB**2)
    weights, draws = np.zeros(10), np.zeros((6000, 10))
    for sweep in range(-500, len(draws)):
        uniform, normal = generator.random(10), generator.standard_normal(10)
        for i in range(10):
            rest = projection[i] - gram[i] @ weights + gram[i, i] * weights[i]
            mean = variance[i] * rest / NOISE**2
            log_odds = 0.5 * (math.log(variance[i]) - 2 * math.log(SLAB) + mean**2 / variance[i])
            present = uniform[i] < 1 / (1 + math.exp(-log_odds))
            weights[i] = present * (mean + math.sqrt(variance[i]) * normal[i])
        if sweep >= 0:
            draws[sweep] = weights != 0
    batches = draws.reshape(20, 300, 10).mean(1)
    error = batches.std(0, ddof=1) / math.sqrt(20)
    found = bmr.presence(exact_guide(x, y, NOISE, SLAB)).probability["w"].numpy()
    assert error.max() < 0.05
    assert (abs(draws.mean(0) - found) < 5 * error + 1e-3).all()


def test_automatic_relevance_keeps_what_some_slab_would_keep(data):
    r"""ARD gives weight i the precision l_i that maximises the evidence, given all others.

    With C the covariance of the data without column i, s = x'C^-1 x and q = x'C^-1 y, the log
    evidence gains (ln l/(l+s) + q^2/(l+s)) / 2 when the weight enters with the precision l, which
    is our Delta F of dropping it. Its maximum is at l = s^2/(q^2 - s) and positive if q^2 > s, and
    at l = infinity, where it is 0, otherwise (Tipping & Faul 2003). So of the weights that ARD
    prunes no slab, however wide, makes the inclusion probability more than a half given the other
    weights and even odds; and those that it keeps are more probably there than not under their own
    slab. It says nothing about inclusion probabilities under a slab that all weights share.
    """
    x, y = data
    # Without its hyperpriors, and until nothing moves, ARD is at the maximum itself.
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    ard = ARDRegression(fit_intercept=False, tol=0, max_iter=3000, **flat).fit(x, y)
    kept = np.flatnonzero(ard.lambda_ < ard.threshold_lambda)
    pruned = np.flatnonzero(ard.lambda_ >= ard.threshold_lambda)
    assert len(kept) >= 3
    assert len(pruned) >= 2
    noise = ard.alpha_**-0.5

    def relevance(i):
        others = kept[kept != i]
        covariance = (
            noise**2 * np.eye(len(y)) + (x[:, others] / ard.lambda_[others]) @ x[:, others].T
        )
        solved = np.linalg.solve(covariance, np.stack([x[:, i], y], 1))
        return x[:, i] @ solved

    def gain(precision, s, q):
        return 0.5 * (math.log(precision / (precision + s)) + q**2 / (precision + s))

    own = exact_guide(x[:, kept], y, noise, ard.lambda_[kept] ** -0.5)
    scores = bmr.reduce(own).scores["w"]
    for position, i in enumerate(kept):
        s, q = relevance(i)
        assert q**2 > s
        assert ard.lambda_[i] == pytest.approx(s**2 / (q**2 - s), rel=1e-3)
        assert scores[position].item() == pytest.approx(gain(ard.lambda_[i], s, q), abs=1e-6)
        assert scores[position] > 0
    for i in pruned:
        s, q = relevance(i)
        assert q**2 <= s
        columns = np.append(kept, i)
        for slab in (1e-3, 0.01, 0.1, 1.0, 10.0):
            scales = np.append(ard.lambda_[kept] ** -0.5, slab)
            score = bmr.reduce(exact_guide(x[:, columns], y, noise, scales)).scores["w"][-1]
            assert score.item() == pytest.approx(gain(slab**-2, s, q), abs=1e-6)
            assert score < 0
