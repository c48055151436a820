"""Draws in every form against numpy, with and without a Pyro model."""

import warnings
from importlib.metadata import version

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_bmr as bmr
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide

NEW = int(version("arviz").partition(".")[0]) >= 1
RANDOM = np.random.default_rng(0)
ROOT = RANDOM.normal(size=(4, 4))
DRAWS = RANDOM.normal(size=(4, 300, 4)) @ ROOT.T + 1.0  # of 4 chains
W, B = DRAWS[..., :3], DRAWS[..., 3]
FLAT = DRAWS.reshape(-1, 4)


def from_dict(groups, **named):
    return az.from_dict(groups, **named) if NEW else az.from_dict(**groups, **named)


def data(**groups):
    posterior = {"w": W, "b": B, "lp__": B**2, "mu": np.zeros((4, 300, 7))}
    coords = {"input": ["age", "sex", "bmi"]}
    return from_dict({"posterior": posterior} | groups, dims={"w": ["input"]}, coords=coords)


def model():
    pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def tree(inference_data):
    if NEW:
        return inference_data
    groups = {name: inference_data[name] for name in inference_data.groups()}
    return xr.DataTree.from_dict(groups)


def dataset():
    return tree(data())["posterior"].to_dataset()


FORMS = {
    "what ArviZ makes": data(),
    "a tree": tree(data()),
    "a node of a tree": tree(data())["posterior"],
    "a Dataset": dataset(),
    "extracted": az.extract(data()),
    "arrays by chain": {"w": W, "b": B, "lp__": B},
    "arrays": {"w": FLAT[:, :3], "b": FLAT[:, 3]},
    "tensors": {"w": torch.tensor(FLAT[:, :3]), "b": torch.tensor(FLAT[:, 3])},
    "named arrays": {"b": dataset()["b"], "w": dataset()["w"]},
    "axes in another order": dataset().transpose("input", "draw", ..., "chain"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_draws_with_a_model(form):
    with pytest.warns(UserWarning, match="mean and covariance .1200 draws") as caught:
        (factor,) = read_guide(FORMS[form], Origin(model))
    flat = {name: FLAT[:, i] for name, i in {"w": slice(3), "b": slice(3, 4)}.items()}
    order = np.hstack([flat[site.name] for site in factor.sites])
    np.testing.assert_allclose(factor.posterior.loc, order.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(factor.posterior.covariance, np.cov(order.T), rtol=1e-4, atol=1e-4)
    left = any(
        "Left out, because no sites of the model: lp__" in str(one.message) for one in caught
    )
    assert left == (form not in ("arrays", "tensors", "named arrays"))


def test_draws_that_do_not_fit_the_model():
    for samples, message in [
        ({"lp__": B}, r"samples of \['lp__'\], but the model has"),
        ({"w": W[..., :2], "b": B}, r"'w' have the shape .4, 300, 2."),
        ({"w": FLAT[:, :3], "b": B}, "other numbers of chains and draws"),
        (from_dict({"prior": {"w": W}}), r"the groups \['prior'\]. Expected a group 'posterior'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bmr.reduce(samples, model=model)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "arrays by chain"])
def test_forms_of_draws_without_a_model(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = bmr.Posterior.from_samples(
            FORMS[form], sites=["w", "b"], prior_scale=2.0, prior_mean=0.5, free_energy=3.0
        )
    named = form not in ("arrays", "tensors")
    assert posterior.names[1] == ("w[sex]" if named else "w[1]")
    assert posterior.names[3] == "b"
    np.testing.assert_allclose(posterior.mean, FLAT.mean(0), rtol=1e-12)
    np.testing.assert_allclose(posterior.covariance, np.cov(FLAT.T), rtol=1e-10, atol=1e-12)
    assert posterior.prior_covariance.diagonal().tolist() == [4.0] * 4
    assert posterior.prior_mean.tolist() == [0.5] * 4
    assert posterior.free_energy == 3.0


def test_the_prior_group():
    random = np.random.default_rng(1)
    prior = {
        "w": random.normal(size=(1, 4000, 3)) * [1, 2, 3] + 1,
        "b": random.normal(size=(1, 4000)),
    }
    posterior = bmr.Posterior.from_samples(data(prior=prior))
    flat = np.hstack([prior["w"][0], prior["b"].T])
    where = [posterior.names.index(name) for name in ("w[age]", "w[sex]", "w[bmi]", "b")]
    np.testing.assert_allclose(posterior.prior_mean[where], flat.mean(0), rtol=1e-10)
    np.testing.assert_allclose(
        posterior.prior_covariance[where][:, where], np.diag(flat.var(0, ddof=1)), rtol=1e-10
    )

    together = random.normal(size=(1, 4000, 3)) @ ROOT[:3, :3].T
    posterior = bmr.Posterior.from_samples(data(prior={"w": together}))
    assert posterior.names == ("w[age]", "w[sex]", "w[bmi]")
    np.testing.assert_allclose(posterior.prior_covariance, np.cov(together[0].T), rtol=1e-10)
    np.testing.assert_allclose(posterior.mean, FLAT[:, :3].mean(0))
    with pytest.raises(ValueError, match=r"a prior group without \['b'\]"):
        bmr.Posterior.from_samples(data(prior={"w": together}), sites=["w", "b"])
    given = bmr.Posterior.from_samples(data(prior={"w": together}), prior_scale={"w": 1.0})
    assert given.names == posterior.names
    assert (given.prior_covariance == torch.eye(3)).all()
    whole = bmr.Posterior.from_samples(data(), sites=["w", "b", "mu"])
    assert whole.prior_covariance is None
    assert whole.free.tolist() == [True] * 4 + [False] * 7
    np.testing.assert_allclose(whole.covariance[:4, :4], np.cov(FLAT.T), rtol=1e-10, atol=1e-12)


def test_poor_moments_are_told():
    few = {"w": FLAT[:35, :3], "b": FLAT[:35, 3]}
    with pytest.warns(UserWarning, match="all 4 elements are taken as independent"):
        posterior = bmr.Posterior.from_samples(few)
    np.testing.assert_allclose(posterior.covariance, np.diag(FLAT[:35].var(0, ddof=1)), atol=1e-12)

    slow = np.cumsum(np.random.default_rng(2).normal(size=(1000, 2)), 0)  # hardly any effective
    with pytest.warns(UserWarning, match="1000 draws, of which [0-9] effective"):
        bmr.Posterior.from_samples({"w": slow})

    random = np.random.default_rng(3)
    skewed = {"tau": random.exponential(size=2000), "w": random.standard_t(2, size=(2000, 2))}
    skewed["b"] = random.normal(size=2000)
    with pytest.warns(UserWarning, match=r"heavy-tailed, .* are tau, w\[0\], w\[1\]$"):
        bmr.Posterior.from_samples(skewed)
    coords = from_dict(
        {"posterior": {"w": random.exponential(size=(2, 900, 2))}},
        dims={"w": ["side"]},
        coords={"side": ["left", "right"]},
    )
    with pytest.warns(UserWarning, match=r"w\[left\], w\[right\]$"):
        bmr.Posterior.from_samples(coords)


def test_a_gaussian_is_hardly_ever_called_skewed():
    random = np.random.default_rng(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (100, 400, 1600):
            for _ in range(20):
                bmr.Posterior.from_samples({"w": random.normal(size=(count, 2))})


def test_draws_that_cannot_be_read():
    for samples, options, message in [
        ({"w": FLAT}, {"sites": ["v"]}, r"sites=\['v'\]. Expected some of \['w'\]"),
        ({"w": FLAT, "b": FLAT[:9]}, {}, "other numbers of chains and draws"),
        ({"w": FLAT[:3]}, {}, "got 3 draws"),
        ({"w": FLAT * np.inf}, {}, "the draws of 'w' with 4800 of 4800 elements NaN or infinite"),
        ({"w": 3.0}, {}, "shape .draws, ...."),
        ({}, {}, "got no draws"),
    ]:
        with pytest.raises(ValueError, match=message):
            bmr.Posterior.from_samples(samples, **options)
    with pytest.raises(TypeError, match="samples=a ndarray of shape .1200, 4.. Expected Inference"):
        bmr.Posterior.from_samples(FLAT)
