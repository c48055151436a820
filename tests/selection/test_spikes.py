"""Spikes elsewhere than at zero: at a number, or at the mean of the prior."""

import copy
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ObservedRegression
from often import often
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_bmr as bmr

COUNTIES, PER_COUNTY, NOISE, TAU = 5, 4, 0.5, 1.0


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def centered(y):
    mu = pyro.sample("mu", dist.Normal(0.3, 3.0))
    with pyro.plate("counties", COUNTIES, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, TAU))
        with pyro.plate("houses", PER_COUNTY, dim=-1):
            pyro.sample("y", dist.Normal(a, NOISE), obs=y)


def not_centered(y):
    mu = pyro.sample("mu", dist.Normal(0.3, 3.0))
    with pyro.plate("counties", COUNTIES, dim=-2):
        step = pyro.sample("step", dist.Normal(0.0, TAU))
        with pyro.plate("houses", PER_COUNTY, dim=-1):
            pyro.sample("y", dist.Normal(mu + step, NOISE), obs=y)


@pytest.fixture
def y():
    effects = 1.5 + torch.tensor([0.0, 0.1, -0.1, 2.0, -2.0])
    return effects[:, None] + NOISE * torch.randn(COUNTIES, PER_COUNTY)


def solve(y, pooled):
    """Evidence and posterior of (mu, a) by linear algebra, with some counties at mu."""
    free = [j for j in range(COUNTIES) if j not in pooled]
    # θ = m + B ε with ε standard normal: mu, then the step of each county that is free.
    root = torch.zeros(1 + COUNTIES, 1 + len(free))
    root[:, 0] = 3.0
    for column, county in enumerate(free, 1):
        root[1 + county, column] = TAU
    design = root[1:].repeat_interleave(PER_COUNTY, 0)
    residual = y.reshape(-1) - 0.3
    covariance = design @ design.mT + NOISE**2 * torch.eye(len(residual))
    evidence = dist.MultivariateNormal(torch.zeros(len(residual)), covariance).log_prob(residual)
    gain = root @ design.mT @ covariance.inverse()
    return evidence, 0.3 + gain @ residual, root @ root.mT - gain @ design @ root.mT


def exact_guide(model, y, loc, covariance):
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(model)
    guide(y)
    tril = torch.linalg.cholesky(covariance)
    guide.loc.data.copy_(loc)
    guide.scale = tril.diagonal()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


@pytest.fixture
def guide(y):
    _, loc, covariance = solve(y, [])
    return exact_guide(centered, y, loc, covariance)


def pool(pooled):
    kept = torch.tensor([[j not in pooled] for j in range(COUNTIES)])
    return lambda _: {"a": kept}


TO_MEAN = {"a": bmr.Spike(loc="prior")}


@pytest.mark.parametrize("count", often(range(1, COUNTIES + 1), 1, 3))
def test_spikes_at_a_group_mean_are_exact(y, guide, count):
    full, *_ = solve(y, [])
    for pooled in itertools.combinations(range(COUNTIES), count):
        result = bmr.reduce(guide, y, select=pool(pooled), reduced_prior=TO_MEAN)
        evidence, loc, covariance = solve(y, pooled)
        assert result.delta_f == pytest.approx(float(full - evidence), abs=1e-8)
        assert result.realised == pytest.approx(float(full - evidence), abs=1e-8)
        median = result.guide.median()
        torch.testing.assert_close(torch.cat([median["mu"][None], median["a"][:, 0]]), loc)
        upper = result.guide.quantiles([0.9])
        upper = torch.cat([upper["mu"], upper["a"][0, :, 0]])
        scale = covariance.diagonal().sqrt()
        torch.testing.assert_close(upper, dist.Normal(loc, scale).icdf(torch.tensor(0.9)))


def test_the_centered_model_and_the_other_are_reduced_alike(y, guide):
    selections = (bmr.by_free_energy(), bmr.by_evidence(), bmr.exhaustive(), bmr.top_k(2))
    ours = [bmr.reduce(guide, y, reduced_prior=TO_MEAN, select=select) for select in selections]
    _, loc, covariance = solve(y, [])
    steps = torch.eye(1 + COUNTIES)
    steps[1:, 0] = -1
    other = exact_guide(not_centered, y, steps @ loc, steps @ covariance @ steps.mT)
    for one, select in zip(ours, selections, strict=True):
        same = bmr.reduce(other, y, sites=["step"], select=select)
        assert torch.equal(one.masks["a"], same.masks["step"])
        assert one.delta_f == pytest.approx(same.delta_f, abs=1e-8)
        assert one.realised == pytest.approx(same.realised, abs=1e-8)
        assert 2 <= int(one.masks["a"].sum()) < COUNTIES
        torch.testing.assert_close(one.scores["a"], same.scores["step"])


