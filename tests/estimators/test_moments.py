"""Gaussian tensors against Monte Carlo, quadrature and exact answers."""

import importlib
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pyro_bmr.estimators.expectations import expected_log_prob
from pyro_bmr.estimators.gaussian_tensor import (
    GaussianTensor,
    UnknownOperationError,
    gaussian,
    register,
)
from pyro_bmr.estimators.nonlinearities import logsumexp_bound, relu_moments, smooth_moments

SAMPLES = 20_000


def plain(*shape):
    """Return constants; vmap forbids random ones."""
    return 1.5 * torch.arange(1.0, 1 + math.prod(shape)).double().mul(1.7).sin().reshape(shape)


def random_gaussian(*shape, scale=0.7):
    variance = scale**2 * torch.rand(shape, dtype=torch.float64)
    return gaussian(torch.randn(shape, dtype=torch.float64), variance)


def draws(x, num=SAMPLES):
    noise = torch.randn(num, *x.shape, dtype=x.dtype)
    return x.loc + x.variance.sqrt() * noise


def assert_moments(result, samples, slack=0.0):
    """Within five standard errors, and `slack` standard deviations for an approximation."""
    assert isinstance(result, GaussianTensor)
    assert result.shape == result.loc.shape == result.variance.shape == samples.shape[1:]
    mean, centered = samples.mean(0), (samples - samples.mean(0)).square()
    spread = centered.mean(0)
    error = 5 * (spread / len(samples)).sqrt() + slack * spread.sqrt() + 1e-5
    assert ((result.loc - mean).abs() <= error).all()
    error = 6 * centered.std(0) / math.sqrt(len(samples)) + 2 * slack * spread + 1e-5
    assert ((result.variance - spread).abs() <= error).all()


def batch_norm(x, w, b):
    return F.batch_norm(x, torch.ones(3).double(), torch.full((3,), 2.0).double(), w, b)


