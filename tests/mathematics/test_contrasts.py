"""Correlated priors: every subset against log evidences in numpy, in both meanings of dropping."""

import numpy as np
import pytest
import torch

from pyro_bmr.averaging.subset_sampling import walk
from pyro_bmr.mathematics.contrast import contrast_conditional, contrast_marginal
from pyro_bmr.mathematics.couplings import start_walk
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import delta_f_spike_chain, delta_f_spikes
from pyro_bmr.mathematics.gaussian import LOG_2PI
from pyro_bmr.mathematics.greedy import search_greedily
from pyro_bmr.mathematics.group_evidence import Coupling
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.mathematics.singular_contrast import contrast_singular
from pyro_bmr.mathematics.subset_search import search_all
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets, subset_members

SIZE = 6
STANDARD = torch.full((SIZE,), -0.5 * LOG_2PI, dtype=torch.float64)


class Regression:
    """``y ~ N(X θ, 1)`` under ``θ ~ N(m, U Uᵀ)``, with its exact posterior."""

    def __init__(self, seed, rank=SIZE, rows=12):
        random = np.random.default_rng(seed)
        self.x = random.normal(size=(rows, SIZE)) * 0.7
        self.x[:, 1] = self.x[:, 0] + 0.3 * self.x[:, 1]
        self.y = self.x @ random.normal(size=SIZE) + random.normal(size=rows)
        self.root = random.normal(size=(SIZE, rank)) + (rank == SIZE) * 0.5 * np.eye(SIZE, rank)
        self.loc = 0.3 * self.root @ random.normal(size=rank)
        self.covariance = self.root @ self.root.T
        mixed = self.x @ self.covariance
        gain = np.linalg.solve(mixed @ self.x.T + np.eye(rows), mixed).T
        self.posterior_loc = self.loc + gain @ (self.y - self.x @ self.loc)
        self.posterior_covariance = self.covariance - gain @ mixed

    def log_evidence(self, loc, covariance):
        """Of the data under ``θ ~ N(loc, covariance)``, in observation space."""
        spread = self.x @ covariance @ self.x.T + np.eye(len(self.y))
        error = self.y - self.x @ loc
        return -0.5 * (np.linalg.slogdet(spread)[1] + error @ np.linalg.solve(spread, error))

    def conditional(self, drop):
        """Log evidence with the prior given that what is dropped is zero."""
        across = self.covariance[:, drop] @ np.linalg.pinv(self.covariance[np.ix_(drop, drop)])
        return self.log_evidence(
            self.loc - across @ self.loc[drop], self.covariance - across @ self.covariance[drop]
        )

    def marginal(self, drop):
        """Log evidence with the marginal prior of what is kept."""
        kept = ~drop
        return self.log_evidence(self.loc * kept, self.covariance * np.outer(kept, kept))

    def gaussians(self):
        pairs = (self.posterior_loc, self.posterior_covariance), (self.loc, self.covariance)
        return (Moments(torch.tensor(loc), torch.tensor((c + c.T) / 2)) for loc, c in pairs)


def everything():
    return torch.ones(SIZE, dtype=torch.bool)


MEANINGS = {
    "conditional": contrast_conditional,
    "marginal": lambda q, p: contrast_marginal(q, p, everything()),
}


def exact(problem, meaning):
    """ΔF of all subsets, in the order of ``delta_f_of_all_subsets``."""
    full = problem.log_evidence(problem.loc, problem.covariance)
    sets = (np.arange(2**SIZE)[:, None] >> np.arange(SIZE) & 1).astype(bool)
    return torch.tensor([full - getattr(problem, meaning)(drop) for drop in sets])


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("seed", range(3))
def test_every_subset_has_the_exact_evidence(meaning, seed):
    problem = Regression(seed)
    contrast, expected = MEANINGS[meaning](*problem.gaussians()), exact(problem, meaning)
    check_subsets(contrast, expected)


def check_subsets(contrast, expected, tolerance=1e-9):
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(delta_f_of_all_subsets(contrast, STANDARD), expected, **close)
    sets = subset_members(torch.arange(2**SIZE), SIZE)
    chains = [delta_f_spike_chain(contrast.split(drop)[0], STANDARD[drop]).sum() for drop in sets]
    torch.testing.assert_close(torch.stack(chains), expected, **close)
    torch.testing.assert_close(
        delta_f_spikes(contrast, STANDARD), expected[1 << torch.arange(SIZE)], **close
    )