@pytest.mark.parametrize("family", [AutoNormal, AutoLowRankMultivariateNormal])
def test_the_joint_density_of_steps_from_the_mean(y, family):
    guide = family(centered, init_scale=0.3)
    bmr.fit(centered, guide, y, num_epochs=100, lr=0.02, progress=False)
    result = bmr.reduce(guide, select=pool([0, 2]), reduced_prior=TO_MEAN)
    factors = bmr.extend.read_factors(guide)
    if family is AutoNormal:
        parts = [(f.loc.reshape(-1), f.marginals()[f.site.name].scale.reshape(-1)) for f in factors]
        loc, scale = (torch.cat(one) for one in zip(*parts, strict=True))
        covariance = scale.square().diag()
    else:
        loc, covariance = factors[0].posterior.loc, factors[0].posterior.dense().covariance
    steps = torch.zeros(2, 1 + COUNTIES)
    steps[:, 0], steps[0, 1], steps[1, 3] = -1, 1, 1
    step = dist.MultivariateNormal(steps @ loc, steps @ covariance @ steps.mT)
    prior = dist.Normal(0.0, TAU).log_prob(torch.zeros(2)).sum()
    expected = prior - step.log_prob(torch.zeros(2))
    assert result.delta_f == pytest.approx(float(expected), abs=1e-8)


def test_a_pooled_county_is_at_the_mean_in_every_draw(y, guide):
    result = bmr.reduce(guide, y, select=pool([0, 3]), reduced_prior=TO_MEAN)
    posterior = Predictive(result.model, guide=result.guide, num_samples=20, parallel=True)(y)
    prior = Predictive(result.model, num_samples=20)(y)
    for draws in (posterior, prior):
        equal = draws["a"].squeeze(-1) == draws["mu"].reshape(-1, 1)
        assert equal[:, [0, 3]].all()
        assert not equal[:, [1, 2, 4]].any()


def test_no_step_moves_a_pooled_county_away(y, guide):
    result = bmr.reduce(guide, y, select=pool([0, 3]), reduced_prior=TO_MEAN)
    before, _ = bmr.free_energy(result.model, result.guide, y)
    losses = bmr.fit(result.model, result.guide, y, num_epochs=20, lr=0.05, progress=False)
    assert torch.tensor(losses).isfinite().all()
    median = result.guide.median()
    assert median["a"][0, 0] == median["a"][3, 0] == median["mu"]
    evidence, *_ = solve(y, [0, 3])
    assert before == pytest.approx(-float(evidence), abs=1e-6)


def test_what_is_pooled_stays_so_in_later_reductions(y, guide):
    both = bmr.reduce(guide, y, select=pool([0, 1]), reduced_prior=TO_MEAN)
    first = bmr.reduce(guide, y, select=pool([0]), reduced_prior=TO_MEAN)
    then = bmr.reduce(first.guide, y, select=pool([1]), reduced_prior=TO_MEAN)
    assert first.delta_f + then.delta_f == pytest.approx(both.delta_f, abs=1e-8)
    torch.testing.assert_close(then.guide.median(), both.guide.median())
    # Another spike, at zero, for one that is left; the first is where it was.
    other = bmr.reduce(first.guide, y, sites=["a"], select=pool([4]))
    median = other.guide.median()
    assert median["a"][0, 0] == median["mu"]
    assert median["a"][4, 0] == 0
    again = bmr.reduce(other.guide, y, sites=["a"], select=pool([]))
    assert again.delta_f == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(again.guide.median(), median)


def test_copies_and_files_hold_centers(y, guide, tmp_path):
    result = bmr.reduce(guide, y, select=pool([0, 3]), reduced_prior=TO_MEAN)
    result.save(tmp_path / "pooled.pt", y)
    loaded = bmr.load(tmp_path / "pooled.pt", centered)
    for one in (copy.deepcopy(result.guide), loaded.guide):
        pyro.set_rng_seed(1)
        theirs = poutine.trace(one).get_trace(y).nodes["a"]["value"]
        pyro.set_rng_seed(1)
        assert torch.equal(theirs, poutine.trace(result.guide).get_trace(y).nodes["a"]["value"])
    loss = Trace_ELBO().loss(loaded.model, loaded.guide, y)
    assert loss == pytest.approx(-float(solve(y, [0, 3])[0]), abs=1e-6)


