"""Arrays of pandas and xarray are read by their labels, whatever order they come in."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from accelerator import DEVICE, pretended_accelerator

import pyro_bmr as bmr

NAMES = ["a", "b", "c", "d"]
SHUFFLED = ["c", "a", "d", "b"]


def problem(seed=0, size=4):
    random = np.random.default_rng(seed)
    mean = random.normal(size=size)
    covariances = []
    for _ in range(2):
        root = random.normal(size=(size, size))
        covariances.append(root @ root.T + np.eye(size))
    return mean, *covariances


MEAN, COVARIANCE, PRIOR = problem()


def frame(matrix, names=NAMES):
    return pd.DataFrame(matrix, names, names)


def same(posterior, *, prior=PRIOR, prior_mean=0.0):
    np.testing.assert_array_equal(posterior.mean, MEAN)
    np.testing.assert_allclose(posterior.covariance, COVARIANCE, rtol=1e-12)
    np.testing.assert_allclose(posterior.prior_covariance, prior, rtol=1e-12)
    np.testing.assert_array_equal(posterior.prior_mean, np.broadcast_to(prior_mean, 4))


def test_frames_and_series_in_another_order():
    mean = pd.Series(MEAN, NAMES)
    covariance = frame(COVARIANCE).loc[SHUFFLED, SHUFFLED[::-1]]
    prior = frame(PRIOR).loc[SHUFFLED[::-1], SHUFFLED]
    means = pd.Series([1.0, 2.0, 3.0, 4.0], NAMES)
    for prior_mean in (means[SHUFFLED], means[SHUFFLED].to_frame(), dict(means[SHUFFLED])):
        posterior = bmr.Posterior(mean, covariance, prior_covariance=prior, prior_mean=prior_mean)
        assert posterior.names == tuple(NAMES)
        same(posterior, prior_mean=[1, 2, 3, 4])
    precision = frame(np.linalg.inv(COVARIANCE)).loc[SHUFFLED, SHUFFLED]
    scale = pd.Series(np.sqrt(PRIOR.diagonal()), NAMES)[SHUFFLED]
    posterior = bmr.Posterior(MEAN, precision=precision, prior_scale=scale, names=NAMES)
    same(posterior, prior=np.diag(PRIOR.diagonal()))
    posterior = bmr.Posterior(mean[SHUFFLED], covariance, prior_covariance=prior, names=NAMES)
    same(posterior)


def test_what_has_no_labels_is_read_in_order():
    plain = pd.DataFrame(COVARIANCE), pd.DataFrame(PRIOR)
    posterior = bmr.Posterior(pd.Series(MEAN), plain[0], prior_covariance=plain[1], names=NAMES)
    same(posterior)
    assert posterior.names == tuple(NAMES)
    same(bmr.Posterior(pd.Series(MEAN, NAMES), plain[0], prior_covariance=PRIOR))
    column = MEAN[:, None] * 0 + 2.0  # a column, as MATLAB writes vectors
    same(bmr.Posterior(MEAN, COVARIANCE, prior_covariance=PRIOR, prior_mean=column), prior_mean=2)


def test_coordinates_of_one_site():
    coords = {"region": NAMES}
    mean = xr.DataArray(MEAN, coords, name="w")
    square = xr.DataArray(COVARIANCE, {"region": NAMES, "region_": NAMES}, ["region", "region_"])
    prior = xr.DataArray(PRIOR, {"region": NAMES}, ["region", "other"])
    posterior = bmr.Posterior(
        mean,
        square.sel(region=SHUFFLED, region_=SHUFFLED[::-1]),
        prior_covariance=frame(PRIOR).loc[SHUFFLED, SHUFFLED],
        prior_mean=xr.DataArray([1.0, 2.0, 3.0, 4.0], coords).sel(region=SHUFFLED),
    )
    assert posterior.names == ("w[a]", "w[b]", "w[c]", "w[d]")
    same(posterior, prior_mean=[1, 2, 3, 4])
    # Its columns have no labels, and are in the order of its rows.
    shuffled = xr.DataArray(
        frame(PRIOR).loc[SHUFFLED, SHUFFLED].to_numpy(), {"region": SHUFFLED}, prior.dims
    )
    same(bmr.Posterior(mean, COVARIANCE, prior_covariance=shuffled))
    by_element = pd.DataFrame(PRIOR, posterior.names, posterior.names)
    by_element = by_element.iloc[[2, 0, 1, 3], [3, 1, 0, 2]]
    same(bmr.Posterior(mean, COVARIANCE, prior_covariance=by_element))


def test_coordinates_of_a_matrix():
    mean, covariance, prior = problem(1, 6)
    coords = {"side": ["left", "right"], "region": ["V1", "V2", "V3"]}
    w = xr.DataArray(mean.reshape(2, 3), coords, name="w")
    axes = coords | {"side_": coords["side"], "region_": coords["region"]}
    four = xr.DataArray(covariance.reshape(2, 3, 2, 3), axes, list(axes))
    order = {"side": ["right", "left"], "region_": ["V2", "V3", "V1"]}
    scale = xr.DataArray(np.sqrt(prior.diagonal()).reshape(2, 3), coords)
    posterior = bmr.Posterior(
        xr.Dataset({"w": w}),
        four.sel(order),
        prior_scale={"w": scale.sel(region=["V3", "V1", "V2"]).transpose("region", "side")},
    )
    assert posterior.names[:4] == ("w[left,V1]", "w[left,V2]", "w[left,V3]", "w[right,V1]")
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-12)
    np.testing.assert_allclose(posterior.prior_covariance.diagonal(), prior.diagonal())


def test_labels_that_do_not_match():
    mean = pd.Series(MEAN, NAMES)
    other = frame(COVARIANCE, ["a", "b", "c", "e"])
    with pytest.raises(ValueError, match=r"rows, with labels.*unknown \['e'\], missing \['d'\]"):
        bmr.Posterior(mean, other)
    with pytest.raises(ValueError, match=r"prior_mean with labels.*unknown \['e'\]"):
        bmr.Posterior(mean, COVARIANCE, prior_mean=pd.Series(MEAN, ["a", "b", "c", "e"]))
    with pytest.raises(ValueError, match=r"repeated \['c'\]"):
        bmr.Posterior(mean, frame(COVARIANCE, ["a", "b", "c", "c"]))
    with pytest.raises(ValueError, match="the labels of the Series"):
        bmr.Posterior(mean, COVARIANCE, names=["x", "b", "c", "d"])
    w = xr.DataArray(MEAN, {"region": NAMES}, name="w")
    with pytest.raises(ValueError, match=r"along 'region'.*unknown \['z'\]"):
        prior = xr.DataArray(MEAN, {"region": ["z", "b", "c", "d"]})
        bmr.Posterior(w, COVARIANCE, prior_mean=prior)
    with pytest.raises(ValueError, match="the dimensions .'side'"):
        bmr.Posterior(w, COVARIANCE, prior_mean=xr.DataArray(MEAN, dims=["side"]))
    with pytest.raises(ValueError, match=r"missing \['theta.0.', "):
        bmr.Posterior(MEAN, frame(COVARIANCE))


def test_sparse_and_complex_tensors():
    sparse = torch.tensor(COVARIANCE).to_sparse()
    same(bmr.Posterior(MEAN, sparse, prior_covariance=torch.tensor(PRIOR).to_sparse()))
    with pytest.raises(ValueError, match="mean of .theta.=a ndarray .* Expected real numbers"):
        bmr.Posterior(MEAN + 1j, COVARIANCE)


def test_the_prior_is_where_the_mean_is():
    with pretended_accelerator():
        mean = torch.zeros(2, device="cpu").to(DEVICE)
        posterior = bmr.Posterior(mean, scale=1.0, prior_scale=1.0)
        tensors = posterior.mean, posterior.covariance, posterior.prior_covariance
        assert {tensor.device.type for tensor in (*tensors, posterior.prior_mean)} == {DEVICE}
        assert posterior.free.all()
