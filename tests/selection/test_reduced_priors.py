"""Shrinkage: Gaussian and Laplace reduced priors, from the formulas to the laws of a Reduction."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from scipy.integrate import quad
from torch.distributions import MultivariateNormal

import pyro_bmr as bmr
from conftest import make_case
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.mathematics.laplace import reduce_to_laplace
from pyro_bmr.mathematics.shrinkage import noisy_copy, shrink
from pyro_bmr.programs.switching import NewPrior, switch_prior
from pyro_bmr.testing import check_guide_family

NOISE, N, COLUMNS = 0.5, 30, 6


class Regression(ExactRegression):
    """Known noise, a prior that differs between weights, and nearly collinear columns."""

    def __init__(self):
        x = torch.randn(N, COLUMNS).double()
        x[:, 1] = x[:, 0] + 0.02 * torch.randn(N).double()
        weights = torch.tensor([0.4, 0.4, -0.6, 0.0, 0.05, 0.0]).double()
        y = x @ weights + NOISE * torch.randn(N).double()
        loc = torch.tensor([0.0, 0.2, -0.3, 0.0, 0.5, 0.0]).double()
        scale = torch.tensor([1.0, 1.5, 0.7, 1.0, 2.0, 0.8]).double()
        super().__init__(x, y, NOISE, loc, scale)

    def model(self):
        w = pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(self.x @ w, NOISE), obs=self.y)

    def log_evidence(self, loc, scale):
        covariance = NOISE**2 * torch.eye(N) + self.x @ scale.square().diag() @ self.x.mT
        return MultivariateNormal(self.x @ loc, covariance).log_prob(self.y).item()


def keep(*kept):
    mask = torch.tensor(kept, dtype=torch.bool)
    return lambda scores: {"w": mask}


@pytest.mark.parametrize("family", ["dense", "low_rank"])
@pytest.mark.parametrize("reduced", [(0.0, 0.1), (0.3, 0.6), (0.0, 1e-5)])
def test_shrinkage_of_correlated_weights_has_the_exact_evidence(family, reduced):
    problem = Regression()
    guide = getattr(problem, family)()
    full = problem.log_evidence(problem.loc, problem.scale)
    for kept in ([1, 0, 1, 0, 0, 1], [0] * 6, [1] * 6, [0, 0, 1, 1, 1, 1]):
        mask = torch.tensor(kept, dtype=torch.bool)
        result = bmr.reduce(guide, reduced_prior=bmr.Gaussian(*reduced), select=keep(*kept))
        exact = problem.log_evidence(
            torch.where(mask, problem.loc, reduced[0]), torch.where(mask, problem.scale, reduced[1])
        )
        assert result.delta_f == pytest.approx(full - exact, abs=1e-5)
        assert torch.equal(result.masks["w"], mask)
        assert result.sparsity == 0
        assert result.shrunk == 6 - sum(kept)
        # For an exact posterior the loss is -log evidence, whatever the draw.
        if reduced[1] > 1e-3:
            loss = Trace_ELBO().loss(result.model, result.guide)
            assert loss == pytest.approx(-exact, abs=1e-5)


@pytest.mark.parametrize("family", ["dense", "low_rank"])
def test_greedy_shrinkage_is_step_by_step_the_best_by_analytic_evidence(family):
    problem = Regression()
    mask = torch.ones(COLUMNS, dtype=torch.bool)
    loc, scale = 0.1, 0.3

    def evidence(mask):
        return problem.log_evidence(
            torch.where(mask, problem.loc, loc), torch.where(mask, problem.scale, scale)
        )

    while mask.any():
        without = {i: mask & (torch.arange(COLUMNS) != i) for i in mask.nonzero()[:, 0].tolist()}
        best = max(without, key=lambda i: evidence(without[i]))
        if evidence(without[best]) <= evidence(mask):
            break
        mask = without[best]
    result = bmr.reduce(getattr(problem, family)(), reduced_prior=bmr.Gaussian(loc, scale))
    assert 0 < mask.sum() < COLUMNS
    assert torch.equal(result.masks["w"], mask)


def test_spikes_and_shrinkage_compose_in_any_order():
    """Prune two, shrink two, prune one of the shrunk: against the analytic evidence."""
    problem = Regression()
    full = problem.log_evidence(problem.loc, problem.scale)
    pruned = bmr.reduce(problem.dense(), select=keep(1, 0, 1, 0, 1, 1))
    shrunk = bmr.reduce(
        pruned.guide, reduced_prior=bmr.Gaussian(0.1, 0.2), select=keep(0, 1, 1, 1, 0, 1)
    )
    assert shrunk.masks["w"].tolist() == [False, False, True, False, False, True]
    assert shrunk.summary().loc["w", "shrunk"] == 2
    assert shrunk.summary().loc["w", "kept"] == 4
    assert shrunk.sparsity == pytest.approx(2 / 6)
    again = bmr.reduce(shrunk.guide, select=keep(0, 1, 1, 1, 1, 1))
    assert again.masks["w"].tolist() == [False, False, True, False, True, True]
    loc = torch.tensor([0.0, 0.0, -0.3, 0.0, 0.1, 0.0]).double()
    scale = torch.tensor([0.0, 0.0, 0.7, 0.0, 0.2, 0.8]).double()
    exact = problem.log_evidence(loc, scale)
    total = pruned.delta_f + shrunk.delta_f + again.delta_f
    assert total == pytest.approx(full - exact, abs=1e-6)
    loss = Trace_ELBO().loss(again.model, again.guide)
    assert loss == pytest.approx(-exact, abs=1e-6)


def random_joint(n, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    posterior = LowRank(randn(n), 0.3 * randn(n, 3), 0.01 + 0.1 * randn(n).square())
    prior = Diagonal(0.5 * randn(n), 1 + randn(n).abs())
    scale = torch.where(randn(n) > 0, prior.scale * 3, prior.scale * randn(n).sigmoid())
    return posterior, prior, Diagonal(torch.where(randn(n) > 0, randn(n), prior.loc), scale)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(0, 10_000))
def test_joint_shrinkage_is_the_difference_of_log_partitions(n, seed):
    posterior, prior, reduced = random_joint(n, seed)
    dense = posterior.dense()
    p, r = (Dense(g.loc, g.scale.diag()) for g in (prior, reduced))
    precision = (dense.natural() + r.natural() - p.natural()).precision
    if torch.linalg.eigvalsh(precision).min() <= 0:
        for q in (posterior, dense):
            with pytest.raises(ValueError, match="improper"):
                shrink(q, prior, reduced)
        return
    expected = bmr.reduced_posterior(dense, p, r)
    for q in (posterior, dense):
        value, after = shrink(q, prior, reduced)
        assert value == pytest.approx(bmr.delta_f(dense, p, r).item(), rel=1e-9, abs=1e-9)
        after = after.dense() if isinstance(after, LowRank) else after
        torch.testing.assert_close(after.loc, expected.loc)
        torch.testing.assert_close(after.covariance, expected.covariance)
        copied, log_prior = noisy_copy(q, prior, reduced)
        assert torch.equal(log_prior.isfinite(), reduced.scale < prior.scale)


def test_joint_shrinkage_is_monte_carlo():
    posterior, prior, reduced = random_joint(4, 3)
    draws = MultivariateNormal(posterior.loc, scale_tril=posterior.dense().scale_tril).sample(
        (200_000,)
    )
    p, r = (dist.Normal(g.loc, g.scale) for g in (prior, reduced))
    ratios = (r.log_prob(draws) - p.log_prob(draws)).sum(-1).exp()
    error = float(ratios.std() / ratios.mean() / len(draws) ** 0.5)
    value, after = shrink(posterior, prior, reduced)
    assert value == pytest.approx(-ratios.mean().log().item(), abs=4 * error)
    mean = (ratios[:, None] * draws).mean(0) / ratios.mean()
    torch.testing.assert_close(after.loc, mean, atol=0.02, rtol=0)


@pytest.mark.parametrize("posterior", [(0.3, 0.5), (-2.0, 0.1), (0.0, 0.95), (3.0, 0.4)])
@pytest.mark.parametrize("prior", [(0.0, 1.0), (0.4, 3.0)])
@pytest.mark.parametrize("scale", [0.02, 0.4, 5.0])
def test_laplace_is_quadrature(posterior, prior, scale):
    q, p, r = (
        dist.Normal(*torch.tensor(posterior).double()),
        dist.Normal(*torch.tensor(prior).double()),
        dist.Laplace(torch.tensor(0.0).double(), scale),
    )

    def log_density(t):
        t = torch.as_tensor(t, dtype=torch.float64)
        return q.log_prob(t) + r.log_prob(t) - p.log_prob(t)

    grid = torch.linspace(-15, 15, 30_001).double()
    values = log_density(grid)
    top = values.max()
    inside = grid[values > top - 60]
    ends = inside[0].item(), inside[-1].item()
    cuts = sorted({c for c in (0.0, grid[values.argmax()].item()) if ends[0] < c < ends[1]})
    moments = [
        quad(
            lambda t, k=k: t**k * (log_density(t) - top).exp().item(),
            *ends,
            points=cuts or None,
            epsabs=1e-13,
            epsrel=1e-9,
            limit=400,
        )[0]
        for k in range(3)
    ]
    value, matched = reduce_to_laplace(
        *(Diagonal(g.loc, g.scale) for g in (q, p)), torch.tensor(scale)
    )
    # float32 holds the scale of the Laplace to seven digits.
    assert value.item() == pytest.approx(-math.log(moments[0]) - top.item(), rel=1e-5, abs=1e-6)
    mean = moments[1] / moments[0]
    variance = moments[2] / moments[0] - mean**2
    assert matched.loc.item() == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert matched.scale.item() == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("exponent", range(-12, 1, 2))
def test_laplace_stays_finite_where_densities_do_not(exponent):
    """Posteriors of any width at any distance, priors hardly wider, and Laplaces of any width."""
    scale = torch.tensor(10.0**exponent).double()
    loc = torch.tensor([-30.0, -1.0, 0.0, 1e-6, 2.0]).double()[:, None]
    wide = torch.tensor([1 + 1e-9, 1.5, 1e6], dtype=torch.float64)
    for b in (1e-9, 1e-3, 1.0, 1e3):
        value, matched = reduce_to_laplace(
            Diagonal(loc, scale), Diagonal(0 * wide, scale * wide), torch.tensor(b).double()
        )
        assert value.isfinite().all()
        assert matched.loc.isfinite().all()
        assert (matched.scale > 0).all()
        # The reduced posterior lies between zero and the mean of q / p, and is no wider than that.
        precision = scale**-2 - (scale * wide) ** -2
        middle = loc / scale**2 / precision
        assert (matched.loc.abs() <= middle.abs() * (1 + 1e-6) + 1e-12).all()
        assert (matched.scale <= precision.rsqrt() * (1 + 1e-6)).all()


def test_a_narrow_laplace_has_the_evidence_of_a_spike():
    q = Diagonal(torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 0.2]).double())
    p = Diagonal(torch.zeros(2).double(), torch.ones(2).double())
    spike = bmr.delta_f(q, p, Diagonal(torch.zeros(2).double(), torch.zeros(2).double()))
    value, matched = reduce_to_laplace(q, p, torch.tensor(1e-7).double())
    torch.testing.assert_close(value, spike, atol=1e-5, rtol=0)
    torch.testing.assert_close(matched.scale, torch.full((2,), math.sqrt(2) * 1e-7).double())


def make_elements(locs, scales):
    """A guide whose elements are known, for the prior N(0, 1)."""

    def model():
        return pyro.sample("w", dist.Normal(torch.zeros(len(locs)), 1.0).to_event(1))

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": torch.tensor(locs)}))
    guide()
    guide.scales.w = torch.tensor(scales)
    return guide


@pytest.mark.parametrize("reduced", [bmr.Gaussian(0.0, 0.3), bmr.Laplace(0.2)])
def test_of_independent_elements_each_is_decided_by_itself(reduced):
    guide = make_elements([0.0, 0.1, 0.9, 3.0], [0.5, 0.6, 0.2, 0.1])
    result = bmr.reduce(guide, reduced_prior=reduced)
    assert torch.equal(result.masks["w"], result.scores["w"] > 0)
    assert result.masks["w"].tolist() == [False, False, True, True]
    assert result.delta_f == pytest.approx(result.scores["w"][:2].sum().item(), rel=1e-6)
    before, after = (read_guide(g)[0].marginals()["w"] for g in (guide, result.guide))
    assert torch.equal(after.loc[2:], before.loc[2:])
    assert torch.equal(after.scale[2:], before.scale[2:])
    assert (after.scale[:2] < before.scale[:2]).all()
    assert after.loc[1].abs() < before.loc[1].abs()
    assert (result.guide()["w"] != 0).all()
    text = str(result)
    assert "0.0% pruned, 2 of 4 shrunk" in text
    assert "shrunk" in result.summary().columns
    assert "2 of 4 shrunk" in result._repr_html_()
    assert "shrunk" not in str(bmr.reduce(guide))


def test_the_predicted_change_of_the_free_energy_is_the_realised_one():
    """At its own optimum, F falls by ΔF: an exact mean-field posterior, by Monte Carlo."""
    y = torch.tensor([0.4, -0.2, 0.1, 1.5])

    def model():
        with pyro.plate("units", 4):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    guide = AutoNormal(model)
    guide()
    guide.locs.w, guide.scales.w = y * 0.8, torch.full((4,), math.sqrt(0.2))
    result = bmr.reduce(guide, reduced_prior=bmr.Gaussian(0.0, 0.2))
    assert result.masks["w"].tolist() == [False, False, False, True]
    losses = [Trace_ELBO().loss(*pair) for pair in ((model, guide), (result.model, result.guide))]
    assert losses[1] - losses[0] == pytest.approx(result.delta_f, abs=1e-4)


def latent(trace, name):
    trace.compute_log_prob()
    return trace.nodes[name]


CASES = [
    ("network", "AutoNormal"),
    ("network", "AutoMultivariateNormal"),
    ("functional", "AutoDiagonalNormal"),
    ("functional", "AutoLowRankMultivariateNormal"),
    ("functional", "AutoGuideList"),
    ("network", "mean_field"),
]


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_the_laws_hold_for_shrinkage(names, device, tmp_path):
    case = make_case(*names, device)
    before = {n: v.clone() for n, v in case.guide.state_dict().items()}
    random_before = torch.get_rng_state()
    reduced = bmr.Gaussian(0.1, 0.2)

    def some(scores):
        return {
            name: (torch.arange(t.numel(), device=t.device) % 2 == 0).reshape(t.shape)
            for name, t in scores.delta_f.items()
        }

    result = bmr.reduce(case.guide, reduced_prior=reduced, select=some)
    assert torch.equal(torch.get_rng_state(), random_before)
    for name, value in case.guide.state_dict().items():
        assert torch.equal(value, before[name])
    assert result.shrunk == sum(int((~mask).sum()) for mask in result.masks.values()) > 0
    check_guide_family(result.guide)

    # Names and shapes stay, and the prior is the reduced one where the mask is False.
    trace = poutine.trace(result.guide).get_trace(*case.args)
    full = poutine.trace(case.guide).get_trace(*case.args)
    assert full.stochastic_nodes != []
    model_trace = poutine.trace(poutine.replay(result.model, trace)).get_trace(*case.args)
    user_trace = poutine.trace(poutine.replay(case.model, trace)).get_trace(*case.args)
    for name, mask in result.masks.items():
        value = trace.nodes[name]["value"]
        assert value.shape == full.nodes[name]["value"].shape
        kept = dist.Normal(0.0, 1.0).log_prob(value)
        taken = dist.Normal(0.1, 0.2).log_prob(value)
        expected = torch.where(mask, kept, taken).sum()
        torch.testing.assert_close(latent(model_trace, name)["log_prob_sum"], expected)
    likelihoods = [latent(t, "y")["log_prob_sum"] for t in (model_trace, user_trace)]
    torch.testing.assert_close(*likelihoods)

    draws = Predictive(result.model, guide=result.guide, num_samples=5)(case.args[0])
    assert draws["y"].shape == (5, len(case.args[0]))

    # Copies are independent, states can be saved, everything can be reduced again and trained.
    copied = copy.deepcopy(result)
    case.train(copied.model, copied.guide, 3)
    torch.save(copied.guide.state_dict(), tmp_path / "guide.pt")
    torch.save(copied.model.state_dict(), tmp_path / "model.pt")
    result.guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    result.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name, value in result.guide.median().items():
        torch.testing.assert_close(value, copied.guide.median()[name])
    moved = result.to(device)
    assert math.isfinite(Trace_ELBO().loss(moved.model, moved.guide, *case.args))

    everything = dict(
        sites=list(result.masks), select=lambda s: {n: t < -1e9 for n, t in s.delta_f.items()}
    )
    again = bmr.reduce(moved.guide, reduced_prior=reduced, **everything)
    assert all(not mask.any() for mask in again.masks.values())
    shrunk_before = bmr.reduce(moved.guide, reduced_prior=reduced, sites=list(result.masks))
    for name, mask in result.masks.items():
        # Taking the same prior a second time changes nothing.
        torch.testing.assert_close(
            shrunk_before.scores[name][~mask], torch.zeros(int((~mask).sum()), device=device)
        )
    spiked = bmr.reduce(again.guide)
    assert math.isfinite(spiked.delta_f)
    assert spiked.model.model is again.model.model is again.guide.model


def test_plates_that_subsample_and_masks(device):
    hidden = torch.tensor([True, True, False])

    def model():
        with pyro.plate("rows", 40, subsample_size=8):
            prior = dist.Normal(torch.zeros(3, device=device), 2.0).mask(hidden.to(device))
            pyro.sample("w", prior.to_event(1))

    guide = AutoNormal(model, init_scale=0.5)
    guide()
    shrunk = bmr.reduce(guide, reduced_prior=bmr.Gaussian(0.0, 0.1))
    assert shrunk.masks["w"].shape == (40, 3)
    assert torch.equal(shrunk.masks["w"], (~hidden).to(device).expand(40, 3))
    assert shrunk.summary().loc["w", "note"] == "40 without a prior, kept"
    trace = poutine.trace(shrunk.model).get_trace()
    drawn = trace.nodes["w"]["value"]
    assert drawn.shape == (8, 3)
    expected = dist.Normal(0.0, 0.1).log_prob(drawn)[:, :2].sum() * 5
    torch.testing.assert_close(latent(trace, "w")["log_prob_sum"], expected)

    rows = torch.arange(40, device=device)
    some = bmr.reduce(
        guide,
        reduced_prior=bmr.Laplace(0.1),
        select=lambda s: {"w": (rows[:, None] % 2 == 0) | ~hidden.to(device)},
    )
    trace = poutine.trace(some.model).get_trace()
    rows = trace.nodes["rows"]["value"]
    drawn = trace.nodes["w"]["value"]
    log_prior = torch.where(
        (rows % 2 == 0)[:, None],
        dist.Normal(0.0, 2.0).log_prob(drawn),
        dist.Laplace(0.0, 0.1).log_prob(drawn),
    )
    expected = log_prior[:, :2].sum() * 5
    torch.testing.assert_close(latent(trace, "w")["log_prob_sum"], expected)


@pytest.mark.parametrize("log_normal", [True, False])
def test_a_prior_that_is_gaussian_in_other_coordinates_is_switched_there(log_normal):
    normal = dist.Normal(torch.zeros(3), 2.0)
    exp = torch.distributions.ExpTransform()
    fn = dist.LogNormal(0 * normal.loc, 2.0) if log_normal else None
    fn = fn or dist.TransformedDistribution(normal, [exp])
    mask = torch.tensor([True, False, False])
    value = torch.tensor([0.5, 1.0, 2.0])
    for family, r in (
        (dist.Normal, dist.Normal(torch.tensor(1.0), 0.5)),
        (dist.Laplace, dist.Laplace(torch.tensor(0.0), 0.5)),
    ):
        new = NewPrior(mask, family, {"loc": r.loc, "scale": r.scale})
        switched = switch_prior(fn.to_event(1), new).base_dist
        of_log = torch.where(mask, normal.log_prob(value.log()), r.log_prob(value.log()))
        torch.testing.assert_close(switched.log_prob(value), of_log - value.log())


def test_what_was_shrunk_to_a_laplace_can_still_be_pruned():
    guide = make_elements([0.0, 0.2, 3.0], [0.5, 0.5, 0.1])
    shrunk = bmr.reduce(guide, reduced_prior=bmr.Laplace(0.1))
    assert shrunk.masks["w"].tolist() == [False, False, True]
    prior = torch.tensor([-math.log(0.2)] * 2 + [dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))])
    marginal = read_guide(shrunk.guide)[0].marginals()["w"]
    expected = prior - dist.Normal(marginal.loc, marginal.scale).log_prob(torch.zeros(3))
    torch.testing.assert_close(bmr.reduce(shrunk.guide).scores["w"], expected)
    with pytest.warns(UserWarning, match="prior is not Gaussian"):
        again = bmr.reduce(shrunk.guide, reduced_prior=bmr.Gaussian(0.0, 0.1))
    assert again.shrunk == 0


def test_elements_that_cannot_be_shrunk_are_counted_and_kept():
    guide = make_elements([0.0, 0.0, 0.5], [0.5, 1.5, 0.4])
    wide = bmr.reduce(guide, reduced_prior=bmr.Gaussian(0.0, 9.0), select=bmr.by_evidence(-99.0))
    note = "1 with an improper reduced posterior, kept; 1 wider than the prior"
    assert wide.summary().loc["w", "note"] == note
    assert wide.masks["w"].tolist() == [False, True, False]
    laplace = bmr.reduce(guide, reduced_prior=bmr.Laplace(0.1))
    assert laplace.summary().loc["w", "note"] == note
    for result in (wide, laplace):
        assert all(v.isfinite().all() for v in result.guide.state_dict().values())
        assert math.isfinite(result.delta_f)
    with pytest.raises(ValueError, match="cannot go: 1 with an improper reduced posterior"):
        bmr.reduce(guide, reduced_prior=bmr.Laplace(0.1), select=keep(0, 0, 0))
    nearly_all = bmr.reduce(guide, reduced_prior=bmr.Laplace(0.1), select=bmr.baselines.snr(1.0))
    assert nearly_all.masks["w"].tolist() == [False, True, False]

    problem = Regression()
    reduced = bmr.Gaussian(problem.loc, torch.tensor([0.1, 9.0, 0.1, 0.1, 0.1, 9.0]))
    result = bmr.reduce(problem.dense(), reduced_prior=reduced, select=bmr.by_evidence(-99.0))
    assert "2 with a reduced prior that is not narrower" in result.summary().loc["w", "note"]
    assert result.masks["w"].tolist() == [False, True, False, False, False, True]


def mixed(n=3):
    pyro.sample("w", dist.Normal(0.0, 1.0).expand([n]).to_event(1))
    pyro.sample("v", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("tau", dist.Gamma(1.0, 1.0))


def test_sites_without_a_gaussian_prior_keep_it():
    guide = AutoNormal(mixed)
    guide()
    result = bmr.reduce(guide, reduced_prior=bmr.Gaussian(0.0, 0.3))
    assert set(result.masks) == {"w"}
    assert result.summary().loc["v", "note"].startswith("not reduced: its prior is not Gaussian")
    assert result.summary().loc["tau", "note"] == "not reduced: it is positive"
    with pytest.raises(ValueError, match="reduced_prior= names sites.*'v': its prior is not Gauss"):
        bmr.reduce(guide, reduced_prior={"v": bmr.Laplace(0.1)})


def test_a_mapping_gives_each_site_its_own_reduced_prior():
    guide = AutoNormal(mixed, init_scale=0.5)
    guide()
    result = bmr.reduce(
        guide,
        reduced_prior={"w": bmr.Gaussian(0.0, torch.tensor([0.1, 0.2, 0.3])), "v": bmr.Spike()},
        select=lambda s: {n: t < -1e9 for n, t in s.delta_f.items()},
    )
    table = result.summary()
    assert (table.loc["w", "kept"], table.loc["w", "shrunk"]) == (3, 3)
    assert (table.loc["v", "kept"], table.loc["v", "shrunk"]) == (0, 0)
    trace = poutine.trace(result.model).get_trace()
    assert (trace.nodes["v"]["value"] == 0).all()
    assert torch.equal(trace.nodes["w"]["fn"].base_dist.scale, torch.tensor([0.1, 0.2, 0.3]))
    alone = bmr.reduce(guide, reduced_prior={"w": bmr.Spike()})
    assert alone.summary().loc["v", "note"] == "not reduced: it is not among reduced_prior="
    with pytest.raises(ValueError, match=r"reduced_prior= names \['u'\]"):
        bmr.reduce(guide, reduced_prior={"u": bmr.Spike()})


def test_what_correlated_posteriors_cannot_do_is_an_error():
    with pytest.raises(ValueError, match=r"sites \['w'\], whose posterior is correlated.*Expected"):
        bmr.reduce(Regression().dense(), reduced_prior=bmr.Laplace(0.1))

    def two():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    guide = AutoMultivariateNormal(two)
    guide()
    with pytest.raises(ValueError, match="one kind for the sites of a correlated posterior"):
        bmr.reduce(guide, reduced_prior={"a": bmr.Spike(), "b": bmr.Gaussian(0.0, 0.1)})
    alone = bmr.reduce(guide, reduced_prior={"b": bmr.Gaussian(0.0, 0.1)})
    assert set(alone.masks) == {"b"}


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_of_reduced_priors(scale):
    for make in (lambda s: bmr.Gaussian(0.0, s), bmr.Laplace):
        with pytest.raises(ValueError, match=r"Expected positive and finite scales; Spike\(\)"):
            make(scale)
    with pytest.raises(ValueError, match="Expected finite locations"):
        bmr.Gaussian(math.nan, 1.0)


def test_a_model_that_wraps_a_function_leaves_its_modules_alone():
    """Reading the priors of a shrunk model must not update the buffers of a module inside."""
    case = make_case("functional", "AutoNormal")
    norm = torch.nn.BatchNorm1d(4)

    def model(x, y=None):
        return case.model(norm(x), y)

    shrunk = bmr.reduce(case.guide, model=model, reduced_prior=bmr.Gaussian(0.0, 0.1))
    before = norm.running_mean.clone()
    bmr.reduce(shrunk.guide)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_reduced_priors_that_do_not_fit(family):
    guide = family(lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1)))
    guide()
    with pytest.raises(ValueError, match=r"loc has the shape \(7,\) for the site 'w'.*\(3,\)"):
        bmr.reduce(guide, reduced_prior=bmr.Gaussian(torch.zeros(7), 0.1))


def test_numbers_are_not_rounded_to_single_precision():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(3).double(), 0.1).to_event(1))

    guide = AutoNormal(model, init_scale=0.05)
    guide()
    result = bmr.reduce(guide, reduced_prior=bmr.Gaussian(0.0, 0.07), select=bmr.by_evidence(-9.0))
    trace = poutine.trace(result.model).get_trace()
    fn = trace.nodes["w"]["fn"].base_dist
    assert (fn.scale == 0.07).all()
