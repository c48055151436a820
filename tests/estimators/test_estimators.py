"""The three estimators against each other, against algebra, and in Pyro's own SVI."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.demo import Regression
from pyro_bmr.estimators.elbos import UnbiasedELBO
from pyro_bmr.estimators.gaussian_tensor import UnknownOperationError, gaussian
from pyro_bmr.training import fitting
from pyro_bmr.training.compilation import trace_gradient

ESTIMATORS = [bmr.GlobalELBO, bmr.LocalELBO, bmr.MomentsELBO]
NOISE = {
    "precision": (dist.Gamma(2.0, 1.0), lambda v: v.rsqrt()),
    "variance": (dist.LogNormal(0.0, 1.0), lambda v: v.sqrt()),
    "scale": (dist.LogNormal(0.0, 1.0), lambda v: v),
}


def make_linear(noise, columns=3):
    prior, scale = NOISE[noise]

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([columns]).to_event(1))
        level = pyro.sample("level", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale(level)), obs=y)

    return model


@pytest.fixture
def data():
    x = torch.randn(30, 3)
    return x, x[:, 0] + 0.5 * torch.randn(30)


@pytest.fixture(scope="module")
def network():
    """A 13-50-1 network half way through its training, and a batch of its data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.randn(256, 13)
    y = x[:, 0] * x[:, 1].relu() + 0.3 * torch.randn(256)
    model = Regression(13)
    guide = bmr.mean_field(model, gamma=["precision"], init_loc_fn=lambda s: near_zero(s))
    bmr.fit(
        model, guide, x, y, num_epochs=60, batch_size=64, lr=0.02, estimator="local", compile=False
    )
    return model, guide, x[:64], y[:64]


def near_zero(site):
    mean = init_to_mean(site)
    return mean if site["name"] == "precision" else mean + 0.1 * torch.randn_like(mean)


def trace(elbo, model, guide, *args):
    """F with its gradients as a graph, and its arguments, of which the noise shall be replaced."""
    with poutine.trace(param_only=True) as capture:
        elbo.differentiable_loss(model, guide, *args)
    parameters = [node["value"].unconstrained() for node in capture.trace.nodes.values()]
    gradient = trace_gradient(
        lambda *batch: elbo.differentiable_loss(model, guide, *batch), parameters, args
    )
    values = [p.detach() for p in parameters]
    inputs = [*values, torch.empty(gradient.noise_size), *gradient.constants, *args]
    return gradient, inputs, len(values)


def draws(elbo, model, guide, *args, count):
    """Many draws of F with their gradients."""
    gradient, inputs, noise_at = trace(elbo, model, guide, *args)

    def run(noise):
        parts = gradient.graph(*inputs[:noise_at], noise, *inputs[noise_at + 1 :])
        return torch.cat([part.reshape(-1) for part in parts])

    noise = torch.randn(count, gradient.noise_size)
    return torch.vmap(run, chunk_size=200, randomness="different")(noise).double()


