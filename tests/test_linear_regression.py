"""Exact linear regression: every reduction against the difference of analytic log evidences."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import MultivariateNormal

import pyro_bmr as bmr

N, NOISE, PRIOR = 30, 0.5, 1.3


class Problem:
    """Known noise, Gaussian prior, and the exact posterior in a guide."""

    def __init__(self, columns=8, collinear=True):
        self.x = torch.randn(N, columns, dtype=torch.float64)
        if collinear:
            self.x[:, 1] = self.x[:, 0] + 1e-3 * torch.randn(N, dtype=torch.float64)
            self.x[:, 4] = self.x[:, 2] - self.x[:, 3]
        weights = torch.zeros(columns, dtype=torch.float64)
        weights[:3] = torch.tensor([0.5, 0.5, -0.5])
        self.y = self.x @ weights + NOISE * torch.randn(N, dtype=torch.float64)

    def model(self):
        zero = torch.zeros(self.x.shape[1], dtype=torch.float64)
        weights = pyro.sample("w", dist.Normal(zero, PRIOR).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(self.x @ weights, NOISE), obs=self.y)

    def log_evidence(self, keep):
        x = self.x[:, keep]
        covariance = NOISE**2 * torch.eye(N) + PRIOR**2 * x @ x.mT
        return MultivariateNormal(torch.zeros(N).double(), covariance).log_prob(self.y).item()

    def posterior(self):
        precision = self.x.mT @ self.x / NOISE**2 + torch.eye(self.x.shape[1]) / PRIOR**2
        covariance = precision.inverse()
        return covariance @ self.x.mT @ self.y / NOISE**2, torch.linalg.cholesky(covariance)

    def guide(self):
        guide = AutoMultivariateNormal(self.model)
        guide()
        loc, tril = self.posterior()
        guide.loc.data.copy_(loc)
        guide.scale = tril.diagonal()
        guide.scale_tril = tril / tril.diagonal()[:, None]
        return guide


def test_delta_f_of_all_subsets_is_exact():
    problem = Problem()
    guide = problem.guide()
    full = problem.log_evidence(torch.ones(8, dtype=torch.bool))
    worst = 0.0
    for kept in product([True, False], repeat=8):
        keep = torch.tensor(kept)
        result = bmr.reduce(guide, select=lambda scores, keep=keep: {"w": keep})
        worst = max(worst, abs(result.delta_f - (full - problem.log_evidence(keep))))
        assert torch.equal(result.masks["w"], keep)
    assert worst < 1e-6


def test_the_loss_after_a_reduction_is_the_negative_log_evidence_in_every_draw():
    """For an exact posterior ln p(y, w) − ln q(w) is the log evidence, whatever the draw."""
    problem = Problem()
    guide = problem.guide()
    for kept in ([1, 0, 1, 1, 0, 0, 0, 1], [1] * 8, [0] * 8):
        keep = torch.tensor(kept, dtype=torch.bool)
        result = bmr.reduce(guide, select=lambda scores, keep=keep: {"w": keep})
        for _ in range(3):
            loss = Trace_ELBO().loss(result.model, result.guide)
            assert loss == pytest.approx(-problem.log_evidence(keep), abs=1e-6)


def test_of_two_collinear_weights_one_stays():
    problem = Problem()
    scores = bmr.reduce(problem.guide()).scores["w"]
    assert (scores[:2] < 0).all(), "each of the twins looks worth dropping by itself"
    naive = bmr.reduce(problem.guide(), select=lambda s: {"w": s.delta_f["w"] > 0})
    result = bmr.reduce(problem.guide())
    assert naive.delta_f > 20
    assert result.masks["w"][:2].sum() == 1
    assert result.delta_f < 0


def test_a_diagonal_guide_keeps_both_of_a_collinear_pair():
    """Where the best mean-field guide sees two weights worth keeping, full covariance sees one."""
    problem = Problem()
    loc, tril = problem.posterior()
    guide = AutoNormal(problem.model)
    guide()
    precision = torch.cholesky_inverse(tril).diagonal()
    guide.locs.w, guide.scales.w = loc, precision.rsqrt()
    assert bmr.reduce(guide).masks["w"][:2].all()
    assert bmr.reduce(problem.guide()).masks["w"][:2].sum() == 1


def test_greedy_selection_is_step_by_step_the_best_by_analytic_evidence():
    problem = Problem(columns=10)
    guide = problem.guide()
    keep = torch.ones(10, dtype=torch.bool)
    while True:
        here = problem.log_evidence(keep)
        gains = {}
        for i in keep.nonzero()[:, 0].tolist():
            without = keep.clone()
            without[i] = False
            gains[i] = here - problem.log_evidence(without)
        best = min(gains, key=gains.get)
        if gains[best] > 0:
            break
        keep[best] = False
    result = bmr.reduce(guide)
    assert torch.equal(result.masks["w"], keep)
    n = int(keep.sum())
    assert torch.equal(bmr.reduce(guide, select=bmr.top_k(n)).masks["w"], keep)
    assert bmr.reduce(guide, select=bmr.top_k(n - 1)).masks["w"].sum() == n - 1


@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal])
def test_diagonal_guides_agree_with_a_dense_guide_of_diagonal_covariance(family):
    problem = Problem()
    loc, tril = problem.posterior()
    scale = tril.square().sum(-1).sqrt()
    dense = AutoMultivariateNormal(problem.model)
    dense()
    dense.loc.data.copy_(loc)
    dense.scale = scale
    diagonal = family(problem.model)
    diagonal()
    if family is AutoNormal:
        diagonal.locs.w, diagonal.scales.w = loc, scale
    else:
        diagonal.loc.data.copy_(loc)
        diagonal.scale = scale
    results = [bmr.reduce(dense), bmr.reduce(diagonal)]
    assert results[0].delta_f == pytest.approx(results[1].delta_f, abs=1e-9)
    torch.testing.assert_close(results[0].scores["w"], results[1].scores["w"])
    assert torch.equal(results[0].masks["w"], results[1].masks["w"])
