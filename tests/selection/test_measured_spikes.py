"""Spikes elsewhere than at zero, measured with the data, against F as a formula."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from often import often
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

import pyro_bmr as bmr

KEPT = torch.tensor([False, True, False])
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, 1.0, 0.0])
NOISE = 0.5


def in_a_vector(x, y):
    w = pyro.sample("w", dist.Normal(0.3, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def in_a_plate(x, y):
    with pyro.plate("inputs", 3):
        w = pyro.sample("w", dist.Normal(0.3, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def make_guide(model, *args):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    guide(*args)
    guide.locs.w.data.copy_(torch.tensor([0.8, 1.1, 0.2]))
    guide.scales.w = torch.tensor([0.1, 0.12, 0.15])
    return guide


def free_energy(loc, scale, kept):
    r"""F = Σ [(y - x μ)² + x² σ²] / 2 s² + N ln(2π s²) / 2 + KL(q ‖ p) of what is kept."""
    error = (Y - X @ loc).square() + X.square() @ scale.square()
    accuracy = -0.5 * (error / NOISE**2 + torch.log(torch.tensor(2 * torch.pi * NOISE**2))).sum()
    divergence = kl_divergence(dist.Normal(loc[kept], scale[kept]), dist.Normal(0.3, 1.0))
    return float(divergence.sum() - accuracy)


def keep(scores):
    return {name: KEPT for name in scores.kept}


@pytest.mark.parametrize("model", [in_a_vector, in_a_plate])
@pytest.mark.parametrize("loc", [1.0, torch.tensor([1.0, 5.0, 0.0]), "prior", 0.0])
def test_measured_changes_are_those_of_the_formula(model, loc):
    guide = make_guide(model, X, Y)
    result = bmr.reduce(guide, X, Y, reduced_prior=bmr.Spike(loc=loc), select=keep)
    posterior = guide.locs.w.detach(), guide.scales.w.detach()
    full = free_energy(*posterior, torch.tensor([True] * 3))
    at = torch.as_tensor(0.3 if isinstance(loc, str) else loc)
    left = torch.where(KEPT, posterior[0], at), torch.where(KEPT, posterior[1], 0)
    reduced = free_energy(*left, KEPT)
    mean, error = bmr.free_energy(result.model, result.guide, X, Y, num_samples=100)
    assert mean == pytest.approx(reduced, abs=4 * error + 1e-4)
    assert error < 1.0
    assert result.realised == pytest.approx(reduced - full, abs=4 * result.realised_error)
    audit = result.audit(X, Y, progress=False)
    assert audit.total.realised == pytest.approx(reduced - full, abs=4 * audit.total.error)


def test_of_positive_sites():
    def model(x, y):
        w = pyro.sample("w", dist.LogNormal(0.2, 0.5).expand([3]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    guide = make_guide(model, X, Y)
    result = bmr.reduce(guide, X, Y, reduced_prior=bmr.Spike(loc=1.0), sites=["w"], select=keep)
    draws = Predictive(result.guide, num_samples=10)(X, Y)["w"]
    assert (draws[:, ~KEPT] == 1).all()
    mean, error = bmr.free_energy(result.model, result.guide, X, Y, num_samples=200)
    draws = torch.tensor([Trace_ELBO().loss(result.model, result.guide, X, Y) for _ in range(200)])
    assert mean == pytest.approx(draws.mean().item(), abs=4 * (error + draws.std().item() / 14))


def test_steps_of_a_centered_guide_go_on_from_its_values():
    """Statements of the guide are in the coordinates of the model's prior."""
    guide = make_guide(in_a_vector, X, Y)
    result = bmr.reduce(guide, X, Y, reduced_prior=bmr.Spike(loc=1.0), select=keep)
    trace = pyro.poutine.trace(result.guide).get_trace(X, Y)
    unconstrained = trace.nodes["w_unconstrained"]["value"]
    torch.testing.assert_close(unconstrained, trace.nodes["w"]["value"])
    trace.compute_log_prob()
    expected = dist.Normal(guide.locs.w, guide.scales.w).log_prob(unconstrained)[KEPT].sum()
    assert float(trace.nodes["w_unconstrained"]["log_prob_sum"]) == pytest.approx(expected.item())


@pytest.mark.parametrize("size", often([1, 2, 6], 2))
@pytest.mark.parametrize("elsewhere", ["prior", "numbers"])
def test_in_a_plate_of_which_a_run_sees_a_part(size, elsewhere):
    means = torch.linspace(-2.0, 3.0, 6)
    y = means[:, None] + 0.3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def model(y):
        with pyro.plate("groups", 6, subsample_size=size) as index:
            w = pyro.sample("w", dist.Normal(means[index], 1.0))
            with pyro.plate("columns", 5, dim=-2):
                pyro.sample("y", dist.Normal(w, 0.3), obs=y[index].T)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    guide(y)
    guide.locs.w.data.copy_(y.mean(1))
    guide.scales.w = torch.full((6,), 0.2)
    posterior = dist.Normal(guide.locs.w.detach(), guide.scales.w.detach())
    loc = "prior" if elsewhere == "prior" else means
    options = {"reduced_prior": bmr.Spike(loc=loc)}
    predicted = bmr.reduce(guide, **options)
    scores = dist.Normal(means, 1.0).log_prob(means) - posterior.log_prob(means)
    torch.testing.assert_close(predicted.scores["w"], scores, rtol=1e-4, atol=1e-4)
    result = bmr.reduce(guide, y, select=lambda s: {"w": torch.zeros(6).bool()}, **options)
    spread = posterior.variance.sum() * 5 / (2 * 0.3**2)
    accuracy = dist.Normal(posterior.mean[:, None], 0.3).log_prob(y).sum() - spread
    full = kl_divergence(posterior, dist.Normal(means, 1.0)).sum() - accuracy
    change = -dist.Normal(means[:, None], 0.3).log_prob(y).sum() - full
    audit = result.audit(y, num_samples=300, progress=False)
    assert audit.total.realised == pytest.approx(float(change), abs=4 * audit.total.error)


def test_a_mean_that_is_computed_in_a_part_of_the_rows_is_refused():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 6, subsample_size=2):
            pyro.sample("w", dist.Normal(mu, 1.0))

    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    with pytest.raises(ValueError, match=r"computed from \['mu'\], and known only in some rows"):
        bmr.reduce(guide, reduced_prior={"w": bmr.Spike(loc="prior")})


def test_a_transform_that_is_not_of_the_support_has_no_spike_elsewhere():
    affine = dist.transforms.AffineTransform(3.0, 2.0)

    class Shifted(dist.TransformedDistribution):
        def __init__(self):
            super().__init__(dist.Normal(0.0, 1.0), [affine])

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Shifted, _instance))

    @bmr.extend.log_density_at_zero.register
    def _(prior: Shifted):
        return prior.log_prob(torch.tensor(0.0))

    def model():
        pyro.sample("w", Shifted())

    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    assert bmr.reduce(guide, select=lambda s: s.kept).scores
    with pytest.raises(ValueError, match="its prior is a Shifted, which only"):
        bmr.reduce(guide, reduced_prior={"w": bmr.Spike(loc=1.0)})