LINEAR = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(5, 3), (2, 3), (2,)]),
    "linear, plain weight": (lambda x: F.linear(x, plain(2, 3), plain(2)), [(5, 3)]),
    "linear, plain input": (lambda w: F.linear(plain(5, 3), w), [(2, 3)]),
    "linear, only bias": (lambda b: F.linear(plain(5, 3), plain(2, 3), b), [(2,)]),
    "matmul": (lambda x, w: x @ w, [(2, 5, 3), (3, 2)]),
    "matmul, plain left": (lambda w: plain(5, 3) @ w, [(3, 2)]),
    "matmul, plain right": (lambda x: x @ plain(3, 2), [(5, 3)]),
    "rmatmul": (lambda w: w.__rmatmul__(plain(5, 3)), [(3, 2)]),
    "mm": (torch.mm, [(2, 3), (3, 2)]),
    "mv": (torch.mv, [(2, 3), (3,)]),
    "bmm": (torch.bmm, [(2, 2, 3), (2, 3, 2)]),
    "addmm": (lambda c, x, w: torch.addmm(c, x, w, beta=2, alpha=3), [(2,), (2, 3), (3, 2)]),
    "addmm, plain": (lambda w: torch.addmm(plain(2), plain(4, 3), w), [(3, 2)]),
    "baddbmm": (lambda c, x, w: c.baddbmm(x, w), [(2, 2, 2), (2, 2, 3), (2, 3, 2)]),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=2), [(2, 3, 2), (3, 2, 2)]),
    "einsum": (lambda x, w: torch.einsum("bij,jk->bk", x, w), [(2, 3, 2), (2, 2)]),
    "einsum, implicit": (lambda x, w: torch.einsum("...i,ij", x, w), [(2, 3), (3, 2)]),
    "einsum, lonely": (lambda x, w: torch.einsum("ij,k->k", x, w), [(2, 3), (2,)]),
    "einsum, trace": (lambda x: torch.einsum("ii", x), [(3, 3)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), [(2, 3, 6), (2, 3, 3), (2,)]),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, dilation=2, groups=2),
        [(1, 4, 6, 6), (2, 2, 2, 2), (2,)],
    ),
    "conv3d": (lambda w: F.conv3d(plain(1, 2, 3, 3, 3), w), [(2, 2, 2, 2, 2)]),
    "conv_transpose2d": (F.conv_transpose2d, [(2, 3, 3), (2, 1, 2, 2), (1,)]),
    "add": (lambda x, y: x + y + 1, [(3, 2), (2,)]),
    "torch.add": (lambda x, y: torch.add(x, y, alpha=2).add(plain(4, 3, 2)), [(3, 2), (2,)]),
    "sub": (lambda x, y: 2 - (x - y) - plain(2), [(3, 2), (2,)]),
    "same object": (lambda x: torch.stack([x + x, x - x, x * x, x.add(x, alpha=3)]), [(3,)]),
    "mul": (lambda x, y: 2 * (x * y) * plain(2) * -3.0, [(3, 2), (2,)]),
    "lerp": (lambda x, y, w: torch.lerp(x, y.lerp(plain(2), 0.3), w), [(3, 2), (2,), (3, 2)]),
    "lerp, plain": (lambda w: torch.lerp(plain(3, 2), plain(2), w), [(3, 2)]),
    "div": (lambda x: -(x / plain(2)).div(2), [(3, 2)]),
    "square": (lambda x: torch.stack([x**2, x.square(), torch.pow(x, 2)]), [(4,)]),
    "where": (lambda x: torch.where(plain(3) > 0, x, 2.0), [(2, 3)]),
    "batch_norm": (batch_norm, [(2, 3, 4), (3,), (3,)]),
}  # fmt: skip
SHAPES = {
    "sum": lambda x: x.sum((0, 1), keepdim=True),
    "mean": lambda x: torch.mean(x, dim=-1),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2, padding=1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, (2, 3), stride=1, divisor_override=5),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "nn.AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(1),
    "view": lambda x: x.view(2, -1).unflatten(1, (3, 4)).flatten(1).reshape(6, 4),
    "squeeze": lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze(),
    "transpose": lambda x: x.transpose(0, 1).permute(2, 0, 1).movedim(0, -1).mT[0].t().T,
    "expand": lambda x: x[None].expand(2, -1, -1, -1).expand_as(plain(2, 2, 3, 4)),
    "broadcast": lambda x: torch.broadcast_tensors(x[:1], x, plain(5, 1, 1, 1))[0],
    "index": lambda x: x[0, plain(3) > 0, 1:],
    "cat": lambda x: torch.cat([*x.chunk(2), *x.split(1), plain(1, 3, 4)]),
    "stack": lambda x: torch.stack([row.clone().contiguous().detach() for row in x], -1),
    "dropout": nn.Dropout().eval(),
}  # fmt: skip
NONLINEAR = {
    "relu": (torch.relu, 0.0),
    "inplace": (lambda x: F.relu(x * 1, inplace=True), 0.0),
    "leaky_relu": (nn.LeakyReLU(0.2), 0.0),
    "tanh": (torch.tanh, 1e-3),
    "sigmoid": (lambda x: x.sigmoid(), 1e-3),
    "softplus": (lambda x: F.softplus(x, beta=2), 1e-3),
    "gelu": (nn.GELU("tanh"), 1e-3),
    "silu": (nn.SiLU(), 1e-3),
    "mish": (F.mish, 1e-3),
    "elu": (nn.ELU(0.5), 1e-3),
    "exp": (torch.exp, 0.0),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2, stride=1), 0.0),
    "max_pool2d": (nn.MaxPool2d(2, padding=1), 0.15),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_rules_match_monte_carlo(case):
    func, shapes = LINEAR[case]
    inputs = [random_gaussian(*shape) for shape in shapes]
    assert_moments(func(*inputs), vmap(func)(*map(draws, inputs)))


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_move_both_moments(case):
    x = random_gaussian(2, 3, 4)
    assert_moments(SHAPES[case](x), vmap(SHAPES[case])(draws(x)))


