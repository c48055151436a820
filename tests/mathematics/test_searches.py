"""Searches of sets of correlated elements, against all subsets and against each other."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_bmr as bmr
from pyro_bmr.factors.factor import Prior
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import delta_f_spike, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import Dense, LowRank, triangular
from pyro_bmr.mathematics.greedy import MOST_IN_PAIRS, search_greedily
from pyro_bmr.mathematics.group_evidence import Coupling, GroupEvidence
from pyro_bmr.mathematics.group_subsets import search_best_groups
from pyro_bmr.mathematics.membership import Membership
from pyro_bmr.mathematics.subset_search import search_all, search_best, search_blocks
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets, subset_members
from pyro_bmr.mathematics.tableau import make_tableau, sweep_tableau
from pyro_bmr.programs.sites import Site
from pyro_bmr.selection.scores import score

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PYRO_BMR_DATA", ROOT.parent / "shared" / "data"))
UNIT_NORMAL_AT_ZERO = -0.5 * math.log(2 * math.pi)


def regression(seed, columns=12, rows=40, correlation=0.9, noise=0.5):
    """Give the exact posterior of equally correlated columns, half of which do something."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (1 - correlation) ** 0.5 * draw(rows, columns) + correlation**0.5 * draw(rows, 1)
    weights = torch.where(torch.rand(columns, generator=generator) < 0.5, draw(columns), 0.0)
    y = x @ weights + noise * draw(rows)
    precision = x.mT @ x / noise**2 + torch.eye(columns).double()
    covariance = precision.inverse()
    posterior = Dense(covariance @ x.mT @ y / noise**2, torch.linalg.cholesky(covariance))
    return posterior, torch.full((columns,), UNIT_NORMAL_AT_ZERO).double()


def joint(posterior, log_prior, dropped):
    return delta_f_spike_chain(posterior.split(dropped)[0], log_prior[dropped]).sum().item()


@pytest.mark.parametrize("rows", [15, 40])
def test_greedy_finds_the_best_of_all_subsets_in_95_of_100_problems(rows):
    gaps = []
    for seed in range(100):
        problem = regression(seed, rows=rows)
        best = delta_f_of_all_subsets(*problem).min().item()
        gaps.append(joint(*problem, search_greedily(*problem)) - best)
    missed = [round(gap, 3) for gap in gaps if gap > 1e-6]
    print(f"missed by {missed} nats")
    assert min(gaps) > -1e-6
    assert len(missed) <= 5
    assert max(missed, default=0.0) < 1.0


