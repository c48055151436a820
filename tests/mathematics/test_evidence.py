"""ΔF against quadrature, and its algebra against hypothesis."""

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from pyro_bmr.mathematics.evidence import delta_f, delta_f_spike, delta_f_spike_chain, total_dropped
from pyro_bmr.mathematics.gaussian import Dense, Diagonal
from pyro_bmr.priors.families import log_density_at_zero

locs = st.floats(-5, 5)
scales = st.floats(0.05, 3)


def diagonal(loc, scale):
    return Diagonal(*torch.tensor([loc, scale], dtype=torch.float64).reshape(2, 1))


def by_quadrature(q, log_prior, r):
    """ΔF = −ln ∫ q r / p, for a narrow r."""
    q, r = dist.Normal(*q), dist.Normal(*r)
    center, width = r.mean.item(), r.stddev.item()

    def integrand(t):
        t = torch.tensor(t, dtype=torch.float64)
        return (q.log_prob(t) + r.log_prob(t) - log_prior(t)).exp().item()

    value, _ = quad(
        integrand, center - 15 * width, center + 15 * width, epsabs=0, limit=500, points=[center]
    )
    return -math.log(value)


PRIORS = {
    "Normal": dist.Normal(torch.tensor(0.3).double(), 1.2),
    "Laplace": dist.Laplace(torch.tensor(0.1).double(), 0.8),
    "StudentT": dist.StudentT(torch.tensor(3.0).double(), -0.2, 1.5),
    "Cauchy": dist.Cauchy(torch.tensor(0.0).double(), 2.0),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("posterior", [(0.2, 0.5), (-1.0, 0.7), (0.0, 1.4), (2.0, 0.3)])
def test_spike_is_the_limit_of_quadrature(prior, posterior):
    q = tuple(torch.tensor(v, dtype=torch.float64) for v in posterior)
    exact = delta_f_spike(Diagonal(*q), log_density_at_zero(prior)).item()
    narrow = torch.tensor(1e-4, dtype=torch.float64)
    assert exact == pytest.approx(by_quadrature(q, prior.log_prob, (0 * narrow, narrow)), abs=5e-4)


@pytest.mark.parametrize("posterior", [(0.2, 0.5), (-1.0, 0.7), (2.0, 0.3)])
@pytest.mark.parametrize("reduced", [(0.0, 0.1), (0.5, 0.6), (-0.3, 1.0)])
def test_gaussian_delta_f_is_quadrature(posterior, reduced):
    prior = (0.3, 1.2)
    exact = delta_f(*(diagonal(*g) for g in (posterior, prior, reduced))).item()
    q, p, r = (
        tuple(torch.tensor(v, dtype=torch.float64) for v in g) for g in (posterior, prior, reduced)
    )
    assert exact == pytest.approx(by_quadrature(q, dist.Normal(*p).log_prob, r), abs=1e-6)


@given(locs, scales, locs, scales, locs, st.floats(0.01, 0.99))
def test_diagonal_equals_the_difference_of_log_partitions(m, s, m0, s0, mr, fraction):
    q, p, r = diagonal(m, min(s, s0)), diagonal(m0, s0), diagonal(mr, s0 * fraction)
    a, b, c = q.natural(), p.natural(), r.natural()
    expected = a.log_partition() + c.log_partition() - b.log_partition()
    expected = expected - (a + c - b).log_partition()
    torch.testing.assert_close(delta_f(q, p, r), expected, rtol=1e-6, atol=1e-6)


@given(locs, scales, locs, scales)
def test_the_prior_itself_changes_nothing(m, s, m0, s0):
    q, p = diagonal(m, s), diagonal(m0, s0)
    assert delta_f(q, p, p).abs().item() < 1e-9


@given(locs, st.floats(0.05, 0.9), locs, st.floats(0.01, 0.8), locs, st.floats(0.01, 0.8))
def test_reductions_chain(m, s, m1, f1, m2, f2):
    """p → r → s is p → s."""
    q, p = diagonal(m, s), diagonal(0.0, 1.0)
    r, t = diagonal(m1, f1), diagonal(m2, f1 * f2)
    natural = q.natural() + r.natural() - p.natural()
    scale = natural.precision.rsqrt()
    between = Diagonal(natural.linear * scale.square(), scale)
    torch.testing.assert_close(
        delta_f(q, p, r) + delta_f(between, r, t), delta_f(q, p, t), rtol=1e-8, atol=1e-8
    )


@given(locs, scales, locs, scales)
def test_the_general_formula_converges_to_the_spike(m, s, m0, s0):
    q, p = diagonal(m, s), diagonal(m0, s0)
    log_prior = log_density_at_zero(dist.Normal(p.loc, p.scale))
    spike = delta_f_spike(q, log_prior)
    torch.testing.assert_close(delta_f(q, p, diagonal(0.0, 0.0)), spike)
    # The distance is of first order in the reduced variance, with a constant of this size.
    size = 1 + (abs(m) / s**2 + abs(m0) / s0**2) ** 2 + s**-2 + s0**-2
    for k in (4, 5, 6):
        distance = delta_f(q, p, diagonal(0.0, 10.0**-k)) - spike
        assert distance.abs().item() <= size * 10.0 ** (-2 * k) + 1e-12 * size


def random_dense(n):
    tril = torch.randn(n, n, dtype=torch.float64).tril() * 0.2
    tril.diagonal().abs_().add_(0.3)
    return Dense(torch.randn(n, dtype=torch.float64), tril)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_dense_with_a_diagonal_covariance_is_diagonal(n, seed):
    torch.manual_seed(seed)
    triple = [
        Diagonal(torch.randn(n).double(), scale * (1 + torch.rand(n).double()))
        for scale in (0.2, 1.0, 0.4)
    ]
    dense = [Dense(g.loc, g.scale.diag()) for g in triple]
    torch.testing.assert_close(delta_f(*dense), delta_f(*triple).sum())

    log_prior = log_density_at_zero(dist.Normal(triple[1].loc, triple[1].scale))
    chain = delta_f_spike_chain(dense[0], log_prior)
    torch.testing.assert_close(chain, delta_f_spike(triple[0], log_prior))


def test_dense_delta_f_is_monte_carlo():
    q, p = random_dense(3), Dense(torch.zeros(3).double(), 2 * torch.eye(3).double())
    r = Dense(torch.full((3,), 0.1).double(), torch.eye(3).double())
    as_dist = [dist.MultivariateNormal(g.loc, scale_tril=g.scale_tril) for g in (q, p, r)]
    draws = as_dist[0].sample((400_000,))
    ratios = (as_dist[2].log_prob(draws) - as_dist[1].log_prob(draws)).exp()
    error = float(ratios.std() / ratios.mean() / len(draws) ** 0.5)
    assert delta_f(q, p, r).item() == pytest.approx(-ratios.mean().log().item(), abs=4 * error)


def test_dense_spikes_are_the_limit_of_dense_delta_f():
    q, n = random_dense(4), 4
    p = Dense(torch.zeros(n).double(), torch.eye(n).double())
    r = Dense(torch.zeros(n).double(), 1e-6 * torch.eye(n).double())
    log_prior = torch.full((n,), -0.5 * math.log(2 * math.pi), dtype=torch.float64)
    torch.testing.assert_close(
        delta_f_spike_chain(q, log_prior).sum(), delta_f(q, p, r), rtol=1e-7, atol=1e-7
    )


@settings(deadline=None)
@given(
    st.floats(-8, 3),
    st.floats(-1e4, 1e4),
    st.floats(-8, 3),
    st.floats(-1e4, 1e4, allow_subnormal=False),
)
def test_float32_is_scored_like_float64(log_scale, loc, log_prior_scale, prior_loc):
    single = [
        Diagonal(
            torch.tensor([m], dtype=torch.float32), torch.tensor([10.0**s], dtype=torch.float32)
        )
        for m, s in ((loc, log_scale), (prior_loc, log_prior_scale))
    ]
    q, p = (Diagonal(g.loc.double(), g.scale.double()) for g in single)
    z, z0 = q.loc / q.scale, p.loc / p.scale
    expected = (q.scale / p.scale).log() + (z - z0) * (z + z0) / 2
    log_prior = log_density_at_zero(dist.Normal(single[1].loc, single[1].scale))
    score = delta_f_spike(single[0], log_prior)
    assert score.dtype == torch.float32
    # Where two terms of 1e20 cancel, ΔF itself is known no better than float64 allows.
    floor = 1e-14 * float(z.square() + z0.square() + 1)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=floor)

    spike = Diagonal(torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(delta_f(*single, spike).double(), expected, rtol=1e-5, atol=floor)


@pytest.mark.rare
def test_a_sum_over_100_million_float32_scores_keeps_six_digits():
    n = 100_000_000
    scores = torch.full((n,), -0.1)
    expected = n * scores[0].double().item()
    nothing = torch.zeros(1, dtype=torch.bool).expand(n)
    assert total_dropped(scores, nothing) == pytest.approx(expected, rel=1e-7)
    mask = torch.ones(n, dtype=torch.bool)
    mask[::3] = False
    count = n - int(mask.count_nonzero())
    assert total_dropped(scores, mask) == pytest.approx(expected * count / n, rel=1e-7)


@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (3, 0), (2, 3), (70_000,), (3, 40_000), (300, 300)]
)
@pytest.mark.parametrize("prior_shape", ["scalar", "full", "rows"])
def test_scores_do_not_depend_on_how_they_are_chunked(shape, prior_shape):
    loc, scale = torch.randn(shape), torch.rand(shape) + 0.1
    log_prior = {
        "scalar": torch.tensor(-1.0),
        "full": torch.randn(shape),
        "rows": torch.randn(shape[:1] + (1,) * len(shape[1:])),
    }[prior_shape]
    normal = dist.Normal(loc.double(), scale.double())
    expected = log_prior.double() - normal.log_prob(torch.zeros(()).double())
    scores = delta_f_spike(Diagonal(loc, scale), log_prior)
    assert scores.shape == shape
    torch.testing.assert_close(scores, expected.float())
    mask = torch.rand(shape) < 0.5
    expected = scores[~mask].double().sum().item()
    assert total_dropped(scores, mask) == pytest.approx(expected, rel=1e-6)
    transformed = delta_f_spike(Diagonal(loc, scale.log()), log_prior, torch.exp)
    torch.testing.assert_close(transformed, scores)