def pyros_loss(model, guide, *args):
    """What `Trace_ELBO` computes, as a tensor."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def many(loss, *args, count=4000):
    """Many draws of F at once; the first sets up what an estimator plans and a guide creates."""

    def standard_normal(shape, dtype, device):
        return torch.randn(shape, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        first = loss(*args)
        # In the place of torch.empty().normal_(), which vmap does not take.
        for family in (torch.distributions.normal, torch.distributions.multivariate_normal):
            patch.setattr(family, "_standard_normal", standard_normal)
        with pyro.validation_enabled(False):
            run = torch.vmap(lambda _: loss(*args), randomness="different", chunk_size=500)
            rest = run(torch.zeros(count - 1))
    return torch.cat([first.reshape(1), rest])


@pytest.fixture(scope="module")
def local_draws(network):
    return draws(bmr.LocalELBO(), *network, count=40_000)


@pytest.mark.rare
def test_global_and_local_have_the_same_expectation(network, local_draws):
    """Within three standard errors of 10,000 draws or more: F, and almost all of its gradients."""
    first, second = draws(bmr.GlobalELBO(), *network, count=10_000), local_draws
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    z = (first.mean(0) - second.mean(0)) / error.clamp(min=1e-12)
    assert z[0].abs() < 3
    gradients = z[1:][error[1:] > 1e-9]
    assert len(gradients) > 700
    assert (gradients.abs() < 3).double().mean() > 0.98
    assert second.var(0)[1:].mean() < first.var(0)[1:].mean()


def test_moments_of_a_trained_network_are_within_one_percent(network, local_draws):
    exact = local_draws.mean(0)
    (approximate,) = draws(bmr.MomentsELBO(), *network, count=1)
    assert approximate[0].item() == pytest.approx(exact[0].item(), rel=0.01)
    difference = (approximate - exact)[1:].norm() / exact[1:].norm()
    assert difference < 0.01


@pytest.mark.parametrize("family", [AutoNormal, "gamma"])
def test_moments_of_a_linear_model_are_exact(family, data):
    """Against E[ln N(y | xw, τ)] written out, in float64, with its gradients."""
    x, y = (t.double() for t in data)
    one = torch.ones((), dtype=torch.float64)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0 * one, one).expand([3]).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(2 * one, one))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, tau.rsqrt()), obs=y)

    guide = bmr.mean_field(model, gamma=["tau"]) if family == "gamma" else family(model)
    guide(x, y)
    if family == "gamma":
        m, s = guide[0].locs.w, guide[0].scales.w
        a, mean = guide[1].concentrations.tau, guide[1].means.tau
        log_mean = a.digamma() - (a / mean).log()
        prior = torch.distributions.Gamma(2 * one, one)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Gamma(a, a / mean), prior
        )
    else:
        m, s = guide.locs.w, guide.scales.w
        mu, sd = guide.locs.tau, guide.scales.tau
        mean, log_mean = (mu + sd**2 / 2).exp(), mu
        entropy = mu + 0.5 * (2 * math.pi * math.e * sd**2).log()
        # Gamma(2, 1): ln p(τ) = ln τ - τ - ln Γ(2)
        divergence = -entropy - (mu - mean)
    residual = (y - x @ m) ** 2 + (x**2 @ s**2)
    expected_log = 0.5 * (log_mean - math.log(2 * math.pi) - mean * residual)
    weights = 0.5 * (s**2 + m**2 - 1 - (s**2).log())
    exact = -expected_log.sum() + weights.sum() + divergence
    estimate = bmr.MomentsELBO().differentiable_loss(model, guide, x, y)
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(estimate, parameters),
        torch.autograd.grad(exact, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise", NOISE)
def test_the_expectation_is_that_of_pyro(noise, data):
    """The closed parts (divergence, noise level) have the mean of Trace_ELBO's draws."""
    model = make_linear(noise)
    guide = AutoNormal(model, init_scale=0.3)
    guide(*data)
    torch.manual_seed(0)
    theirs = many(pyros_loss, model, guide, *data)
    torch.manual_seed(0)
    assert Trace_ELBO().loss(model, guide, *data) == pytest.approx(theirs[0].item())
    for estimator in ESTIMATORS:
        elbo = estimator()
        elbo.loss(model, guide, *data)
        assert set(elbo._plan.noise) == {"level"}
        torch.manual_seed(0)
        loss = elbo.loss(model, guide, *data)
        torch.manual_seed(0)
        ours = many(elbo.differentiable_loss, model, guide, *data)
        assert loss == pytest.approx(ours[0].item())
        error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
        assert abs(ours.mean() - theirs.mean()) < 3.5 * error
        assert ours.std() < theirs.std()


