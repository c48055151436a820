"""The reduction of a Posterior in a file."""

import numpy as np
import pytest
import torch
import xarray as xr

import pyro_bmr as bmr


def make(correlated=True):
    random = np.random.default_rng(0)
    root = random.normal(size=(6, 6))
    prior = np.eye(6) + 0.2 * correlated
    covariance = np.linalg.inv(np.linalg.inv(prior) + root @ root.T)
    if not correlated:
        covariance = np.diag(np.diag(covariance))
    axes = {"to": ["V1", "V5"], "from": ["V1", "V5", "PPC"]}
    mean = xr.DataArray(
        random.normal(size=(2, 3)) * [[0.3, 1.0, 2.0]], dims=tuple(axes), coords=axes, name="A"
    )
    return bmr.Posterior(mean, covariance, prior_covariance=prior, free_energy=12.5)


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("rest", ["conditional", "marginal"])
def test_there_and_back(tmp_path, correlated, rest):
    spike = bmr.Spike(rest=rest)
    result = bmr.reduce(make(correlated), reduced_prior=spike)
    assert 0 < result.sparsity < 1
    result.save(tmp_path / "moments.bmr")
    loaded = bmr.load(tmp_path / "moments.bmr")
    assert str(loaded) == str(result)
    assert str(loaded.guide) == str(result.guide)
    assert loaded.guide.names == result.guide.names
    assert loaded.guide.free_energy == 12.5 + result.delta_f
    for name in ("mean", "covariance", "prior_mean", "prior_covariance", "kept"):
        torch.testing.assert_close(getattr(loaded.guide, name), getattr(result.guide, name))
    again = [bmr.reduce(one.guide, reduced_prior=spike) for one in (loaded, result)]
    assert again[0].delta_f == again[1].delta_f
    assert torch.equal(again[0].masks["A"], again[1].masks["A"])


def test_a_program_needs_its_model(tmp_path):
    result = bmr.reduce(make())
    result.save(tmp_path / "moments.bmr")
    with pytest.raises(ValueError, match="without a program"):
        result.model()
    for call in (result.audit, result.compact, result.to_module, result.to_arviz, result.report):
        with pytest.raises(ValueError, match="without a program"):
            call()


def test_a_file_of_a_program_needs_a_model(tmp_path):
    import pyro
    import pyro.distributions as dist
    from pyro.infer.autoguide import AutoNormal

    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    guide()
    bmr.reduce(guide).save(tmp_path / "one.bmr")
    with pytest.raises(TypeError, match="got model=None"):
        bmr.load(tmp_path / "one.bmr")
