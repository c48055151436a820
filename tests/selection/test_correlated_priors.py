"""MultivariateNormal priors: g-priors and others, against log evidences in numpy."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyro_bmr as bmr

SIZE, NOISE = 5, 0.5


class Regression:
    """``y ~ N(X w, NOISE²)`` with a Gaussian prior of ``w``, whose posterior is known."""

    def __init__(self, kind, seed=0):
        random = np.random.default_rng(seed)
        self.x = random.normal(size=(30, SIZE)) @ (np.eye(SIZE) + 0.3)
        self.y = 0.4 * self.x[:, 0] - 0.3 * self.x[:, 3] + NOISE * random.normal(size=30)
        root = random.normal(size=(SIZE, SIZE))
        self.loc = np.zeros(SIZE) if kind == "g-prior" else 0.2 * random.normal(size=SIZE)
        self.covariance = (
            np.linalg.inv(self.x.T @ self.x) * 30 * NOISE**2
            if kind == "g-prior"
            else root @ root.T + 0.5 * np.eye(SIZE)
        )
        precision = np.linalg.inv(self.covariance)
        self.spread = np.linalg.inv(precision + self.x.T @ self.x / NOISE**2)
        self.mean = self.spread @ (precision @ self.loc + self.x.T @ self.y / NOISE**2)

    def log_evidence(self, loc, covariance):
        spread = NOISE**2 * np.eye(len(self.y)) + self.x @ covariance @ self.x.T
        error = self.y - self.x @ loc
        log_det = np.linalg.slogdet(2 * np.pi * spread)[1]
        return -0.5 * (log_det + error @ np.linalg.solve(spread, error))

    def reduced(self, kept, rest):
        """Log evidence of the model whose other weights are zero."""
        covariance, loc, drop = self.covariance, self.loc, ~kept
        if rest == "marginal":
            return self.log_evidence(loc * kept, covariance * np.outer(kept, kept))
        gain = covariance[:, drop] @ np.linalg.inv(covariance[np.ix_(drop, drop)])
        return self.log_evidence(loc - gain @ loc[drop], covariance - gain @ covariance[drop])

    @property
    def data(self):
        return torch.tensor(self.x), torch.tensor(self.y)

    def model(self):
        loc, covariance = torch.tensor(self.loc), torch.tensor(self.covariance)

        def model(x, y=None):
            w = pyro.sample("w", dist.MultivariateNormal(loc, covariance))
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

        return model

    def guide(self):
        mean, spread = torch.tensor(self.mean), torch.tensor((self.spread + self.spread.T) / 2)

        def guide(x, y=None):
            pyro.sample("w", dist.MultivariateNormal(mean, spread))

        return guide


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


RESTS = ["conditional", "marginal"]


def select(*dropped):
    def choose(scores):
        return {"w": torch.tensor([i not in dropped for i in range(SIZE)])}

    return choose


@pytest.mark.parametrize("kind", ["correlated", "g-prior"])
@pytest.mark.parametrize("rest", RESTS)
def test_delta_f_of_every_set_is_exact(kind, rest):
    problem = Regression(kind)
    full = problem.log_evidence(problem.loc, problem.covariance)
    for bits in range(1, 2**SIZE):
        drop = [i for i in range(SIZE) if bits >> i & 1]
        result = bmr.reduce(
            problem.guide(),
            torch.tensor(problem.x),
            model=problem.model(),
            select=select(*drop),
            reduced_prior=bmr.Spike(rest=rest),
        )
        kept = np.array([i not in drop for i in range(SIZE)])
        assert result.delta_f == pytest.approx(full - problem.reduced(kept, rest), abs=1e-8)


@pytest.mark.parametrize("rest", RESTS)
def test_the_model_is_the_program_that_was_scored(rest):
    # With an exact posterior, every draw of the free energy is minus the log evidence.
    problem = Regression("correlated")
    result = bmr.reduce(
        problem.guide(),
        *problem.data,
        model=problem.model(),
        select=select(1, 4),
        reduced_prior=bmr.Spike(rest=rest),
    )
    kept = np.array([True, False, True, True, False])
    loss = Trace_ELBO().loss(result.model, result.guide, *problem.data)
    assert loss == pytest.approx(-problem.reduced(kept, rest), abs=1e-6)
    assert result.realised == pytest.approx(result.delta_f, abs=1e-6)
    draws = Predictive(result.model, num_samples=5)(*problem.data)["w"].reshape(5, SIZE)
    assert (draws[:, [1, 4]] == 0).all()
    assert (draws[:, [0, 2, 3]] != 0).all()


@pytest.mark.parametrize("rest", RESTS)
def test_reductions_compose(rest):
    problem = Regression("correlated")
    spike = bmr.Spike(rest=rest)
    x = torch.tensor(problem.x)
    first = bmr.reduce(
        problem.guide(), x, model=problem.model(), select=select(1), reduced_prior=spike
    )
    second = bmr.reduce(first.guide, select=select(1, 3), reduced_prior=spike)
    both = bmr.reduce(
        problem.guide(), x, model=problem.model(), select=select(1, 3), reduced_prior=spike
    )
    assert first.delta_f + second.delta_f == pytest.approx(both.delta_f, abs=1e-8)
    torch.testing.assert_close(second.guide.median()["w"], both.guide.median()["w"])
    losses = [Trace_ELBO().loss(one.model, one.guide, *problem.data) for one in (second, both)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_was_pruned_keeps_its_meaning():
    problem = Regression("correlated")
    first = bmr.reduce(
        problem.guide(), torch.tensor(problem.x), model=problem.model(), select=select(1)
    )
    with pytest.raises(ValueError, match="pruned before with rest='conditional'"):
        bmr.reduce(first.guide, reduced_prior=bmr.Spike(rest="marginal"))


def test_files_and_copies_keep_the_meaning(tmp_path):
    problem = Regression("correlated")
    result = bmr.reduce(
        problem.guide(),
        *problem.data,
        model=problem.model(),
        select=select(0, 2),
        reduced_prior=bmr.Spike(rest="marginal"),
    )
    expected = Trace_ELBO().loss(result.model, result.guide, *problem.data)
    result.save(tmp_path / "one.bmr")
    loaded = bmr.load(tmp_path / "one.bmr", problem.model(), *problem.data)
    for one in (loaded, copy.deepcopy(result)):
        loss = Trace_ELBO().loss(one.model, one.guide, *problem.data)
        assert loss == pytest.approx(expected, abs=1e-6)
    again = bmr.reduce(loaded.guide, select=select(0, 2, 4))
    both = bmr.reduce(
        problem.guide(),
        *problem.data,
        model=problem.model(),
        select=select(0, 2, 4),
        reduced_prior=bmr.Spike(rest="marginal"),
    )
    assert result.delta_f + again.delta_f == pytest.approx(both.delta_f, abs=1e-8)


def trained(problem, family):
    start = init_to_value(values={"w": torch.tensor(problem.mean)})
    guide = family(problem.model(), init_loc_fn=start, init_scale=0.1)
    guide(*problem.data)
    return guide


def test_independent_posteriors_stay_independent():
    problem = Regression("correlated")
    guide = trained(problem, AutoNormal)
    result = bmr.reduce(guide, select=select(1, 2))
    loc, scale = torch.tensor(problem.mean), torch.full((SIZE,), 0.1)
    drop = torch.tensor([1, 2])
    prior = dist.MultivariateNormal(
        torch.tensor(problem.loc)[drop], torch.tensor(problem.covariance)[drop][:, drop]
    )
    zero = torch.zeros(2)
    exact = prior.log_prob(zero) - dist.Normal(loc, scale).log_prob(torch.zeros(SIZE))[drop].sum()
    assert result.delta_f == pytest.approx(exact.item(), abs=1e-8)
    assert [type(part).__name__ for part in result.guide.parts] == ["_IndependentPart"]
    kept = torch.tensor([0, 3, 4])
    torch.testing.assert_close(result.guide.median()["w"][kept], loc[kept])
    torch.testing.assert_close(
        result.guide.quantiles([0.975])["w"][0, kept], loc[kept] + 1.959964 * 0.1
    )


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("rest", RESTS)
def test_with_data_the_free_energy_does_not_rise(family, rest):
    problem = Regression("correlated")
    guide = trained(problem, family)
    bmr.fit(problem.model(), guide, *problem.data, num_epochs=300, lr=0.02)
    result = bmr.reduce(guide, *problem.data, reduced_prior=bmr.Spike(rest=rest))
    assert result.realised <= 3 * result.realised_error
    audit = result.audit(*problem.data, num_samples=50)
    assert audit.total.realised == pytest.approx(result.realised, abs=1.0)
    bmr.fit(result.model, result.guide, *problem.data, num_epochs=20, lr=0.01)
    dropped = ~result.masks["w"]
    assert (result.guide.median()["w"][dropped] == 0).all()


def test_rows_of_vectors():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), covariance))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("w", dist.Normal(torch.full((2,), 0.3), 0.4).to_event(1))

    mask = torch.tensor([[True, False], [False, False], [True, True]])
    result = bmr.reduce(guide, model=model, select=lambda _: {"w": mask})
    prior, zero = dist.MultivariateNormal(torch.zeros(2), covariance), torch.tensor(0.0)
    single = dist.Normal(0.3, 0.4).log_prob(zero)
    exact = dist.Normal(0.0, 1.0).log_prob(zero) + prior.log_prob(torch.zeros(2)) - 3 * single
    assert result.delta_f == pytest.approx(exact.item(), abs=1e-9)
    trace = pyro.poutine.trace(result.model).get_trace()
    assert trace.nodes["w"]["value"].shape == (3, 2)
    assert (trace.nodes["w"]["value"][~mask] == 0).all()
    trace.compute_log_prob()
    value = trace.nodes["w"]["value"]
    row = dist.Normal(0.0, 0.6).log_prob(value[0, 0])
    expected = torch.stack([row, zero, prior.log_prob(value[2])])
    torch.testing.assert_close(trace.nodes["w"]["log_prob"], expected)


def test_a_low_rank_prior():
    factor, diagonal = torch.tensor([[0.5], [1.0], [-0.3]]), torch.tensor([0.2, 0.3, 0.4])

    def model():
        prior = dist.LowRankMultivariateNormal(torch.zeros(3), factor, diagonal)
        pyro.sample("w", prior)

    def guide():
        pyro.sample("w", dist.Normal(torch.tensor([0.1, 1.0, 0.0]), 0.2).to_event(1))

    result = bmr.reduce(guide, model=model)
    covariance = factor @ factor.mT + diagonal.diag()
    drop = ~result.masks["w"]
    prior = dist.MultivariateNormal(torch.zeros(int(drop.sum())), covariance[drop][:, drop])
    own = dist.Normal(torch.tensor([0.1, 1.0, 0.0]), 0.2).log_prob(torch.zeros(3))[drop].sum()
    exact = prior.log_prob(torch.zeros(int(drop.sum()))) - own
    assert drop.tolist() == [True, False, True]
    assert result.delta_f == pytest.approx(exact.item(), abs=1e-9)


def test_what_cannot_be_reduced_is_refused_by_name():
    def tempered():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), scale * torch.eye(2)))

    guide = AutoNormal(tempered)
    guide()
    with pytest.warns(UserWarning, match="correlated, and depends on 'scale'"):
        bmr.reduce(guide)
    problem = Regression("correlated")
    with pytest.raises(ValueError, match="its prior is correlated, and Gaussian"):
        bmr.reduce(
            problem.guide(),
            torch.tensor(problem.x),
            model=problem.model(),
            sites=["w"],
            reduced_prior=bmr.Gaussian(0.0, 0.1),
        )
    with pytest.raises(ValueError, match="got rest='R pC R'"):
        bmr.Spike(rest="R pC R")


def test_presence_and_average_under_a_g_prior():
    problem = Regression("g-prior")
    sets = (np.arange(2**SIZE)[:, None] >> np.arange(SIZE) & 1).astype(bool)
    evidence = np.array([problem.reduced(~drop, "conditional") for drop in sets])
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    found = bmr.presence(problem.guide(), torch.tensor(problem.x), model=problem.model())
    expected = torch.tensor(weight @ ~sets)
    torch.testing.assert_close(found.probability["w"], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [3, SIZE])
def test_the_average_under_a_joint_prior_is_the_sum_over_all_subsets(rank):
    problem = Regression("correlated", seed=rank)
    root = np.random.default_rng(2).normal(size=(SIZE, rank))
    prior = root @ root.T + (rank == SIZE) * 0.3 * np.eye(SIZE)
    mixed = problem.x @ prior
    gain = np.linalg.solve(mixed @ problem.x.T + NOISE**2 * np.eye(30), mixed).T
    posterior = bmr.Posterior({"w": gain @ problem.y}, prior - gain @ mixed, prior_covariance=prior)
    evidence, means, squares, sets = [], [], [], []
    for bits in range(2**SIZE):
        drop = np.array([bits >> i & 1 for i in range(SIZE)], bool)
        inner = np.linalg.pinv(prior[np.ix_(drop, drop)], rcond=1e-9, hermitian=True)
        left = prior - prior[:, drop] @ inner @ prior[drop]
        across = problem.x @ left
        whole = across @ problem.x.T + NOISE**2 * np.eye(30)
        evidence.append(
            -0.5 * (np.linalg.slogdet(whole)[1] + problem.y @ np.linalg.solve(whole, problem.y))
        )
        own = np.linalg.solve(whole, across).T
        means.append(own @ problem.y)
        squares.append(left - own @ across + np.outer(means[-1], means[-1]))
        sets.append(~drop)
    weight = np.exp(np.array(evidence) - max(evidence))
    weight /= weight.sum()
    mean = weight @ np.array(means)
    covariance = np.tensordot(weight, np.array(squares), 1) - np.outer(mean, mean)
    found = bmr.average(posterior)
    close = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(found.mean["w"], torch.tensor(mean), **close)
    torch.testing.assert_close(found.covariance["w"], torch.tensor(covariance), **close)
    torch.testing.assert_close(found.presence["w"], torch.tensor(weight @ np.array(sets)), **close)
    draws = found.draw(4000, seed=0)["w"]
    torch.testing.assert_close(draws.mean(0), torch.tensor(mean), rtol=0, atol=0.1)


@pytest.mark.parametrize("elbo", [bmr.MomentsELBO, bmr.LocalELBO])
def test_the_divergence_of_a_pruned_prior_is_closed(elbo):
    problem = Regression("correlated")
    guide = trained(problem, AutoNormal)
    result = bmr.reduce(guide, select=select(0, 3))
    kept = np.array([False, True, True, False, True])
    gain = problem.covariance[np.ix_(kept, ~kept)] @ np.linalg.inv(
        problem.covariance[np.ix_(~kept, ~kept)]
    )
    covariance = problem.covariance[np.ix_(kept, kept)]
    covariance = covariance - gain @ problem.covariance[np.ix_(~kept, kept)]
    loc = problem.loc[kept] - gain @ problem.loc[~kept]
    part = result.guide.parts[0].factor()
    mean, scale = (t.numpy()[kept] for t in (part.locations()["w"], part.stored.scale))
    inverse, error = np.linalg.inv(covariance), loc - mean
    divergence = 0.5 * (np.trace(inverse @ np.diag(scale**2)) + error @ inverse @ error - 3)
    divergence += 0.5 * (np.linalg.slogdet(covariance)[1] - 2 * np.log(scale).sum())
    x, y = problem.x[:, kept], problem.y
    fit = ((y - x @ mean) ** 2 + (x**2) @ scale**2).sum() / (2 * NOISE**2)
    fit += len(y) * 0.5 * np.log(2 * np.pi * NOISE**2)
    if elbo is bmr.MomentsELBO:
        loss = elbo().loss(result.model, result.guide, *problem.data)
        assert loss == pytest.approx(divergence + fit, rel=1e-5)
    else:
        losses = [elbo().loss(result.model, result.guide, *problem.data) for _ in range(200)]
        assert np.mean(losses) == pytest.approx(divergence + fit, abs=5 * np.std(losses) / 14)