@pytest.mark.parametrize("case", NONLINEAR)
def test_nonlinearities_match_monte_carlo(case):
    func, slack = NONLINEAR[case]
    x = random_gaussian(2, 4, 6)
    assert_moments(func(x), vmap(func)(draws(x, 50_000)), slack)


@pytest.mark.parametrize("case", NONLINEAR)
def test_no_variance_means_the_plain_function(case):
    func, _ = NONLINEAR[case]
    values = torch.cat([torch.zeros(1, 2, 6), torch.randn(1, 2, 6)]).double()
    loc, variance = values.clone().requires_grad_(), torch.zeros_like(values).requires_grad_()
    result = func(gaussian(loc, variance))
    assert torch.allclose(result.loc, func(values), atol=1e-14)
    assert (result.variance == 0).all()
    for moment in (result.loc, result.variance):
        for grad in torch.autograd.grad(moment.sum(), (loc, variance), retain_graph=True):
            assert grad.isfinite().all()


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_relu_in_float32_is_as_good_as_float32(slope, scale):
    ratio = torch.linspace(-30, 30, 601)
    loc, variance = scale * ratio, torch.full_like(ratio, scale**2)
    mean, spread = relu_moments(loc, variance, slope)
    mean_64, spread_64 = relu_moments(loc.double(), variance.double(), slope)
    assert (spread >= 0).all()
    assert torch.allclose(mean.double() / scale, mean_64 / scale, rtol=1e-6, atol=1e-7)
    assert torch.allclose(spread.double() / scale**2, spread_64 / scale**2, rtol=1e-6, atol=2e-7)
    if slope == 0:
        body = ratio > -6
        assert torch.allclose(mean.double()[body], mean_64[body], rtol=2e-5, atol=0)
        assert torch.allclose(spread.double()[body], spread_64[body], rtol=2e-4, atol=0)


@pytest.mark.parametrize("ratio", [-25.0, -8.0, -1.0, 0.0, 1e-3, 3.0, 25.0])
def test_relu_against_quadrature(ratio):
    # Around its largest value, the integrand of the tail is as narrow as 1 / (1 + |ratio|).
    t = torch.linspace(max(0.0, ratio - 12), max(0.0, ratio) + 12, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (t - ratio).square()) / math.sqrt(2 * math.pi)
    first, second = (torch.trapezoid(t**k * density, t) for k in (1, 2))
    one = torch.ones((), dtype=torch.float64)
    mean, variance = relu_moments(ratio * one, one)
    assert torch.allclose(mean, first, rtol=1e-7, atol=0)
    expected = second - first**2 if ratio < 5 else one
    assert torch.allclose(variance, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("variance", [1e-44, 1e-30, 1e-12, 1e-4, 1.0, 1e12])
def test_relu_gradients_are_finite_and_right(variance):
    loc = torch.tensor([-1e3, -1.0, -1e-10, 0.0, 1e-20, 1.0, 1e3], requires_grad=True)
    spread = torch.full_like(loc, variance).requires_grad_()
    mean, _ = relu_moments(loc, spread)
    grad, _ = torch.autograd.grad(mean.sum(), (loc, spread), retain_graph=True)
    exact = torch.special.ndtr(loc / spread.sqrt())
    assert torch.allclose(grad, exact, atol=1e-6) or variance < 1e-37
    grads = torch.autograd.grad(sum(m.sum() for m in relu_moments(loc, spread)), (loc, spread))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    ("func", "errors"),
    [
        (torch.sigmoid, (1e-9, 1e-5, 5e-4)),
        (F.silu, (1e-9, 1e-5, 5e-4)),
        (F.gelu, (1e-9, 1e-5, 5e-4)),
        (torch.tanh, (4e-7, 6e-4, 6e-3)),
        (F.elu, (6e-4, 3e-3, 6e-3)),
    ],
)
def test_quadrature_is_as_accurate_as_documented(func, errors):
    t = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    for scale, error in zip((1, 2, 3), errors, strict=True):
        loc = torch.linspace(-3, 3, 25, dtype=torch.float64)
        values = func(loc[:, None] + scale * t)
        exact = (weight * values).sum(-1)
        spread = (weight * (values - exact[:, None]).square()).sum(-1)
        mean, variance = smooth_moments(func, loc, torch.full_like(loc, scale**2))
        assert (mean - exact).abs().max() < error
        assert (variance - spread).abs().max() < 20 * error


