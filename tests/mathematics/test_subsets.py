"""Evidence of all subsets, against a chain a subset and against exact linear regression."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_bmr.mathematics.evidence import delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets, subset_members

N, NOISE, PRIOR = 40, 0.6, 1.2


def random_dense(count):
    root = torch.randn(count, count + 2, dtype=torch.float64)
    return Dense(torch.randn(count).double(), torch.linalg.cholesky(root @ root.mT))


def random_low_rank(count):
    return LowRank(
        torch.randn(count).double(),
        torch.randn(count, 2).double(),
        torch.rand(count).double() + 0.1,
    )


@pytest.mark.parametrize("make", [random_dense, random_low_rank])
def test_every_subset_has_the_delta_f_of_its_chain(make):
    posterior, log_prior = make(7), -torch.rand(7).double()
    found = delta_f_of_all_subsets(posterior, log_prior)
    assert found.shape == (2**7,)
    for index, drop in enumerate(subset_members(torch.arange(2**7), 7)):
        chain = delta_f_spike_chain(posterior.split(drop)[0], log_prior[drop])
        assert found[index].item() == pytest.approx(chain.sum().item(), abs=1e-10)


def test_all_4096_linear_regressions_with_correlated_columns():
    """ΔF of a subset is the log evidence of the full model minus that of the model without it."""
    x = torch.randn(N, 12, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 1e-3 * torch.randn(N).double()
    x[:, 4] = x[:, 2] - x[:, 3]
    x[:, 5:] += x[:, :1]
    y = x[:, 0] - 0.5 * x[:, 2] + NOISE * torch.randn(N).double()
    precision = x.mT @ x / NOISE**2 + torch.eye(12).double() / PRIOR**2
    covariance = precision.inverse()
    posterior = Dense(covariance @ x.mT @ y / NOISE**2, torch.linalg.cholesky(covariance))
    log_prior = Normal(0.0, PRIOR).log_prob(torch.zeros(12).double())

    columns = x * ~subset_members(torch.arange(2**12), 12)[:, None]
    of_data = NOISE**2 * torch.eye(N).double() + PRIOR**2 * columns @ columns.mT
    log_evidence = MultivariateNormal(torch.zeros(N).double(), of_data).log_prob(y)

    found = delta_f_of_all_subsets(posterior, log_prior)
    torch.testing.assert_close(found, log_evidence[0] - log_evidence, rtol=0, atol=1e-6)


def test_elements_that_cannot_go_cost_infinitely_much_and_nothing_is_nan():
    log_prior = torch.tensor([-1.0, torch.inf, -1.0]).double()
    found = delta_f_of_all_subsets(random_dense(3), log_prior)
    members = subset_members(torch.arange(8), 3)
    assert torch.equal(found.isposinf(), members[:, 1])
    assert not found.isnan().any()


def test_no_elements_have_one_subset():
    empty = Dense(torch.zeros(0), torch.zeros(0, 0))
    assert delta_f_of_all_subsets(empty, torch.zeros(0)).tolist() == [0.0]


def test_too_many_elements_are_an_error_that_says_what_to_do():
    posterior = Dense(torch.zeros(17), torch.eye(17))
    with pytest.raises(ValueError, match=r"2\^17 subsets.*by_evidence"):
        delta_f_of_all_subsets(posterior, torch.zeros(17))
