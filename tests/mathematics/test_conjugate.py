"""Conjugate reductions against quadrature, conjugate updates and moments known in closed form."""

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import dblquad, quad

import pyro_bmr as bmr


def tensors(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def gamma(concentration, rate):
    return dist.Gamma(*tensors(concentration, rate))


def beta(a, b):
    return dist.Beta(*tensors(a, b))


def scipy_gamma(concentration, rate):
    return stats.gamma(concentration, scale=1 / rate)


TRIPLES = {
    "gamma, sharper": ("gamma", (6.0, 3.0), (2.0, 1.0), (8.0, 5.0)),
    "gamma, wider": ("gamma", (6.0, 3.0), (2.0, 1.0), (1.1, 0.3)),
    "gamma, half": ("gamma", (0.7, 0.4), (0.5, 0.2), (0.4, 0.3)),
    "beta, sharper": ("beta", (4.0, 9.0), (1.0, 1.0), (5.0, 5.0)),
    "beta, skewed": ("beta", (2.5, 3.5), (1.5, 2.0), (0.8, 3.0)),
    "normal, shrunk": ("normal", (0.7, 0.4), (0.1, 1.2), (0.0, 0.3)),
    "normal, wider": ("normal", (0.7, 0.4), (0.1, 1.2), (0.4, 2.0)),
}
TORCH = {"gamma": gamma, "beta": beta, "normal": lambda m, s: dist.Normal(*tensors(m, s))}
SCIPY = {"gamma": scipy_gamma, "beta": stats.beta, "normal": stats.norm}


@pytest.mark.parametrize(("kind", "q", "p", "r"), TRIPLES.values(), ids=TRIPLES)
def test_evidence_and_posterior_are_quadrature(kind, q, p, r):
    a, b, c = (SCIPY[kind](*parameters) for parameters in (q, p, r))

    def reduced(t):
        return math.exp(a.logpdf(t) + c.logpdf(t) - b.logpdf(t))

    ends = {"gamma": (0, 60), "beta": (0, 1), "normal": (-6, 6)}[kind]
    moments = [
        quad(lambda t, k=k: t**k * reduced(t), *ends, epsabs=0, epsrel=1e-10, limit=500)[0]
        for k in range(3)
    ]
    three = [TORCH[kind](*parameters) for parameters in (q, p, r)]
    assert bmr.delta_f(*three).item() == pytest.approx(-math.log(moments[0]), abs=1e-7)
    after = bmr.reduced_posterior(*three)
    assert type(after) is type(three[0])
    mean = moments[1] / moments[0]
    assert after.mean.item() == pytest.approx(mean, rel=1e-7)
    assert after.variance.item() == pytest.approx(moments[2] / moments[0] - mean**2, rel=1e-6)


def test_dirichlet_evidence_and_posterior_are_quadrature():
    parameters = (4.0, 2.5, 3.0), (1.0, 1.5, 1.2), (2.0, 1.0, 3.0)
    a, b, c = (stats.dirichlet(parameters_) for parameters_ in parameters)

    def reduced(y, x):
        t = [x, y, max(1 - x - y, 1e-300)]
        return math.exp(a.logpdf(t) + c.logpdf(t) - b.logpdf(t))

    corner = (0, 1, 0, lambda x: 1 - x)
    mass = dblquad(reduced, *corner, epsabs=1e-9)[0]
    three = [dist.Dirichlet(*tensors(parameters_)) for parameters_ in parameters]
    assert bmr.delta_f(*three).item() == pytest.approx(-math.log(mass), abs=1e-6)
    mean = dblquad(lambda y, x: x * reduced(y, x), *corner, epsabs=1e-9)[0] / mass
    assert bmr.reduced_posterior(*three).mean[0].item() == pytest.approx(mean, rel=1e-6)


def test_a_table_of_dirichlets_gives_the_exact_evidence_of_each_row():
    """Categorical counts: the log evidence under either prior is the Dirichlet-multinomial."""
    counts = torch.randint(0, 20, (4, 5)).double()
    p, r = torch.full((4, 5), 1.0).double(), torch.rand(4, 5).double() + 0.05

    def log_evidence(concentration):
        marginal = dist.DirichletMultinomial(concentration, counts.sum(-1), is_sparse=False)
        return marginal.log_prob(counts)

    rows = bmr.delta_f(dist.Dirichlet(p + counts), dist.Dirichlet(p), dist.Dirichlet(r))
    assert rows.shape == (4,)
    torch.testing.assert_close(rows, log_evidence(p) - log_evidence(r))
    table = [dist.Dirichlet(t).to_event(1) for t in (p + counts, p, r)]
    torch.testing.assert_close(bmr.delta_f(*table), rows.sum())
    after = bmr.reduced_posterior(*table)
    torch.testing.assert_close(after.base_dist.concentration, r + counts)
    assert after.event_shape == (4, 5)


def test_counts_and_waiting_times_give_exact_evidences():
    """Beta with binomial and Gamma with Poisson data: the evidence is known in closed form."""
    n, k = tensors(12.0, 3.0)
    p, r = beta(1.0, 1.0), beta(2.0, 9.0)
    exact = [dist.BetaBinomial(f.concentration1, f.concentration0, n).log_prob(k) for f in (p, r)]
    value = bmr.delta_f(beta(1.0 + 3.0, 1.0 + 9.0), p, r)
    torch.testing.assert_close(value, exact[0] - exact[1])

    p, r = gamma(2.0, 1.5), gamma(7.0, 1.0)
    exact = [dist.GammaPoisson(f.concentration, f.rate).log_prob(k) for f in (p, r)]
    torch.testing.assert_close(bmr.delta_f(gamma(5.0, 2.5), p, r), exact[0] - exact[1])


positive = st.floats(0.05, 50)


@settings(deadline=None)
@given(st.lists(positive, min_size=4, max_size=4))
def test_the_prior_itself_changes_nothing(values):
    a, b, c, d = values
    for make in (gamma, beta, lambda *v: dist.Dirichlet(torch.tensor(v).double())):
        q, p = make(a, b), make(c, d)
        assert bmr.delta_f(q, p, p).item() == 0
        assert bmr.reduced_posterior(q, p, p).mean.equal(q.mean)


@settings(deadline=None)
@given(st.lists(positive, min_size=8, max_size=8))
def test_reductions_chain(values):
    data, *priors = [values[i : i + 2] for i in range(0, 8, 2)]
    for make in (gamma, beta):
        p, r, t = (make(*v) for v in priors)
        q = make(priors[0][0] + data[0], priors[0][1] + data[1])
        between = bmr.reduced_posterior(q, p, r)
        total = bmr.delta_f(q, p, r) + bmr.delta_f(between, r, t)
        torch.testing.assert_close(total, bmr.delta_f(q, p, t), rtol=1e-9, atol=1e-9)


def test_batches_broadcast_and_keep_their_dtype():
    q = dist.Gamma(torch.tensor([3.0, 5.0, 9.0]), torch.tensor([[1.0], [2.0]]))
    p, r = dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 3.0)
    value = bmr.delta_f(q, p, r)
    assert value.shape == (2, 3)
    assert value.dtype == torch.float32
    one = bmr.delta_f(gamma(9.0, 2.0), gamma(1.0, 1.0), gamma(2.0, 3.0))
    assert value[1, 2].item() == pytest.approx(one.item(), rel=1e-6)
    assert bmr.reduced_posterior(q, p, r).rate.shape == (2, 3)