def test_one_linear_layer_is_exact():
    x, w, b = plain(7, 3), random_gaussian(2, 3), random_gaussian(2)
    result = F.linear(x, w, b)
    assert torch.allclose(result.loc, F.linear(x, w.loc, b.loc))
    for row, variance in zip(x, result.variance, strict=True):
        exact = torch.stack([row @ torch.diag(v) @ row for v in w.variance]) + b.variance
        assert torch.allclose(variance, exact)


UNKNOWN = {
    "torch.fft.fft": torch.fft.fft,
    "torch.Tensor.softmax": lambda x: x.softmax(-1),
    "torch.nn.functional.layer_norm": lambda x: F.layer_norm(x, (4,)),
    "torch.Tensor.item": lambda x: x.item(),
    "torch.Tensor.__bool__": bool,
    "torch.Tensor.numpy": lambda x: x.numpy(),
    "write x = x [+] y": lambda x: x.__iadd__(1),
    "validation": lambda x: x == x,
    "as the divisor": lambda x: x[:1] / x,
    "__rtruediv__": lambda x: 1 / x,
    "exponent": lambda x: x**3,
    "dilation": lambda x: F.max_pool1d(x, 2, dilation=2),
    "eval": lambda x: F.dropout(x),
    "with itself": lambda x: x.matmul(x),
    "output size": lambda x: F.adaptive_avg_pool1d(x, 2),
    "aten.mul": lambda x: torch.ops.aten.mul(x, x),
    "argument": lambda x: plain(2).to(x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_operations_are_named(name):
    with pytest.raises(UnknownOperationError, match=name):
        UNKNOWN[name](random_gaussian(4, 4))


def test_an_error_says_where_rules_are_registered():
    with pytest.raises(UnknownOperationError) as caught:
        torch.erfinv(random_gaussian(2))
    module, name = re.search(r"@([\w.]+)\.(\w+)\(torch\.erfinv\)", str(caught.value)).groups()
    assert getattr(importlib.import_module(module), name) is register


def test_register_adds_a_rule():
    @register(torch.floor)
    def floor(x):
        return gaussian(x.loc + 1, x.variance)

    assert (torch.floor(gaussian(torch.zeros(2), torch.ones(2))).loc == 1).all()


@pytest.mark.parametrize(
    ("loc", "variance"),
    [
        (torch.zeros(2), torch.ones(3)),
        (torch.zeros(2), torch.ones(2).double()),
        (torch.zeros(2, dtype=torch.int), torch.ones(2, dtype=torch.int)),
    ],
)
def test_gaussian_wants_matching_moments(loc, variance):
    with pytest.raises(ValueError, match="one shape"):
        gaussian(loc, variance)


def test_behaves_as_a_tensor():
    x = gaussian(torch.zeros(3, 2).requires_grad_(), torch.ones(3, 2))
    assert isinstance(x, torch.Tensor)
    assert (x.shape, x.size(-1), x.dim(), x.ndim, len(x), x.numel()) == ((3, 2), 2, 2, 2, 3, 6)
    assert (x.dtype, x.device.type, x.requires_grad) == (torch.float32, "cpu", True)
    assert x.double().variance.dtype == x.to(torch.float64).dtype == torch.float64
    assert x.new_zeros(2).shape == (2,)
    assert type(torch.zeros_like(x)) is torch.Tensor
    assert {x: 1}[x] == 1
    assert repr(x).startswith("GaussianTensor(loc=")


def elements(low, high):
    return st.lists(st.floats(low, high), min_size=3, max_size=3)


@settings(max_examples=30, deadline=None)
@given(elements(-5, 5), elements(0, 4))
def test_logsumexp_bound_is_a_bound(loc, variance):
    x = gaussian(*torch.tensor([loc, variance], dtype=torch.float64))
    samples = draws(x, 10_000).logsumexp(-1)
    bound = x.logsumexp(-1)
    assert type(bound) is torch.Tensor
    assert bound >= samples.mean() - 5 * samples.std() / 100 - 1e-9
    small = logsumexp_bound(x.loc, x.variance / 100, 0, keepdim=True)
    # To first order in the variance, E[logsumexp] = logsumexp(m) + ½ Σ p (1 − p) v.
    p = x.loc.softmax(-1)
    first_order = x.loc.logsumexp(-1) + 0.005 * (p * (1 - p) * x.variance).sum()
    assert small.shape == (1,)
    assert torch.allclose(small, first_order, atol=1e-3)


def test_log_softmax_is_what_categorical_makes_of_logits():
    x = random_gaussian(5, 3)
    with pyro.validation_enabled(False):
        logits = dist.Categorical(logits=x).logits
    assert torch.equal(F.log_softmax(x, -1).loc, logits.loc)
    again = nn.LogSoftmax(-1)(logits)
    assert torch.allclose(again.loc, logits.loc)


FAMILIES = {
    "Normal": (lambda x: dist.Normal(x, torch.tensor([0.5, 1.0, 2.0]).double()), plain(4, 3), 0),
    "Bernoulli": (lambda x: dist.Bernoulli(logits=x), (plain(4, 3) > 0).double(), 0),
    "to_event": (lambda x: dist.Normal(x, 0.5).to_event(1), plain(4, 3), 0),
    "mask": (lambda x: dist.Normal(x, 0.5).mask(plain(3) > 0).to_event(1), plain(4, 3), 0),
    "no mask": (lambda x: dist.Normal(x, 0.5).mask(False), plain(4, 3), 0),
    "expand": (lambda x: dist.Normal(x, 0.5).expand([2, 4, 3]).mask(True), plain(2, 4, 3), 0),
    "expand Bernoulli": (lambda x: dist.Bernoulli(logits=x[:1]).expand([4, 3]), torch.ones(3), 0),
    "ExpandedDistribution": (
        lambda x: dist.torch_distribution.ExpandedDistribution(dist.Normal(x, 0.5), [2, 4, 3]),
        plain(4, 3),
        0,
    ),
    "Categorical": (lambda x: dist.Categorical(logits=x), torch.tensor([0, 1, 2, 0]), 0.05),
    "expand Categorical": (
        lambda x: dist.Categorical(logits=x).expand([2, 4]),
        torch.tensor([0, 1, 2, 0]),
        0.05,
    ),
    "OneHotCategorical": (
        lambda x: dist.OneHotCategorical(logits=x).to_event(1),
        torch.eye(3).repeat(2, 1)[:4],
        0.2,
    ),
    "no Gaussian": (lambda x: dist.Gamma(plain(3).exp(), 2.0), plain(4, 3).exp(), 0),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_expected_log_prob_matches_monte_carlo(case):
    make, value, looseness = FAMILIES[case]
    x = random_gaussian(4, 3)
    with pyro.validation_enabled(False):
        result = expected_log_prob(make(x), value)
        samples = torch.stack([make(s).log_prob(value) for s in draws(x, 2_000)])
    assert type(result) is torch.Tensor
    assert result.shape == samples.shape[1:]
    error = 5 * samples.std(0) / math.sqrt(len(samples)) + 1e-9
    assert (result <= samples.mean(0) + error).all()
    assert (result >= samples.mean(0) - error - looseness).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: dist.Laplace(x, 1.0), "Laplace.*Gaussian loc"),
        (lambda x: dist.Normal(0.0, x).to_event(1), "Normal.*Gaussian scale"),
        (lambda x: dist.Bernoulli(x.sigmoid()), "Bernoulli.*Gaussian probs"),
        (lambda x: dist.LogNormal(x, 1.0), "LogNormal.*Gaussian loc"),
        (lambda x: dist.Poisson(x.exp()), "Poisson.*Gaussian rate"),
    ],
)
def test_other_families_are_named(make, match):
    with pyro.validation_enabled(False), pytest.raises(UnknownOperationError, match=match):
        expected_log_prob(make(random_gaussian(3)), torch.ones(3))