@pytest.mark.rare
def test_audit_arviz_and_compaction(y, guide):
    result = bmr.reduce(guide, y, reduced_prior=TO_MEAN)
    assert result.audit(y).total.realised == pytest.approx(result.delta_f, abs=1e-6)
    posterior = result.to_arviz(y, num_samples=10).posterior
    pooled = ~result.masks["a"].reshape(-1)
    a, mu = posterior["a"].values.squeeze(-1), posterior["mu"].values[..., None]
    assert (a[..., pooled] == mu).all()
    compacted = result.compact(y)
    assert bmr.free_energy(compacted.model, compacted.guide, y)[0] == pytest.approx(
        bmr.free_energy(result.model, result.guide, y)[0], abs=1e-6
    )


STATES = torch.tensor([0, 0, 1, 1, 1])
INCOME = torch.tensor([0.5, -1.0, 0.3, 0.8, -0.2])


def nested(y):
    mu = pyro.sample("mu", dist.Normal(0.3, 3.0))
    with pyro.plate("states", 2):
        state = pyro.sample("state", dist.Normal(mu, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = state[STATES] + slope * INCOME + 0.1
    a = pyro.sample("a", dist.Normal(mean, TAU).to_event(1))
    pyro.sample("y", dist.Normal(a[:, None], NOISE).to_event(2), obs=y)


def test_means_that_other_sites_add_up_to(y):
    # Standard normals: mu, states, slope, counties.
    root = torch.zeros(9, 9)
    root[0, 0], root[3, 3] = 3.0, 1.0
    root[1:3, 0], root[1, 1], root[2, 2] = 3.0, 1.0, 1.0
    root[4:] = root[1 + STATES]
    root[4:, 3] = INCOME
    offset = torch.cat([torch.full((3,), 0.3), torch.zeros(1), torch.full((5,), 0.4)])

    def evidence(pooled_states, pooled):
        mine = root.clone()
        mine[4:, 4:] = TAU * torch.eye(5)
        mine[:, [*(1 + s for s in pooled_states), *(4 + j for j in pooled)]] = 0
        design = mine[4:].repeat_interleave(PER_COUNTY, 0)
        residual = y.reshape(-1) - 0.4
        covariance = design @ design.mT + NOISE**2 * torch.eye(len(residual))
        gain = mine @ design.mT @ covariance.inverse()
        log_evidence = dist.MultivariateNormal(0 * residual, covariance).log_prob(residual)
        return log_evidence, offset + gain @ residual, mine @ mine.mT - gain @ design @ mine.mT

    full, loc, covariance = evidence([], [])
    guide = exact_guide(nested, y, loc, covariance)
    spike = bmr.Spike(loc="prior")
    for states, counties in (([0], []), ([], [1, 2]), ([1], [0, 1, 3]), ([0, 1], [0, 1, 2, 3, 4])):
        kept = {
            "state": torch.tensor([s not in states for s in range(2)]),
            "a": torch.tensor([j not in counties for j in range(5)]),
        }
        result = bmr.reduce(
            guide, y, select=lambda _, kept=kept: kept, reduced_prior={"state": spike, "a": spike}
        )
        reduced, mean, _ = evidence(states, counties)
        assert result.delta_f == pytest.approx(float(full - reduced), abs=1e-6)
        assert result.realised == pytest.approx(float(full - reduced), abs=1e-6)
        median = result.guide.median()
        ours = [median[name].reshape(-1) for name in ("mu", "state", "slope", "a")]
        torch.testing.assert_close(torch.cat(ours), mean)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("loc", [0.4, torch.tensor([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0])])
def test_spikes_at_numbers_are_exact(kind, loc):
    problem = ObservedRegression()
    guide = getattr(problem, kind)()
    at = torch.as_tensor(loc).double().expand(6)
    drop = torch.tensor([True, False, False, True, True, False])
    result = bmr.reduce(guide, select=lambda _: {"w": ~drop}, reduced_prior=bmr.Spike(loc=loc))
    x, y = problem.x, problem.y

    def evidence(free, held):
        mean = x[:, held] @ at[held] + x[:, free] @ problem.loc[free]
        root = x[:, free] * problem.scale[free]
        covariance = root @ root.mT + problem.noise**2 * torch.eye(len(y))
        return dist.MultivariateNormal(mean, covariance).log_prob(y)

    everything = torch.ones(6, dtype=torch.bool)
    expected = evidence(everything, ~everything) - evidence(~drop, drop)
    assert result.delta_f == pytest.approx(float(expected), abs=1e-6)
    draw = poutine.trace(result.guide).get_trace().nodes["w"]["value"]
    assert torch.equal(draw == at, drop)
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(result.model, result.guide, x, y)))