@pytest.mark.parametrize("family", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_global_takes_any_reparameterised_guide(family, data):
    model = make_linear("precision")
    guide = family(model)
    ours = many(bmr.GlobalELBO().differentiable_loss, model, guide, *data)
    theirs = many(pyros_loss, model, guide, *data)
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 3.5 * error


def test_a_noise_level_with_several_elements(data):
    x, y = data
    targets = torch.stack([y, 2 * y], -1)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, tau.rsqrt()).to_event(1), obs=y)

    guide = bmr.mean_field(model, gamma="tau")
    elbo = bmr.MomentsELBO()
    value = elbo.loss(model, guide, x, targets)
    assert elbo._plan.noise["tau"].exponent == -0.5
    sampled = many(pyros_loss, model, guide, x, targets)
    assert abs(value - sampled.mean()) < 3.5 * sampled.std() / len(sampled) ** 0.5


def test_a_site_with_another_role_is_no_noise_level(data):
    """A precision that is a prior's parameter too is drawn, not plugged in."""

    def model(x, y):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau.rsqrt()).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, tau.rsqrt()), obs=y)

    guide = AutoNormal(model)
    elbo = bmr.LocalELBO()
    ours = many(elbo.differentiable_loss, model, guide, *data)
    assert elbo._plan.noise == {}
    theirs = many(pyros_loss, model, guide, *data)
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 3.5 * error
    with pytest.raises(ValueError, match="moments of the site 'tau'.*'local' or 'global'"):
        bmr.MomentsELBO().loss(model, guide, *data)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_plain_svi_before_and_after_a_reduction(estimator):
    x = torch.randn(40, 13)
    y = 2 * x[:, 0]
    model = Regression(13, hidden=4)
    guide = AutoNormal(model, init_loc_fn=near_zero)

    def train(model, guide):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), estimator())
        losses = [svi.step(x, y) for _ in range(150)]
        assert sum(losses[-10:]) < sum(losses[:10])

    train(model, guide)
    result = bmr.reduce(guide)
    assert 0 < result.sparsity < 1
    train(result.model, result.guide)
    for name, value in result.guide(x, y).items():
        if name in result.masks:
            assert (value[~result.masks[name]] == 0).all()
    assert all(p.isfinite().all() for p in result.guide.parameters())


LINEAR_USES = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "matmul": lambda x, w: x @ w.T,
    "transposed": lambda x, w: (w @ x.T).T,
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "scaled": lambda x, w: x @ (0.5 * w).mT * 2,
    "elementwise": lambda x, w: (x[:, None] * w).sum(-1),
    "conv1d": lambda x, w: nn.functional.conv1d(x[:, :, None], w[:, :, None]).squeeze(-1),
    "conv2d": lambda x, w: nn.functional.conv2d(x[..., None, None], w[..., None, None]).flatten(1),
}


@pytest.mark.parametrize("use", LINEAR_USES)
def test_local_draws_the_result_of_linear_functions(use, recwarn):
    """Every row has the mean and the variance of x w, and rows share no noise."""
    x = torch.randn(6, 3).repeat(10, 1)
    seen = []

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        out = LINEAR_USES[use](x, w)
        seen.append(out.detach())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.sum(-1), 1.0), obs=torch.zeros(len(x)))

    guide = AutoNormal(model, init_scale=0.5)
    elbo = bmr.LocalELBO()
    elbo.loss(model, guide, x)
    assert elbo._plan.analytic == {"w"}
    assert not recwarn.list
    seen.clear()
    for _ in range(300):
        elbo.loss(model, guide, x)
    x, out = x[:6], torch.cat(seen).reshape(3000, 6, 2)
    loc, scale = guide.locs.w.detach(), guide.scales.w.detach()
    spread = (x**2 @ (scale**2).T).sqrt()
    torch.testing.assert_close(out.mean(0), x @ loc.T, rtol=0, atol=5 * spread.max() / 3000**0.5)
    torch.testing.assert_close(out.std(0), spread, rtol=0.1, atol=0)
    correlation = torch.corrcoef(out[:, :, 0].T) - torch.eye(6)
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize("operation", [lambda x, b: x + b, lambda x, b: b - x])
def test_local_adds_a_bias(operation):
    """Against the exact moments."""

    def model(x):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(operation(x, bias), 1.0).to_event(1), obs=x)

    x = 3 * torch.randn(6, 3)
    guide = AutoNormal(model, init_scale=0.5)
    elbo = bmr.LocalELBO()
    ours = many(elbo.differentiable_loss, model, guide, x)
    assert elbo._plan.analytic == {"bias"}
    exact = bmr.MomentsELBO().loss(model, guide, x)
    assert abs(ours.mean() - exact) < 3.5 * ours.std() / len(ours) ** 0.5


