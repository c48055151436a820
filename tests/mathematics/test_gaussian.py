"""Gaussians against torch.distributions and quadrature."""

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import MultivariateNormal

from pyro_bmr.mathematics.gaussian import Dense, Diagonal


@pytest.fixture
def joint():
    tril = torch.randn(6, 6, dtype=torch.float64).tril()
    tril.diagonal().abs_().add_(0.5)
    return Dense(torch.randn(6, dtype=torch.float64), tril)


def test_a_joint_is_the_marginal_times_the_conditional(joint):
    drop = torch.tensor([False, True, False, True, True, False])
    gone, rest = joint.split(drop)
    for _ in range(5):
        value = torch.zeros(6, dtype=torch.float64)
        value[~drop] = torch.randn(3, dtype=torch.float64)
        expected = MultivariateNormal(joint.loc, scale_tril=joint.scale_tril).log_prob(value)
        at_zero = MultivariateNormal(gone.loc, scale_tril=gone.scale_tril).log_prob(value[drop])
        given_zero = MultivariateNormal(rest.loc, scale_tril=rest.scale_tril).log_prob(value[~drop])
        torch.testing.assert_close(at_zero + given_zero, expected)


@pytest.mark.parametrize("everything", [True, False])
def test_splitting_off_all_or_nothing(joint, everything):
    gone, rest = joint.split(torch.full((6,), everything))
    whole, empty = (gone, rest) if everything else (rest, gone)
    assert empty.loc.shape == (0,)
    assert empty.scale_tril.shape == (0, 0)
    torch.testing.assert_close(whole.loc, joint.loc)
    torch.testing.assert_close(whole.covariance, joint.covariance)


def test_marginals_are_the_diagonal_of_the_covariance(joint):
    torch.testing.assert_close(joint.marginals().scale.square(), joint.covariance.diagonal())


@pytest.mark.parametrize(("linear", "precision"), [(0.0, 1.0), (1.5, 0.3), (-4.0, 9.0)])
def test_log_partition_is_the_integral(linear, precision):
    scale = precision**-0.5
    natural = Diagonal(
        torch.tensor(linear / precision), torch.tensor(scale, dtype=torch.float64)
    ).natural()
    center = linear / precision
    integral, _ = quad(
        lambda t: torch.exp(
            natural.linear * t - 0.5 * natural.precision * t**2 - natural.log_partition()
        ).item(),
        center - 12 * scale,
        center + 12 * scale,
    )
    assert integral == pytest.approx(1.0, abs=1e-6)


def test_dense_and_diagonal_natural_parameters_agree():
    diagonal = Diagonal(torch.randn(4).double(), torch.rand(4).double() + 0.1)
    dense = Dense(diagonal.loc, diagonal.scale.diag())
    torch.testing.assert_close(
        dense.natural().log_partition(), diagonal.natural().log_partition().sum()
    )


def test_an_improper_density_has_no_log_partition():
    wide = Diagonal(torch.zeros(2), torch.tensor([1.0, 3.0])).natural()
    narrow = Diagonal(torch.zeros(2), torch.tensor([2.0, 1.0])).natural()
    assert (wide - narrow).log_partition().isnan().tolist() == [False, True]
    assert Dense(torch.zeros(1), torch.eye(1)).natural().log_partition().isfinite()
    dense = Dense(torch.zeros(2), 2 * torch.eye(2)).natural()
    assert (dense - Dense(torch.zeros(2), torch.eye(2)).natural()).log_partition().isnan()
