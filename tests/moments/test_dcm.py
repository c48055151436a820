"""Four published posteriors of dynamic causal models: every number against natural parameters."""

import numpy as np
import pytest
import torch
from dcm import DATA, FILES, Dcm

import pyro_bmr as bmr
from pyro_bmr.extend import Scores

pytestmark = pytest.mark.skipif(not (DATA / "dcm").exists(), reason="needs the DCM files")
SPIKES = {rest: bmr.Spike(rest=rest) for rest in ("conditional", "marginal")}


def read(name):
    dcm = Dcm(name)
    names = [f"p{i}" for i in range(len(dcm.mean))]
    posterior = bmr.Posterior(
        dcm.mean,
        dcm.covariance,
        prior_mean=dcm.prior_mean,
        prior_covariance=dcm.prior_covariance,
        names=names,
        free_energy=-dcm.free_energy,
    )
    return dcm, posterior, np.array(names)[dcm.free]


def sets_of(size):
    random = np.random.default_rng(0)
    some = [random.random(size) < random.uniform(0.1, 0.9) for _ in range(200)]
    return [*np.eye(size, dtype=bool), *some]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rest", SPIKES)
def test_delta_f_of_single_parameters_and_of_random_sets(name, rest):
    dcm, posterior, names = read(name)
    sets = sets_of(len(names))
    problem = dcm.problem()
    expected = np.array([getattr(problem, rest)(drop) for drop in sets])
    found = []

    def select(scores: Scores):
        for drop in sets:
            masks = {n: torch.tensor(not gone) for n, gone in zip(names, drop, strict=True)}
            found.append(scores.joint_delta_f(masks))
        return {}

    result = bmr.reduce(posterior, select=select, reduced_prior=SPIKES[rest])
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    alone = np.array([float(result.scores[n]) for n in names])
    np.testing.assert_allclose(alone, expected[: len(names)], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rest", SPIKES)
def test_what_is_found_is_exact_and_no_worse_than_by_the_rule_of_spm(name, rest):
    dcm, posterior, names = read(name)
    result = bmr.reduce(posterior, reduced_prior=SPIKES[rest])
    drop = np.array([not bool(result.masks[n]) for n in names])
    expected = getattr(dcm.problem(), rest)(drop)
    assert result.delta_f == pytest.approx(expected, rel=1e-8, abs=1e-8)
    spm = bmr.reduce(posterior, reduced_prior=SPIKES[rest], select=bmr.by_blocks())
    assert result.delta_f <= spm.delta_f + 1e-9
    fixed = {row.name for row in result.sites if "fixed" in row.note}
    assert len(fixed) == (~dcm.free).sum()
    left = bmr.reduce(result.guide, reduced_prior=SPIKES[rest])
    assert left.delta_f <= 1e-9
    assert result.guide.free_energy == pytest.approx(-dcm.free_energy + result.delta_f)