def test_positive_sites_have_their_spike_at_the_value():
    def model():
        pyro.sample("s", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))

    guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor([1.9, 0.5, 2.1]))
    guide()
    result = bmr.reduce(guide, reduced_prior={"s": bmr.Spike(loc=2.0)})
    assert result.masks["s"].tolist() == [False, True, False]
    draw = poutine.trace(result.guide).get_trace().nodes["s"]["value"]
    torch.testing.assert_close(draw[[0, 2]], torch.tensor([2.0, 2.0]))
    log_prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0).log())
    log_posterior = dist.Normal(torch.tensor([1.9, 2.1]).log(), 0.1).log_prob(
        torch.tensor(2.0).log()
    )
    assert result.delta_f == pytest.approx(float((log_prior - log_posterior).sum()))
    assert Predictive(result.model, num_samples=2)()["s"].isfinite().all()


@pytest.mark.parametrize(
    ("prior", "same"),
    [
        (lambda: dist.StudentT(3.0, 0.7, 1.0), lambda: dist.StudentT(3.0, 0.0, 1.0)),
        (lambda: dist.Laplace(0.7, 1.0), lambda: dist.Laplace(0.0, 1.0)),
        (
            lambda: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.4, 1.0]), 1.0)
            ),
            lambda: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-0.3, 0.3]), 1.0)
            ),
        ),
    ],
    ids=["StudentT", "Laplace", "mixture"],
)
def test_the_mean_of_other_families(prior, same):
    def reduced(make, start, spike):
        def model():
            pyro.sample("w", make())

        def guide():
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(start)), 0.2))

        pyro.clear_param_store()
        guide()
        return bmr.reduce(guide, model=model, reduced_prior=spike)

    ours = reduced(prior, 0.8, bmr.Spike(loc="prior"))
    theirs = reduced(same, 0.1, bmr.Spike())
    assert ours.delta_f == pytest.approx(theirs.delta_f)
    assert ours.delta_f < 0
    assert float(ours.guide.median()["w"]) == pytest.approx(0.7)


def scale_of(prior):
    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        pyro.sample("w", prior(s))

    guide = AutoNormal(model)
    guide()
    return guide


@pytest.mark.parametrize(
    ("prior", "reason"),
    [
        (lambda s: dist.Normal(s, 1.0), r"not linear in the values of \['s'\]"),
        (lambda s: dist.Cauchy(0.0, s), "no mean for the spike to be at"),
        (lambda s: dist.Gumbel(0.0, s), "its prior is a Gumbel"),
    ],
    ids=["not linear", "no mean", "unknown"],
)
def test_a_mean_that_cannot_be_is_refused_by_name(prior, reason):
    with pytest.raises(ValueError, match=reason):
        bmr.reduce(scale_of(prior), reduced_prior={"w": bmr.Spike(loc="prior")})


@pytest.mark.parametrize("loc", ["mean", float("nan"), torch.tensor([0.0, torch.inf])])
def test_a_spike_is_at_a_finite_number_or_at_the_prior(loc):
    with pytest.raises(ValueError, match=r"got Spike\(loc="):
        bmr.Spike(loc=loc)


def test_a_spike_outside_of_the_support_is_refused():
    guide = scale_of(lambda s: dist.Normal(0.0, s))
    with pytest.raises(ValueError, match="it is positive, and -1 is not"):
        bmr.reduce(guide, reduced_prior={"s": bmr.Spike(loc=-1.0)})
    with pytest.raises(ValueError, match="it is positive, and 0 is not"):
        bmr.reduce(guide, reduced_prior={"s": bmr.Spike(loc=0.0)})
