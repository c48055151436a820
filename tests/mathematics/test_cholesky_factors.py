"""What `Dense` is given: a Cholesky factor, and not a covariance."""

import pytest
import torch

import pyro_bmr as bmr

COVARIANCE = torch.tensor([[0.04, 0.02], [0.02, 0.09]], dtype=torch.float64)
TRIL = torch.linalg.cholesky(COVARIANCE)
LOC = torch.tensor([0.1, 0.2], dtype=torch.float64)
ONE = bmr.Dense(torch.zeros(2).double(), torch.eye(2).double())
HALF = bmr.Dense(torch.zeros(2).double(), 0.5 * torch.eye(2).double())


@pytest.mark.parametrize("function", [bmr.delta_f, bmr.reduced_posterior])
@pytest.mark.parametrize(
    "wrong",
    [COVARIANCE, TRIL.mT, -TRIL, TRIL[:1], torch.ones(3, 3).tril().double(), LOC],
)
def test_what_is_no_factor_is_refused(function, wrong):
    with pytest.raises(ValueError, match=r"Expected one that is lower triangular .*cholesky"):
        function(bmr.Dense(LOC, wrong), ONE, HALF)
    with pytest.raises(ValueError, match="lower triangular"):
        function(bmr.Dense(LOC, TRIL), ONE, bmr.Dense(LOC, wrong))


@pytest.mark.parametrize("function", [bmr.delta_f, bmr.reduced_posterior])
def test_a_scale_of_zero_is_refused(function):
    with pytest.raises(ValueError, match="scale of zero"):
        function(bmr.Dense(LOC, TRIL * torch.tensor([1.0, 0.0])), ONE, HALF)


def test_a_factor_gives_what_natural_parameters_say():
    found = float(bmr.delta_f(bmr.Dense(LOC, TRIL), ONE, HALF))
    q, half = torch.linalg.inv(COVARIANCE), 4 * torch.eye(2).double()
    after = q + half - torch.eye(2)

    def log_partition(linear, precision):
        quadratic = linear @ torch.linalg.solve(precision, linear)
        return 0.5 * (quadratic - torch.logdet(precision))

    zero = torch.zeros(2).double()
    terms = [log_partition(q @ LOC, q), log_partition(zero, half)]
    terms += [-log_partition(zero, torch.eye(2).double()), -log_partition(q @ LOC, after)]
    assert found == pytest.approx(float(sum(terms)), abs=1e-12)


def test_a_posterior_is_told_where_to_go():
    q = bmr.Posterior([0.1], scale=0.2, prior_scale=1.0, names=["A(2,1)"])
    with pytest.raises(TypeError, match="compare_models"):
        bmr.delta_f(q, q, q)
