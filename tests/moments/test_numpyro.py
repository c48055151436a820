"""Autoguides of NumPyro, against their own distributions and draws."""

import numpy as np
import pytest
import torch
from often import often
from snippets import run_snippet

import pyro_bmr as bmr

numpyro = pytest.importorskip("numpyro", reason="reads guides of NumPyro")
jax = pytest.importorskip("jax")

from numpyro import distributions as dist  # noqa: E402
from numpyro.infer import SVI, Trace_ELBO, autoguide  # noqa: E402

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 3))
Y = X[:, 0] + 0.5 * RANDOM.normal(size=40)
PRIOR = np.array([[2.0, 0.5], [0.5, 1.0]])


def model(x, y=None):
    z = numpyro.sample("z", dist.Normal(0.5, 1.5).expand([2]).to_event(1))
    w = numpyro.sample("w", dist.Normal(np.zeros(3), np.array([1.0, 2.0, 3.0])))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("child", dist.Normal(0.0, scale))
    heavy = numpyro.sample("heavy", dist.StudentT(3.0))
    a = numpyro.sample("a", dist.MultivariateNormal(np.ones(2), PRIOR))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w + z.sum() + a.sum() + heavy, scale), obs=y)


def prepare(family, program=model, **options):
    """Return a guide, and parameters as SVI keeps them, at other values than the first ones."""
    guide = getattr(autoguide, family)(program, **options)
    svi = SVI(program, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), X, Y))
    random = np.random.default_rng(1)
    for name, value in params.items():
        noise = 0.3 * random.uniform(size=value.shape)
        params[name] = np.asarray(value) + (np.tril(noise) if "tril" in name else noise)
    return guide, params


def vector(guide, values):
    """Bring what NumPyro unpacks by site into the order z, w, a of this test."""
    return np.concatenate([np.asarray(values[name]).reshape(-1) for name in ("z", "w", "a")])


@pytest.mark.parametrize(
    "family",
    often(
        ["AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"],
        "AutoDiagonalNormal",
    ),
)
def test_guides_over_all_sites(family):
    guide, params = prepare(family)
    with pytest.warns(UserWarning) as caught:
        posterior = bmr.Posterior.from_numpyro(guide, params, free_energy=5.0)
    left = str(caught[0].message)
    for part in (
        "scale (its support is",
        "child (its prior depends",
        "heavy (its prior is StudentT",
    ):
        assert part in left
    assert list(posterior.layout.shapes) == ["z", "w", "a"]
    assert posterior.free_energy == 5.0

    own = guide.get_posterior(params)
    places = guide._unpack_latent(np.arange(guide.latent_dim))
    where = vector(guide, places)
    np.testing.assert_allclose(posterior.mean, np.asarray(own.mean)[where], rtol=1e-5, atol=1e-6)
    if family == "AutoDiagonalNormal":
        covariance = np.diag(own.variance)
    else:
        covariance = np.asarray(own.covariance_matrix)
    np.testing.assert_allclose(
        posterior.covariance, covariance[np.ix_(where, where)], rtol=1e-3, atol=1e-6
    )
    median = guide.median(params)
    np.testing.assert_allclose(posterior.mean, vector(guide, median), rtol=1e-5, atol=1e-6)

    prior = np.zeros((7, 7))
    prior[range(5), range(5)] = [2.25, 2.25, 1, 4, 9]
    prior[5:, 5:] = PRIOR
    np.testing.assert_allclose(posterior.prior_covariance, prior, rtol=1e-6)
    assert posterior.prior_mean.tolist() == [0.5, 0.5, 0, 0, 0, 1, 1]


def test_a_guide_by_site():
    guide, params = prepare("AutoNormal", prefix="mine")
    with pytest.warns(UserWarning, match="left out are scale"):
        posterior = bmr.Posterior.from_numpyro(guide, params)
    draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(4000,))
    for name, mean in posterior.layout.split(posterior.mean).items():
        scale = np.asarray(draws[name]).std(0)
        np.testing.assert_allclose(mean, np.asarray(draws[name]).mean(0), atol=0.1)
        own = posterior.layout.split(posterior.covariance.diagonal().sqrt())[name]
        np.testing.assert_allclose(own, scale, rtol=0.06)
    one = bmr.Posterior.from_numpyro(guide, params, sites=["w"])
    assert one.names == ("w[0]", "w[1]", "w[2]")
    given = bmr.Posterior.from_numpyro(
        guide, params, sites=["heavy", "child"], prior_scale={"heavy": 1.0, "child": 2.0}
    )
    assert given.prior_covariance.diagonal().tolist() == [1.0, 4.0]


@pytest.mark.rare
def test_sites_in_plates():
    def plated(x, y=None):
        with numpyro.plate("rows", 2, dim=-2), numpyro.plate("inputs", 3, dim=-1):
            w = numpyro.sample("w", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(x @ w.sum(0), 1.0), obs=y)

    for family in ("AutoNormal", "AutoDiagonalNormal"):
        guide, params = prepare(family, plated)
        posterior = bmr.Posterior.from_numpyro(guide, params)
        assert posterior.layout.shapes == {"w": torch.Size([2, 3])}
        assert (posterior.prior_covariance == 4 * torch.eye(6)).all()


@pytest.mark.rare
def test_the_hessian_of_a_linear_model():
    def linear(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    guide, params = prepare("AutoLaplaceApproximation", linear)
    posterior = bmr.Posterior.from_numpyro(guide, params)
    covariance = np.linalg.inv(np.eye(3) + X.T @ X / 0.25)
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-3, atol=1e-6)
    assert (posterior.prior_covariance == torch.eye(3)).all()


@pytest.mark.rare
def test_the_snippet_of_the_documentation():
    names = run_snippet("numpyro")
    posterior = names["posterior"]
    np.testing.assert_allclose(posterior.mean, names["mean"], atol=0.1)
    np.testing.assert_allclose(posterior.covariance, names["covariance"], atol=0.01)
    assert posterior.names == ("w[0]", "w[1]", "w[2]")


def test_guides_that_cannot_be_read():
    guide, params = prepare("AutoNormal")
    with pytest.raises(ValueError, match="sites='scale'. Expected sites that a Gaussian.*support"):
        bmr.Posterior.from_numpyro(guide, params, sites=["scale"])
    with pytest.raises(ValueError, match="sites='v'. Expected some of"):
        bmr.Posterior.from_numpyro(guide, params, sites=["v"])
    with pytest.raises(ValueError, match="never called"):
        bmr.Posterior.from_numpyro(autoguide.AutoNormal(model), params)
    with pytest.raises(TypeError, match="guide=1.0. Expected an autoguide of NumPyro"):
        bmr.Posterior.from_numpyro(1.0, params)
    with pytest.raises(TypeError, match="params=3"):
        bmr.Posterior.from_numpyro(guide, 3)
    with pytest.raises(ValueError, match="the parameters of this guide, among them 'auto_loc'"):
        bmr.Posterior.from_numpyro(guide, {"other": 1.0})

    def positive(x, y=None):
        numpyro.sample("scale", dist.HalfNormal(1.0))

    guide, params = prepare("AutoNormal", positive)
    with pytest.raises(ValueError, match="no site can be read, .*support is"):
        bmr.Posterior.from_numpyro(guide, params)
    guide, params = prepare("AutoDelta", lambda x, y: numpyro.sample("w", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="'w_auto_scale'"):
        bmr.Posterior.from_numpyro(guide, params)
