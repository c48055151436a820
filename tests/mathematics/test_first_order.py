"""Savage-Dickey plus the first-order shift, against ΔF of Gaussian linear models."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyro_bmr.mathematics.evidence import delta_f_spike
from pyro_bmr.mathematics.first_order import first_order_correlated, first_order_independent
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank

SIZE = 6


class Quadratic:
    """ln p(y | θ) = b θ - θ A θ / 2, and the prior N(m, s²)."""

    def __init__(self):
        root = torch.randn(SIZE, SIZE + 2, dtype=torch.float64)
        self.curvature, self.linear = root @ root.mT, 3 * torch.randn(SIZE, dtype=torch.float64)
        self.prior = Normal(0.3 * torch.randn(SIZE).double(), 0.5 + torch.rand(SIZE).double())

    def accuracy(self, loc, scale):
        """E_q[ln p(y | θ)] for independent q."""
        variance = (self.curvature.diagonal() * scale.square()).sum()
        return self.linear @ loc - 0.5 * (loc @ self.curvature @ loc + variance)

    def free_energy(self, loc, scale):
        return kl_divergence(Normal(loc, scale), self.prior).sum() - self.accuracy(loc, scale)

    def delta_f(self, loc, scale):
        """What F changes by when element i is at zero, in q and in p."""
        changes = []
        divergence = kl_divergence(Normal(loc, scale), self.prior)
        for i in range(SIZE):
            rest = torch.arange(SIZE) != i
            without = self.accuracy(loc * rest, scale * rest)
            changes.append(self.accuracy(loc, scale) - without - divergence[i])
        return torch.stack(changes)

    def spike(self, loc, scale):
        return delta_f_spike(Diagonal(loc, scale), self.prior.log_prob(torch.zeros(()).double()))

    def gradient(self, loc, scale):
        loc, scale = loc.clone().requires_grad_(), scale.clone().requires_grad_()
        return torch.autograd.grad(self.free_energy(loc, scale), (loc, scale))

    def optimum(self):
        """Of independent posteriors."""
        precision = self.prior.scale.pow(-2)
        linear = self.linear + precision * self.prior.loc
        loc = torch.linalg.solve(self.curvature + precision.diag(), linear)
        return loc, (self.curvature.diagonal() + precision).rsqrt()


def test_exact_for_a_quadratic_likelihood_within_two_standard_deviations():
    """Wherever q is; the signal-to-noise ratio of the elements goes from -2 to 2."""
    for _ in range(20):
        problem = Quadratic()
        scale = 0.2 + torch.rand(SIZE, dtype=torch.float64)
        loc = scale * torch.linspace(-2, 2, SIZE).double()
        shift = first_order_independent(Diagonal(loc, scale), *problem.gradient(loc, scale))
        predicted = problem.spike(loc, scale) + shift
        torch.testing.assert_close(predicted, problem.delta_f(loc, scale))


def test_farther_out_the_curvature_counts_as_at_two_standard_deviations():
    problem = Quadratic()
    scale = torch.full((SIZE,), 0.3, dtype=torch.float64)
    z = torch.tensor([-30.0, -3.0, 2.5, 4.0, 10.0, 100.0], dtype=torch.float64)
    d_loc, d_scale = problem.gradient(z * scale, scale)
    by_mean, by_scale = torch.zeros_like(d_loc), torch.zeros_like(d_scale)
    posterior = Diagonal(z * scale, scale)
    torch.testing.assert_close(
        first_order_independent(posterior, d_loc, by_scale), -z * scale * d_loc
    )
    torch.testing.assert_close(
        first_order_independent(posterior, by_mean, d_scale), 1.5 * scale * d_scale
    )


def test_nothing_at_the_optimum():
    problem = Quadratic()
    loc, scale = problem.optimum()
    shift = first_order_independent(Diagonal(loc, scale), *problem.gradient(loc, scale))
    torch.testing.assert_close(shift, torch.zeros_like(shift))
    torch.testing.assert_close(problem.spike(loc, scale), problem.delta_f(loc, scale))


def test_nothing_for_what_was_pruned_before():
    zero = torch.zeros(3)
    shift = first_order_independent(Diagonal(zero, zero), torch.ones(3), torch.ones(3))
    assert (shift == 0).all()


@pytest.fixture
def correlated():
    root = torch.randn(SIZE, SIZE, dtype=torch.float64).tril() + torch.eye(SIZE)
    return Dense(torch.randn(SIZE, dtype=torch.float64), root)


def test_correlated_at_zero_gradient(correlated):
    assert (first_order_correlated(correlated, torch.zeros(SIZE).double()) == 0).all()


def test_correlated_of_a_diagonal_covariance_is_the_independent_one_of_the_means():
    loc, scale, d_loc = torch.randn(3, SIZE, dtype=torch.float64)
    dense = Dense(loc, scale.abs().diag())
    independent = first_order_independent(
        Diagonal(loc, scale.abs()), d_loc, torch.zeros(SIZE).double()
    )
    torch.testing.assert_close(first_order_correlated(dense, d_loc), independent)


def test_correlated_is_the_slope_along_what_conditioning_does_to_the_means(correlated):
    d_loc = torch.randn(SIZE, dtype=torch.float64)
    covariance = correlated.root() @ correlated.root().mT
    for i, shift in enumerate(first_order_correlated(correlated, d_loc)):
        conditioned = correlated.loc - covariance[:, i] * correlated.loc[i] / covariance[i, i]
        torch.testing.assert_close(shift, d_loc @ (conditioned - correlated.loc))


def test_correlated_of_low_rank_is_that_of_the_same_covariance():
    loc, d_loc = torch.randn(2, SIZE, dtype=torch.float64)
    factor = torch.randn(SIZE, 2, dtype=torch.float64)
    diagonal = 0.5 + torch.rand(SIZE, dtype=torch.float64)
    low_rank = LowRank(loc, factor, diagonal)
    covariance = low_rank.root() @ low_rank.root().mT
    torch.testing.assert_close(covariance, factor @ factor.mT + diagonal.diag())
    dense = Dense(loc, torch.linalg.cholesky(covariance))
    torch.testing.assert_close(
        first_order_correlated(low_rank, d_loc), first_order_correlated(dense, d_loc)
    )