@pytest.mark.parametrize("seed", range(5))
def test_an_exhaustive_search_finds_the_best_of_all_subsets(seed):
    problem = regression(seed)
    best = delta_f_of_all_subsets(*problem).min().item()
    assert joint(*problem, search_all(*problem)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_blocks_stop_only_where_no_subset_of_the_most_redundant_gains(seed):
    posterior, log_prior = regression(seed)
    dropped = search_blocks(posterior, log_prior)
    _, rest = posterior.split(dropped)
    rest_log_prior = log_prior[~dropped]
    alone = delta_f_spike(rest.marginals(), rest_log_prior)
    few = torch.zeros_like(rest_log_prior, dtype=torch.bool)
    few[alone.topk(min(8, len(alone)), largest=False).indices] = True
    assert delta_f_of_all_subsets(rest.split(few)[0], rest_log_prior[few]).argmin() == 0
    assert joint(posterior, log_prior, dropped) < 0


def test_blocks_of_independent_elements_are_what_each_says_by_itself():
    loc = torch.tensor([0.0, 3.0] * 10).double()
    posterior = Dense(loc, 0.5 * torch.eye(20).double())
    log_prior = torch.full((20,), UNIT_NORMAL_AT_ZERO).double()
    assert torch.equal(search_blocks(posterior, log_prior), loc == 0)


def ranked_by_spm(mean, covariance, log_prior, left):
    """Own ΔF of what is left given that all else is zero, in numpy by natural parameters."""
    own = [spm_delta_f(mean, covariance, log_prior, ~left | one) for one in np.diag(left)[left]]
    order = np.argsort(own, kind="stable")
    return np.flatnonzero(left)[order]


def spm_delta_f(mean, covariance, log_prior, off):
    i = np.flatnonzero(off)
    block = covariance[np.ix_(i, i)]
    quadratic = mean[i] @ np.linalg.solve(block, mean[i])
    determinant = np.linalg.slogdet(2 * np.pi * block)[1]
    return log_prior[i].sum() + 0.5 * (determinant + quadratic)


def search_as_spm(mean, covariance, log_prior):
    """The rounds of spm_dcm_bmr_all, one statement after the other; its evidence is -ΔF."""
    off = np.zeros(len(mean), bool)
    rounds = []
    going_on = True
    while going_on and not off.all():
        count = (~off).sum()
        most = int(max(count / 4, 8))
        going_on = count > most
        candidates = ranked_by_spm(mean, covariance, log_prior, ~off)[:most]
        before = spm_delta_f(mean, covariance, log_prior, off)
        together = off.copy()
        together[candidates] = True
        gain = before - spm_delta_f(mean, covariance, log_prior, together)
        if gain > most and count > most:
            off = together
            rounds.append("together")
            continue
        few = candidates[:8]
        patterns = np.arange(2 ** len(few))[:, None] >> np.arange(len(few)) & 1 == 1
        values = []
        for pattern in patterns:
            trial = off.copy()
            trial[few[pattern]] = True
            values.append(spm_delta_f(mean, covariance, log_prior, trial))
        best = patterns[int(np.argmin(values))]
        off[few[best]] = True
        rounds.append("patterns")
        going_on = going_on and best.any()
    return off, rounds


@pytest.mark.parametrize(("columns", "rows"), [(7, 20), (20, 30), (45, 60), (60, 200)])
def test_blocks_go_as_in_spm(columns, rows):
    seen = set()
    for seed in range(3):
        posterior, log_prior = regression(seed, columns=columns, rows=rows, correlation=0.3)
        mean, covariance = posterior.loc.numpy(), posterior.covariance.numpy()
        expected, rounds = search_as_spm(mean, covariance, log_prior.numpy())
        assert search_blocks(posterior, log_prior).numpy().tolist() == expected.tolist()
        seen |= set(rounds)
    assert seen == ({"patterns"} if columns < 8 else {"patterns", "together"})


def test_few_elements_are_searched_exhaustively_and_more_of_them_greedily():
    posterior, log_prior = regression(3, columns=16)
    best = delta_f_of_all_subsets(posterior, log_prior).min().item()
    assert joint(posterior, log_prior, search_best(posterior, log_prior)) == pytest.approx(best)
    posterior, log_prior = regression(3, columns=17)
    greedy = search_greedily(posterior, log_prior)
    assert torch.equal(search_best(posterior, log_prior), greedy)


@pytest.mark.skipif(
    not (DATA / "evidence").is_dir(), reason="no such data; set PYRO_BMR_DATA to their directory"
)
@pytest.mark.parametrize("name", ["miss11", "miss23"])
def test_the_default_finds_the_best_set_where_a_greedy_search_misses_it(name):
    arrays = np.load(DATA / "evidence" / f"{name}.npz")
    mean, covariance = arrays["qE"], (arrays["qC"] + arrays["qC"].T) / 2
    variance = np.diag(arrays["pC"])
    log_prior = -0.5 * np.log(2 * np.pi * variance)
    subsets = np.arange(2**12)[:, None] >> np.arange(12) & 1 == 1
    best = min(spm_delta_f(mean, covariance, log_prior, off) for off in subsets)
    posterior = Dense(torch.tensor(mean), torch.linalg.cholesky(torch.tensor(covariance)))
    greedy = search_greedily(posterior, torch.tensor(log_prior))
    assert joint(posterior, torch.tensor(log_prior), greedy) > best + 0.5
    factor = JointFactor((Site("w", torch.Size([12])),), posterior)
    scores = score((factor.with_priors({"w": Prior(torch.tensor(log_prior))}),))
    found = scores.joint_delta_f(bmr.by_evidence()(scores))
    assert found == pytest.approx(best, abs=1e-9)
    # The margin is for each element that goes.
    margin = min(spm_delta_f(mean, covariance, log_prior, off) + 0.7 * off.sum() for off in subsets)
    masks = bmr.by_evidence(margin=0.7)(scores)
    dropped = int((~masks["w"]).sum())
    assert scores.joint_delta_f(masks) + 0.7 * dropped == pytest.approx(margin, abs=1e-9)


def test_few_groups_are_searched_exhaustively():
    posterior, log_prior = regression(11, columns=16, rows=18)
    mean, covariance = posterior.loc.numpy(), posterior.covariance.numpy()
    patterns = np.arange(2**8)[:, None] >> np.arange(8) & 1 == 1
    best = min(
        spm_delta_f(mean, covariance, log_prior.numpy(), np.repeat(off, 2)) for off in patterns
    )
    pairs = Membership(torch.arange(8).repeat_interleave(2), torch.arange(16), 8, 16)
    coupling = Coupling(torch.arange(16), posterior)
    cost = log_prior + 0.5 * math.log(2 * math.pi)
    evidence = GroupEvidence(pairs, cost, (coupling,), torch.ones(8, dtype=torch.bool))
    assert evidence.delta_f(search_best_groups(evidence)) == pytest.approx(best, abs=1e-9)


def test_the_guide_quotes_the_benchmark():
    table = pd.read_csv(ROOT / "benchmarks" / "searches.csv")
    page = " ".join((ROOT / "docs" / "guide" / "correlated.md").read_text().split())
    greedy, blocks = (table[f"{name} optima"].dropna().astype(int) for name in ("greedy", "blocks"))
    assert f"the best in {greedy.min()} to {greedy.max()} of each hundred" in page
    assert f"SPM's rule in {blocks.min()} to {blocks.max()}" in page
    wider = table.dropna(subset="greedy better")
    better, worse = int(wider["greedy better"].sum()), int(wider["blocks better"].sum())
    assert f"Of {20 * len(wider)} problems with 60 columns, the greedy set was better in" in page
    assert f"better in {better}, by up to {wider['greedy gains more'].max():.0f} nats" in page
    assert f"that of SPM in {worse}" in page
    erp = table.set_index("problem").loc["dynamic causal model erp_a, 43 parameters"]
    assert f"{erp['greedy nats']:.2f} nats against {erp['blocks nats']:.2f}" in page
    large = table.set_index("problem")["seconds"].dropna()
    assert large["dense, 2,000 weights"] < 20
    assert large["rank 20, 1,000,000 weights"] < 60


def low_rank(size, rank=3):
    return LowRank(
        torch.where(torch.rand(size) < 0.2, torch.randn(size), 0.05 * torch.randn(size)).double(),
        0.2 * torch.randn(size, rank).double(),
        (0.01 + 0.02 * torch.rand(size)).double(),
    )


def test_low_rank_evidence_is_exact_for_all_4096_linear_regressions():
    """Nine directions equally well known, and three less: covariance = diagonal + rank three."""
    left, right = (torch.linalg.qr(torch.randn(n, 12).double()).Q for n in (40, 12))
    x = (left * torch.tensor([20.0] * 9 + [4.0, 2.0, 0.5]).double()) @ right.mT
    y = x @ torch.where(torch.rand(12) < 0.5, torch.randn(12), 0.0).double()
    y = y + torch.randn(40).double()
    least = 1 / (20.0**2 + 1)
    known = torch.tensor([4.0, 2.0, 0.5]).double()
    factor = right[:, 9:] * (1 / (known.square() + 1) - least).sqrt()
    loc = torch.linalg.solve(x.mT @ x + torch.eye(12).double(), x.mT @ y)
    posterior = LowRank(loc, factor, torch.full((12,), least, dtype=torch.float64))
    log_prior = torch.full((12,), UNIT_NORMAL_AT_ZERO).double()

    members = subset_members(torch.arange(2**12), 12)
    columns = x * ~members[:, None]
    of_data = torch.eye(40).double() + columns @ columns.mT
    log_evidence = MultivariateNormal(torch.zeros(40).double(), of_data).log_prob(y)
    chains = torch.stack([joint_tensor(posterior, log_prior, m) for m in members])
    torch.testing.assert_close(chains, log_evidence[0] - log_evidence, rtol=0, atol=1e-6)


def joint_tensor(posterior, log_prior, dropped):
    return delta_f_spike_chain(posterior.split(dropped)[0], log_prior[dropped]).sum()


@pytest.mark.parametrize("size", [1, 5, 127, 128, 300])
def test_low_rank_is_dense_without_the_matrix(size):
    posterior = low_rank(size)
    log_prior = torch.full((size,), UNIT_NORMAL_AT_ZERO).double()
    drop = torch.rand(size) < 0.5
    chain = delta_f_spike_chain(posterior, log_prior)
    torch.testing.assert_close(chain, delta_f_spike_chain(posterior.dense(), log_prior))
    for mine, theirs in zip(posterior.split(drop), posterior.dense().split(drop), strict=True):
        torch.testing.assert_close(mine.loc, theirs.loc)
        torch.testing.assert_close(mine.dense().covariance, theirs.covariance)
        torch.testing.assert_close(mine.marginals().scale, theirs.marginals().scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_top_k_keeps_what_is_left_after_so_many_single_removals(seed, dtype):
    posterior, log_prior = regression(seed, rows=15)
    posterior = posterior.to(dtype)
    exact, gone, order = posterior.to(torch.float64), torch.zeros(12, dtype=torch.bool), []
    while not gone.all():
        ahead = (~gone).nonzero()[:, 0]
        alone = delta_f_spike(exact.split(gone)[1].marginals(), log_prior[ahead])
        order.append(ahead[alone.argmin()].item())
        gone[order[-1]] = True
    factor = JointFactor((Site("w", torch.Size([12])),), posterior)
    scores = score((factor.with_priors({"w": Prior(log_prior[0])}),))
    for n in range(13):
        dropped = (~bmr.top_k(n)(scores)["w"]).nonzero()[:, 0]
        assert set(dropped.tolist()) == set(order[: 12 - n])


@pytest.mark.parametrize("stop", [0.0, math.inf])
def test_low_rank_elimination_in_blocks_is_as_good_as_one_by_one(stop):
    posterior = low_rank(1500, rank=8)
    log_prior = torch.full((1500,), UNIT_NORMAL_AT_ZERO).double()
    blocks = eliminate(posterior, log_prior, stop)
    singly = eliminate(posterior.dense(), log_prior, stop)
    assert (blocks.isfinite().all() and singly.isfinite().all()) == (stop == math.inf)
    naive = joint(posterior, log_prior, delta_f_spike(posterior.marginals(), log_prior) <= 0)
    found, one_by_one = (joint(posterior, log_prior, path <= 0) for path in (blocks, singly))
    assert found == pytest.approx(one_by_one, abs=1.0)
    assert found < naive - 10


def test_elements_that_stay_are_not_searched():
    posterior = low_rank(50)
    log_prior = torch.full((50,), UNIT_NORMAL_AT_ZERO).double()
    log_prior[::2] = torch.inf
    for gaussian in (posterior, posterior.dense()):
        path = eliminate(gaussian, log_prior, math.inf)
        assert path[::2].isposinf().all()
        assert path[1::2].isfinite().all()


def test_greedy_on_more_elements_than_fit_in_pairs_is_no_worse_than_elimination():
    posterior, log_prior = regression(0, columns=MOST_IN_PAIRS + 100, rows=900)
    greedy = joint(posterior, log_prior, search_greedily(posterior, log_prior))
    eliminated = joint(posterior, log_prior, eliminate(posterior, log_prior, 0.0) <= 0)
    assert greedy <= eliminated + 1e-6


@pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-12])
def test_searches_of_nearly_singular_posteriors_end_no_worse_than_elimination(size):
    common = torch.randn(20, 3).double()
    tril = triangular(torch.cat([common, size * torch.eye(20).double()], dim=1))
    posterior = Dense(common @ torch.randn(3).double(), tril)
    log_prior = torch.full((20,), UNIT_NORMAL_AT_ZERO).double()
    found = joint(posterior, log_prior, search_greedily(posterior, log_prior))
    assert found <= joint(posterior, log_prior, eliminate(posterior, log_prior, 0.0) <= 0) + 1e-6
    assert found <= joint(posterior, log_prior, torch.ones(20, dtype=torch.bool)) + 1e-6


@pytest.mark.parametrize("dropped", [[], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_the_tableau_is_conditioning_and_a_sweep_changes_one_element(dropped):
    root = torch.randn(6, 8).double()
    posterior = Dense(torch.randn(6).double(), triangular(root))
    out = torch.zeros(6, dtype=torch.bool)
    out[dropped] = True
    tableau = make_tableau(posterior, out)
    gone, rest = posterior.split(out)
    torch.testing.assert_close(tableau[:6, :6][~out][:, ~out], rest.covariance)
    torch.testing.assert_close(tableau[:6, 6][~out], rest.loc)
    torch.testing.assert_close(-tableau[:6, :6][out][:, out], gone.natural().precision)
    torch.testing.assert_close(tableau[:6, 6][out], gone.natural().linear)
    for i in range(6):
        other, swept = out.clone(), tableau.clone()
        other[i] ^= True
        sweep_tableau(swept[None], torch.tensor([i]))
        expected = make_tableau(posterior, other)
        torch.testing.assert_close(swept[:, :6], expected[:, :6])