def test_local_with_a_layer_of_sampled_weight_and_bias():
    x = torch.randn(5, 3)
    layer = PyroModule[nn.Linear](3, 2)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def model(x):
        mean = layer(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.zeros(5, 2))

    guide = AutoNormal(model, init_scale=0.5)
    elbo = bmr.LocalELBO()
    ours = many(elbo.differentiable_loss, model, guide, x)
    exact = bmr.MomentsELBO().loss(model, guide, x)
    assert elbo._plan.analytic == {"weight", "bias"}
    assert abs(ours.mean() - exact) < 3.5 * ours.std() / len(ours) ** 0.5


SHARED = {
    "non-centred": lambda x, w, z: x @ (w + 0.5 * z),
    "broadcast": lambda x, w, z: x @ (w * torch.ones(3) + z),
    "mixed": lambda x, w, z: x @ (torch.eye(3).roll(1, 0) @ z) + w,
    "sequence": lambda x, w, z: (x[:, None].expand(-1, 4, -1) @ z).sum(-1) + w,
}


@pytest.mark.parametrize("use", SHARED)
def test_local_keeps_what_elements_share(use):
    """A weight that several elements of a row take is drawn once for all of them."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(SHARED[use](x, w, z), 1.0), obs=y)

    x = torch.randn(8, 3)
    args = model, AutoNormal(model, init_scale=0.7), x, x.sum(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = many(bmr.LocalELBO().differentiable_loss, *args)
    theirs = many(bmr.GlobalELBO().differentiable_loss, *args)
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 3.5 * error


GROUPS = torch.tensor([1, 0, 2, 1, 0, 2, 2, 1])
ONCE = {
    "groups of rows": ([3], lambda x, w: x.sum(-1) + w[GROUPS]),
    "slopes of groups": ([3, 3], lambda x, w: x * w[GROUPS]),
    "a weight of each row": ([8, 3], lambda x, w: x * w + x.cos() * w),
    "a matrix of each row": ([8, 3, 2], lambda x, w: x[:, None] @ w + x.cos()[:, None] @ w),
    "matrices": ([4, 3, 2], lambda x, w: (x @ w).movedim(1, 0)),
    "expanded": ([3], lambda x, w: F.linear(x, w.expand(4, 3))),
    "broadcast": ([3], lambda x, w: F.linear(x, w.broadcast_to(4, 3))),
    "taken twice": ([3], lambda x, w: x @ w[[0, 0, 1]]),
    "masked": ([3], lambda x, w: x[:, :2] @ w[torch.tensor([True, False, True])]),
    "data summed by themselves": ([2], lambda x, w: torch.einsum("bi,o->bo", x, w)),
    "outer product": ([2], lambda x, w: torch.einsum("bi,o", x, w)),
    "einsum": ([2, 3], lambda x, w: torch.einsum("...i,oi->...o", x, w)),
    "rows summed": ([8], lambda x, w: (w @ x).sum() * x.cos()),
    "rows summed by einsum": ([2, 3], lambda x, w: torch.einsum("bi,oi->o", x, w).sum() * x.cos()),
    "in place": ([3], lambda x, w: [h := x.sin(), h.add_(w)][0]),
    "in place, itself": ([3], lambda x, w: x @ w.clone().mul_(2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the site 'w' is drawn as a whole")
@pytest.mark.parametrize("use", ONCE)
def test_each_row_has_the_exact_moments(use):
    """A sum over what a row makes of its weights has the variance J diag(v) Jᵀ."""
    x, (shape, function), num = torch.randn(8, 3), ONCE[use], 300
    seen = []

    def row_sums(w):
        return function(x, w).reshape(8, -1).sum(-1)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
        seen.append(row_sums(w))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(seen[-1], 1.0), obs=torch.zeros(8))

    loc, scale = torch.randn(shape), torch.rand(shape) + 0.2
    guide, elbo = AutoNormal(model), bmr.LocalELBO()
    guide()
    with torch.no_grad():
        guide.locs.w.copy_(loc)
        guide.scales.w = scale
    with torch.no_grad():
        for _ in range(num + 1):
            elbo._get_trace(model, guide, (), {})
    jacobian = torch.autograd.functional.jacobian(row_sums, loc).reshape(8, -1)
    variance = jacobian.square() @ scale.square().flatten()
    draws = torch.stack(seen[-num:])
    assert ((draws.mean(0) - row_sums(loc)).abs() < 5 * (variance / num).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 5 * (2 / num) ** 0.5).all()


class SmallRecurrent(PyroModule):
    """Two gated units that read four values; views of one site are used at every step."""

    def __init__(self):
        super().__init__()
        for name, shape in {"weight": (6, 1), "hidden": (6, 2), "bias": (6,), "out": (2,)}.items():
            prior = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
            setattr(self, name, PyroSample(prior))

    def forward(self, x, y):
        weight, bias, (w_r, w_u, w_h) = self.weight, self.bias, self.hidden.chunk(3)
        h = x.new_zeros(len(x), 2)
        for value in x.unbind(1):
            r, u, new = (nn.functional.linear(value[:, None], weight) + bias).chunk(3, 1)
            r, u = (r + h @ w_r.T).sigmoid(), (u + nn.functional.linear(h, w_u)).sigmoid()
            new = (new + torch.einsum("ni,oi->no", r * h, w_h)).tanh()
            h = u * h + (1 - u) * new
        mean = h @ self.out
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.rare
def test_local_draws_a_recurrent_network_once_a_row(recwarn):
    """F and almost all of its gradients are within three standard errors of global."""
    x = torch.randn(12, 4)
    model = SmallRecurrent()
    args = model, AutoNormal(model, init_loc_fn=near_zero, init_scale=0.5), x, x.sum(1).tanh()
    local = bmr.LocalELBO()
    ours, theirs = (draws(e, *args, count=20_000) for e in (local, bmr.GlobalELBO()))
    assert local._plan.repeated == {"weight", "hidden", "bias"}
    assert local._plan.analytic == {"weight", "hidden", "bias", "out"}
    assert not recwarn.list
    z = (ours.mean(0) - theirs.mean(0)) / ((ours.var(0) + theirs.var(0)) / 20_000).sqrt()
    assert len(z) == 1 + 2 * 26
    assert z[0].abs() < 3
    assert (z.abs() < 3).double().mean() > 0.95
    assert z.abs().max() < 4.5
    assert ours.var(0).mean() < 0.5 * theirs.var(0).mean()


def gated_step(x, h, weight, hidden, bias):
    r, u, new = (nn.functional.linear(x, weight) + bias).chunk(3, 1)
    (w_r, w_u), w_h = hidden[:4].split(2), hidden[4:]
    r, u = (r + h @ w_r.T).sigmoid(), (u + nn.functional.linear(h, w_u)).sigmoid()
    return torch.lerp((new + nn.functional.linear(r * h, w_h)).tanh(), h, u)


@pytest.mark.parametrize("first", [True, False])
def test_moments_of_a_gated_step(first):
    """Against draws; the moments do not know that gates and candidate share a random state."""
    x, num = torch.randn(5, 1), 100_000
    shapes, spreads = [(5, 2), (6, 1), (6, 2), (6,)], [0.1, 0.3, 0.3, 0.3]
    locs = [0.5 * torch.randn(shape) for shape in shapes]
    scales = [most * torch.rand(shape) for shape, most in zip(shapes, spreads, strict=True)]
    weights = [gaussian(loc, scale**2) for loc, scale in zip(locs, scales, strict=True)]
    draws = [
        loc + scale * torch.randn(num, *loc.shape) for loc, scale in zip(locs, scales, strict=True)
    ]
    if first:  # the state before the first step is a constant
        weights[0], draws[0] = torch.zeros(5, 2), torch.zeros(num, 5, 2)
    ours = gated_step(x, *weights)
    sampled = torch.vmap(gated_step, (None, 0, 0, 0, 0))(x, *draws)
    spread = sampled.std(0)
    slack = 0.02 if first else 0.1
    assert ((ours.loc - sampled.mean(0)).abs() < slack * spread + 0.001).all()
    assert ((ours.variance.sqrt() / spread - 1).abs() < slack).all()


@pytest.mark.rare
def test_moments_train_a_recurrent_network():
    x = torch.randn(20, 4)
    model = SmallRecurrent()
    guide = AutoNormal(model, init_loc_fn=near_zero)
    losses = bmr.fit(model, guide, x, x[:, -1], num_epochs=100, lr=2e-2, estimator="moments")
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]
    sampled, error = bmr.free_energy(model, guide, x, x[:, -1], num_samples=300)
    assert abs(losses[-1] - sampled) < 0.05 * sampled + 4 * error


@pytest.mark.rare
@pytest.mark.filterwarnings("error::UserWarning")
def test_fit_compiles_a_recurrent_network(monkeypatch):
    """The compiled steps agree with Pyro's, or `fit` would warn."""
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)
    x = torch.randn(24, 2)
    model = SmallRecurrent()
    guide = AutoNormal(model, init_loc_fn=near_zero)
    losses = bmr.fit(
        model, guide, x, x[:, -1], num_epochs=30, batch_size=12, lr=1e-2, estimator="local"
    )
    assert losses[-1] < losses[0]