@pytest.mark.parametrize("meaning", MEANINGS)
def test_what_is_left_is_a_contrast_of_its_own(meaning):
    problem = Regression(7)
    contrast, expected = MEANINGS[meaning](*problem.gaussians()), exact(problem, meaning)
    first = torch.tensor([True, False, False, True, False, False])
    left = contrast.split(first)[1]
    found = delta_f_of_all_subsets(left, STANDARD[~first])
    members = subset_members(torch.arange(2**4), 4)
    index = torch.zeros(2**4, dtype=torch.long)
    for place, element in enumerate((~first).nonzero()[:, 0].tolist()):
        index += members[:, place].long() << element
    torch.testing.assert_close(found, expected[index + 9] - expected[9], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("meaning", MEANINGS)
def test_what_is_left_has_the_exact_posterior(meaning):
    problem = Regression(3)
    contrast = MEANINGS[meaning](*problem.gaussians())
    drop = np.array([False, True, False, False, True, False])
    left = contrast.split(torch.tensor(drop))[1]
    kept = np.flatnonzero(~drop)
    prior, loc = problem.covariance[np.ix_(kept, kept)], problem.loc[kept]
    if meaning == "conditional":
        across = problem.covariance[np.ix_(kept, drop)] @ np.linalg.inv(
            problem.covariance[np.ix_(drop, drop)]
        )
        prior = prior - across @ problem.covariance[np.ix_(drop, kept)]
        loc = loc - across @ problem.loc[drop]
    precision = np.linalg.inv(prior) + problem.x[:, kept].T @ problem.x[:, kept]
    covariance = np.linalg.inv(precision)
    mean = covariance @ (np.linalg.solve(prior, loc) + problem.x[:, kept].T @ problem.y)
    torch.testing.assert_close(left.covariance, torch.tensor(covariance), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.loc, torch.tensor(mean), rtol=1e-9, atol=1e-9)


def singular(problem):
    return contrast_singular(*problem.gaussians())


@pytest.mark.parametrize("rank", [3, 5, SIZE])
def test_a_singular_prior(rank):
    problem = Regression(5, rank)
    problem.loc = 0 * problem.loc  # so that every set can be zero
    problem.posterior_loc = (
        problem.covariance
        @ problem.x.T
        @ np.linalg.solve(
            problem.x @ problem.covariance @ problem.x.T + np.eye(len(problem.y)), problem.y
        )
    )
    expected = exact(problem, "conditional")
    check_subsets(singular(problem), expected, 1e-7)
    drop = torch.tensor([True, False, True, False, False, True])
    left = singular(problem).split(drop)[1]
    if rank == 3:
        assert left.covariance.abs().max() < 1e-9
        assert left.loc.abs().max() < 1e-6


def test_what_cannot_be_zero_under_a_singular_prior():
    one = torch.ones(2, dtype=torch.float64)
    covariance = torch.outer(one, one)
    apart = torch.tensor([1.0, 2.0]).double()
    contrast = contrast_singular(Moments(apart, covariance / 4), Moments(apart, covariance))
    log_prior = torch.full((2,), -0.5 * LOG_2PI, dtype=torch.float64)
    found = delta_f_of_all_subsets(contrast, log_prior)
    assert found[:3].isfinite().all()
    assert found[3] == torch.inf


@pytest.mark.parametrize("kind", [*MEANINGS, "singular"])
def test_walks_tell_every_change(kind):
    problem = Regression(11)
    contrast = singular(problem) if kind == "singular" else MEANINGS[kind](*problem.gaussians())
    exact_delta_f = exact(problem, "conditional" if kind == "singular" else kind)

    def at(dropped):
        return exact_delta_f[(dropped.long() << torch.arange(SIZE)).sum()]

    one = start_walk(contrast, torch.zeros(SIZE, dtype=torch.bool))
    for index in (2, 4, 0, 2, 5, 1):
        here = at(one.dropped)
        pairs, flips = one.pair_flips(), one.flips()
        assert pairs.diagonal().isposinf().all()
        for i in range(SIZE):
            for j in range(SIZE):
                other = one.dropped.clone()
                other[[i, j]] ^= True
                found = flips[i] if i == j else pairs[i, j]
                torch.testing.assert_close(found, at(other) - here, rtol=1e-7, atol=1e-7)
        some = (~one.dropped).nonzero()[:, 0]
        other = one.dropped | True
        torch.testing.assert_close(
            one.changes([some], True)[0], at(other) - here, rtol=1e-7, atol=1e-7
        )
        one.flip(index)
    one.step(one.dropped.nonzero()[:, 0], False)
    torch.testing.assert_close(
        one.flips(), exact_delta_f[1 << torch.arange(SIZE)], rtol=1e-7, atol=1e-7
    )
    coupling = Coupling(torch.arange(SIZE), contrast)
    assert coupling.delta_f(one.dropped ^ True) == pytest.approx(exact_delta_f[-1].item())


@pytest.mark.parametrize("kind", [*MEANINGS, "singular"])
@pytest.mark.parametrize("seed", range(4))
def test_searches_find_the_best(kind, seed):
    problem = Regression(seed)
    contrast = singular(problem) if kind == "singular" else MEANINGS[kind](*problem.gaussians())
    every = delta_f_of_all_subsets(contrast, STANDARD)
    for search in (search_all, search_greedily):
        drop = search(contrast, STANDARD)
        assert every[(drop.long() << torch.arange(SIZE)).sum()] == pytest.approx(every.min().item())
    path = eliminate(contrast, STANDARD, torch.inf)
    assert path.isfinite().all()


@pytest.mark.rare
@pytest.mark.parametrize("meaning", MEANINGS)
def test_random_walks_visit_as_the_evidence_says(meaning):
    contrast = MEANINGS[meaning](*Regression(2).gaussians())
    every = delta_f_of_all_subsets(contrast, STANDARD)
    sets = subset_members(torch.arange(2**SIZE), SIZE)
    expected = (-every).softmax(0) @ (~sets).double()
    total, present = 0.0, torch.zeros(SIZE, dtype=torch.float64)
    for visit in walk(contrast, STANDARD, 0 * STANDARD, 2000, 0):
        total += visit.weight.sum()
        present += visit.weight @ visit.presence
    torch.testing.assert_close(present / total, expected, rtol=0, atol=0.02)