def test_an_improper_reduced_posterior_is_an_error():
    q, p, wide = diagonal(0.0, 1.5), diagonal(0.0, 1.0), diagonal(0.0, 10.0)
    with pytest.raises(ValueError, match="leaves 1 of 1 posteriors improper"):
        delta_f(q, p, wide)
    dense = [Dense(g.loc, g.scale[None]) for g in (q, p, wide)]
    with pytest.raises(ValueError, match="Expected a reduced prior at most as wide"):
        delta_f(*dense)


def test_gaussians_that_do_not_go_together_are_an_error():
    q, p = diagonal(0.0, 1.0), Diagonal(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="one family and one shape"):
        delta_f(q, p, p)
    flat = Dense(torch.zeros(2), torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="delta_f_spike_chain scores point masses"):
        delta_f(flat, flat, flat)
    with pytest.raises(ValueError, match="Dense prior"):
        delta_f(q, Dense(torch.zeros(1), torch.eye(1)), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_leaves_its_input_alone(dtype):
    q = Diagonal(torch.randn(9, dtype=dtype), torch.rand(9, dtype=dtype) + 0.1)
    before = Diagonal(q.loc.clone(), q.scale.clone())
    delta_f_spike(q, torch.tensor(-1.0, dtype=dtype))
    assert torch.equal(q.loc, before.loc)
    assert torch.equal(q.scale, before.scale)