REPEATED = {
    "linear": lambda x, w: (nn.functional.linear(x, w), nn.functional.linear(2 * x, w)),
    "views": lambda x, w: (x @ (0.5 * w[0].expand(3, 3).T), x @ w[0, :, None]),
    "unbind": lambda x, w: tuple(x + row for row in w),
    "split": lambda x, w: tuple(torch.einsum("ni,oi->no", x, part) for part in w.split([1, 2])),
    "conv": lambda x, w: [nn.functional.conv1d(x[:, None], w[:1, None], padding=1)[:, 0]] * 2,
}


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("use", REPEATED)
def test_all_uses_in_rows_that_share_a_draw_see_one(use, sharing, recwarn):
    """The covariance among them is that of whole draws, and there is none with others."""
    x = torch.randn(4, 3)
    seen, same = [], []

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        out = torch.cat(REPEATED[use](x, w), 1)
        again = torch.cat(REPEATED[use](x, w), 1)
        seen.append(out.detach())
        same.append(torch.equal(out, again))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.sum(-1), 1.0), obs=torch.zeros(len(x)))

    def covariance(out):
        out = out - out.mean(0)
        return torch.einsum("kni,kmj->nmij", out, out) / len(out)

    guide = AutoNormal(model, init_scale=0.5)
    elbo = UnbiasedELBO()
    elbo._most_sharing = sharing
    elbo.loss(model, guide, x.repeat(10, 1))
    seen.clear(), same.clear()
    for _ in range(150):
        elbo.loss(model, guide, x.repeat(10, 1))
    assert all(same)
    ours = covariance(torch.cat(seen).reshape(1500, 4, -1))
    whole = guide.locs.w.detach() + 0.5 * torch.randn(1500, 3, 3)
    theirs = covariance(torch.vmap(lambda w: torch.cat(REPEATED[use](x, w), 1))(whole))
    assert elbo._plan.repeated == {"w"}
    assert not recwarn.list
    rows = torch.block_diag(*[torch.ones(sharing, sharing)] * (4 // sharing)).bool()
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=0.1, atol=0.15 * theirs.max())
    assert ours[~rows].abs().max() < 0.15 * theirs.max()


def test_rows_must_come_first_where_a_weight_is_used_twice():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        out = torch.einsum("oi,ni->on", w, x).T + (w @ x.T).T
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.sum(-1), 1.0), obs=torch.zeros(len(x)))

    elbo = bmr.LocalELBO()
    with pytest.warns(UserWarning, match=r"'w' is drawn as a whole.*'einsum', 'matmul'"):
        elbo.loss(model, AutoNormal(model), torch.randn(3, 3))
    assert elbo._plan.analytic == set()