class Substitute(poutine.messenger.Messenger):
    """Give latent sites Gaussian tensors for values."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y):
        loc = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding="same"),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Tanh(),
            nn.Linear(18, 3),
        )

    def forward(self, x, y):
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=self.body(x)), obs=y)


def bayesian(module):
    """Return the module with sampled weights, and a Gaussian for each."""
    pyro.nn.module.to_pyro_module_(module)
    values = {}
    for name, parameter in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        prior = dist.Normal(0.0, 1.0).expand(parameter.shape).to_event(parameter.dim())
        setattr(module.get_submodule(owner), last, PyroSample(prior))
        values[name] = gaussian(parameter.detach(), torch.full_like(parameter, 0.01).detach())
    return module, values


def observed(model, values, *args):
    with pyro.validation_enabled(False), Substitute(values):
        site = poutine.trace(model).get_trace(*args).nodes["y"]
        return site["fn"], expected_log_prob(site["fn"], site["value"])


def test_pyro_regression_in_a_plate():
    x, y = torch.randn(5, 3), torch.randn(5)
    weight, bias = gaussian(torch.randn(1, 3), torch.rand(1, 3)), gaussian(*torch.rand(2, 1))
    fn, result = observed(Regression(), {"layer.weight": weight, "layer.bias": bias}, x, y)
    assert fn.batch_shape == result.shape == (5,)
    variance = x.square() @ weight.variance[0] + bias.variance
    mean = x @ weight.loc[0] + bias.loc
    exact = dist.Normal(mean, 0.5).log_prob(y) - variance / (2 * 0.25)
    assert torch.allclose(result, exact, atol=1e-5)


def test_convnet_runs_end_to_end():
    model, values = bayesian(Net())
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    fn, result = observed(model, values, x, y)
    assert fn.batch_shape == result.shape == (4,)
    samples = torch.stack(
        [
            observed(model, {k: draws(v, 1)[0] for k, v in values.items()}, x, y)[1]
            for _ in range(500)
        ]
    )
    error = 5 * samples.std(0) / math.sqrt(len(samples))
    assert torch.allclose(result, samples.mean(0), atol=0.05 + error.max().item())


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_make_fx_traces_values_and_gradients(kind):
    if kind == "classes":
        model, values = bayesian(Net())
        args = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    else:
        model = Regression()
        values = {"layer.weight": random_gaussian(1, 3), "layer.bias": random_gaussian(1)}
        args = torch.randn(4, 3).double(), torch.randn(4).double()

    def objective(locs, variances, *args):
        locs, variances = ([t.detach().requires_grad_() for t in ts] for ts in (locs, variances))
        sites = dict(zip(values, map(gaussian, locs, variances), strict=True))
        total = observed(model, sites, *args)[1].sum()
        return total, torch.autograd.grad(total, locs + variances)

    moments = [g.loc for g in values.values()], [g.variance for g in values.values()]
    graph = make_fx(objective, tracing_mode="real")(*moments, *args)
    # Other numbers than those it was traced with: nothing of them may be in the graph.
    moments = tuple([t * 0.5 for t in ts] for ts in moments)
    args = (args[0] * 2, args[1])
    (value, grads), (expected, expected_grads) = graph(*moments, *args), objective(*moments, *args)
    assert torch.allclose(value, expected)
    assert all(g.isfinite().all() and (g != 0).any() for g in expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, atol=1e-6)