def test_gaussians_have_a_reduced_posterior_too():
    """Diagonal, Dense and Normal against the exact posterior under the reduced prior."""
    x = torch.randn(20, 3).double()
    y = torch.randn(20).double()

    def posterior(loc, scale):
        precision = x.mT @ x + torch.eye(3).double() / scale**2
        covariance = precision.inverse()
        linear = x.mT @ y + torch.full((3,), loc / scale**2).double()
        return bmr.Dense(covariance @ linear, torch.linalg.cholesky(covariance))

    def prior(loc, scale):
        return bmr.Dense(torch.full((3,), loc).double(), scale * torch.eye(3).double())

    after = bmr.reduced_posterior(posterior(0.2, 1.5), prior(0.2, 1.5), prior(-0.1, 0.2))
    exact = posterior(-0.1, 0.2)
    torch.testing.assert_close(after.loc, exact.loc)
    torch.testing.assert_close(after.scale_tril, exact.scale_tril)

    point = bmr.Diagonal(*tensors([0.0], [0.0]))
    q, p = bmr.Diagonal(*tensors([0.4], [0.5])), bmr.Diagonal(*tensors([0.0], [1.0]))
    spiked = bmr.reduced_posterior(q, p, point)
    assert spiked.loc.item() == spiked.scale.item() == 0


@pytest.mark.parametrize(
    "three",
    [
        (gamma(1.5, 3.0), gamma(2.0, 1.0), gamma(0.2, 2.0)),
        (gamma(5.0, 0.5), gamma(2.0, 1.0), gamma(2.0, 0.2)),
        (beta(1.2, 3.0), beta(2.0, 1.0), beta(0.5, 1.0)),
        (dist.Dirichlet(torch.tensor([1.0, 2.0])),)
        + (dist.Dirichlet(torch.tensor([2.0, 1.0])), dist.Dirichlet(torch.tensor([0.5, 1.0]))),
        (dist.Normal(0.0, 1.5), dist.Normal(0.0, 1.0), dist.Normal(0.0, 10.0)),
    ],
)
@pytest.mark.parametrize("function", [bmr.delta_f, bmr.reduced_posterior])
def test_an_improper_reduced_posterior_is_an_error(function, three):
    with pytest.raises(ValueError, match="leaves 1 of 1 posteriors improper"):
        function(*three)


@pytest.mark.parametrize("function", [bmr.delta_f, bmr.reduced_posterior])
def test_what_does_not_go_together_is_an_error(function):
    with pytest.raises(ValueError, match="Gamma posterior, Beta prior.*one family and one shape"):
        function(gamma(1.0, 1.0), beta(1.0, 1.0), gamma(1.0, 1.0))
    with pytest.raises(ValueError, match="one family and one shape"):
        function(*(dist.Gamma(torch.ones(n), 1.0) for n in (2, 3, 2)))
    with pytest.raises(ValueError, match="one family and one shape"):
        function(*(dist.Dirichlet(torch.ones(n)) for n in (2, 3, 2)))
    with pytest.raises(TypeError, match="got a Poisson. Expected one of Diagonal"):
        function(*[dist.Poisson(1.0)] * 3)