def test_free_energy_is_unbiased_for_shared_filters():
    """Where `LocalELBO` is not, since it draws the positions of a convolution by themselves."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 1, 2]).to_event(3))
        mean = nn.functional.conv1d(x, w).sum((-1, -2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    args = model, AutoNormal(model, init_scale=0.7), torch.ones(6, 1, 5), torch.ones(6)
    measured, error = bmr.free_energy(*args, num_samples=1000)
    theirs = many(pyros_loss, *args)
    assert abs(measured - theirs.mean()) < 3.5 * (error**2 + theirs.var() / len(theirs)) ** 0.5
    local = many(bmr.LocalELBO().differentiable_loss, *args)
    assert abs(measured - local.mean()) > 5 * (error**2 + local.var() / len(local)) ** 0.5


def test_free_energy_by_batches():
    """In its expectation that of all rows; a model sees no more than eight batches at once."""
    seen = set()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        seen.add(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).tanh(), 0.5), obs=y)

    x = torch.randn(203, 2)
    args = model, AutoNormal(model, init_scale=0.3), x, x[:, 0].tanh()
    whole, error = bmr.free_energy(*args, num_samples=400)
    state = torch.get_rng_state()
    seen.clear()
    parts, other = bmr.free_energy(*args, num_samples=100, batch_size=20)
    assert abs(whole - parts) < 3.5 * (error**2 + other**2) ** 0.5
    assert other > 0
    assert not torch.equal(torch.get_rng_state(), state)
    assert seen >= {4, 5}, "a quarter of a batch, four times at once"
    assert max(seen) == 8 * 20
    assert bmr.free_energy(*args, num_samples=2, batch_size=20) != (parts, other)
    with pytest.raises(ValueError, match="batch_size=20 and an estimator"):
        bmr.free_energy(*args, batch_size=20, estimator=Trace_ELBO())


@pytest.mark.parametrize(
    "change", [lambda: poutine.mask(mask=False), lambda: poutine.scale(scale=0.1)]
)
def test_masked_and_tempered_priors(change, data):
    def model(x, y):
        with change():
            w = pyro.sample("w", dist.Normal(0.0, 0.2).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    args = model, AutoNormal(model, init_scale=0.5), *data
    ours, error = bmr.free_energy(*args, num_samples=1000)
    theirs = many(pyros_loss, *args)
    assert abs(ours - theirs.mean()) < 3.5 * (error**2 + theirs.var() / len(theirs)) ** 0.5


def test_moments_do_not_go_through_a_hierarchy():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="prior of the site 'w' depends on another site"):
        bmr.MomentsELBO().loss(model, AutoNormal(model))


def test_local_draws_what_it_cannot_handle_as_a_whole_and_says_so():
    def model(x, rows):
        table = pyro.sample("table", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        twice = pyro.sample("twice", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        h = (nn.functional.embedding(rows, table) + x) @ twice @ twice.sin()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(h.sum(-1), 1.0), obs=torch.zeros(len(x)))

    args = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    guide = AutoNormal(model, init_scale=0.5)
    elbo = bmr.LocalELBO()
    with pytest.warns(UserWarning) as caught:
        elbo.loss(model, guide, *args)
    messages = [str(w.message) for w in caught]
    assert any("'table' is drawn as a whole" in m and "embedding" in m for m in messages)
    assert any("'twice' is drawn as a whole" in m and "'rows', 'sin'" in m for m in messages)
    ours = many(elbo.differentiable_loss, model, guide, *args)
    theirs = many(bmr.GlobalELBO().differentiable_loss, model, guide, *args)
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 3.5 * error


def test_moments_of_an_unknown_operation_is_an_error_that_names_it():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(torch.erfinv(x @ w), 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(UnknownOperationError, match=r"torch\.erfinv.*'local'"):
        bmr.MomentsELBO().loss(model, AutoNormal(model), torch.ones(2, 3))


def test_moments_of_a_classifier_bound_the_free_energy():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    x, y = torch.randn(50, 3), torch.randint(4, (50,))
    guide = AutoNormal(model, init_scale=0.3)
    bound = bmr.MomentsELBO().loss(model, guide, x, y)
    sampled = many(bmr.LocalELBO().differentiable_loss, model, guide, x, y)
    assert 0 < bound - sampled.mean() < 0.01 * bound


def test_bad_guides():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"does not sample \['b'\]"):
        bmr.GlobalELBO().loss(model, AutoNormal(poutine.block(model, hide=["b"])))

    def discrete():
        pyro.sample("a", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="no reparameterised draws"):
        bmr.GlobalELBO().loss(discrete, discrete)
    with pytest.raises(ValueError, match="moments of the site 'a'"):
        bmr.MomentsELBO().loss(model, AutoMultivariateNormal(model))


def test_planning_leaves_no_trace():
    model = make_linear("precision")
    x, y = torch.randn(5, 3), torch.randn(5)
    guide = AutoNormal(model)
    guide(x, y)
    torch.manual_seed(3)
    guide(x, y)  # the run in which a plan looks at the guide
    expected = torch.rand(3)
    torch.manual_seed(3)
    elbo = bmr.MomentsELBO()
    elbo._plan_for(model, guide, (x, y), {})
    assert torch.equal(torch.rand(3), expected)


def test_weights_used_twice_are_drawn_whole_where_rows_meet():
    """A tied weight on both sides of a mean over the batch: rows would not be independent."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        h = (x @ w).mean(0, keepdim=True).expand(len(x), 2)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((h @ w).sum(-1), 1.0), obs=y)

    x, y = torch.ones(6, 2), torch.zeros(6)
    guide = AutoNormal(model, init_scale=0.5)
    with pytest.warns(UserWarning, match="keep rows apart"):
        bmr.LocalELBO().loss(model, guide, x, y)
    mean, error = bmr.free_energy(model, guide, x, y, num_samples=2000)
    same = many(bmr.GlobalELBO().differentiable_loss, model, guide, x, y)
    assert abs(mean - same.mean()) < 4 * (error**2 + same.var() / len(same)) ** 0.5


def test_a_layer_over_a_sequence_is_drawn_once_a_row(recwarn):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        h = (nn.functional.linear(x, w) * scale).tanh().sum((1, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(h, 1.0), obs=y)

    x, y = torch.linspace(-1, 1, 84).reshape(7, 4, 3), torch.zeros(7)
    guide = AutoNormal(model, init_loc_fn=near_zero, init_scale=0.5)
    local = many(bmr.LocalELBO().differentiable_loss, model, guide, x, y)
    whole = many(bmr.GlobalELBO().differentiable_loss, model, guide, x, y)
    assert not [w for w in recwarn.list if "drawn as a whole" in str(w.message)]
    error = ((local.var() + whole.var()) / len(local)).sqrt()
    assert abs(local.mean() - whole.mean()) < 4 * error
    assert local.std() < 0.7 * whole.std()
