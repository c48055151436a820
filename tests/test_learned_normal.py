"""A prior whose scales are learned with the posterior: against exact regression and formulas."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.programs.distributions import find_core

NOISE = 0.5


class Regression(PyroModule):
    """A network with Gaussian noise."""

    def __init__(self, net, scale=1.0):
        super().__init__()
        self.net = bmr.bayesianize(net, prior=bmr.nn.learned_normal(scale))

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def falling(done):
    return 0.05 * min(1.0, 1.99 - 1.98 * done)


@pytest.fixture(scope="module")
def linear():
    """A trained regression on orthogonal columns, whose posterior is exact in the mean field."""
    x = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))[0] * 8
    noise = torch.randn(64, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([1.0, -0.5, 0.2, 0.0, 0.0]) + NOISE * noise
    model = Regression(nn.Linear(5, 1, bias=False))
    guide = AutoNormal(model, init_scale=0.05)
    bmr.fit(model, guide, x, y, num_epochs=600, lr=falling, estimator="moments", seed=0)
    return model, guide, x, y


def test_scales_maximise_the_evidence_of_a_regression(linear):
    """MacKay (1992): τ² = max(0, ŵ² − s²) for least squares ŵ of variance s²."""
    model, _, x, y = linear
    least_squares, variance = x.T @ y / 64, NOISE**2 / 64
    best = (least_squares.square() - variance).clamp(min=0).sqrt()
    learned = model.net.weight_prior_scale.detach()[0]
    needed = best > 0
    assert 0 < needed.sum() < 5
    torch.testing.assert_close(learned[needed], best[needed], rtol=0.02, atol=0)
    assert (learned[~needed] < 0.05).all()


def test_evidence_of_what_goes_is_that_of_the_formula(linear):
    model, guide, x, y = linear
    result = bmr.reduce(guide, x, y, model=model, select=bmr.by_evidence(margin=-10.0))
    loc, scale = (getattr(guide, part).net.weight.detach() for part in ("locs", "scales"))
    ratio = (loc / scale).square()
    rise = 0.5 * (ratio - ratio.log1p()).double()
    gone = ~result.masks["net.weight"]
    assert gone.any() and (rise[gone] <= 10.1).all() and (rise[~gone] > 9.9).all()
    assert result.delta_f == pytest.approx(rise[gone].sum().item(), abs=0.05)


def test_nothing_goes_without_a_margin(linear):
    """No element of one scale of its own has evidence against it."""
    model, guide, _, _ = linear
    result = bmr.reduce(guide, model=model, select=bmr.by_evidence(margin=0.05))
    assert result.masks == {} or all(mask.all() for mask in result.masks.values())


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    return x, x[:, :2].prod(1) + 0.1 * torch.randn(200, generator=generator)


def make_network():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))


def train_network(data):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = Regression(make_network(), 2.0)
    guide = AutoNormal(model, init_loc_fn=bmr.init_to_pretrained(model), init_scale=0.05)
    bmr.fit(model, guide, *data, num_epochs=300, lr=falling, estimator="local", seed=0)
    return model, guide


@pytest.fixture(scope="module")
def network(data):
    return train_network(data)


def read_scales(model, data):
    nodes = poutine.trace(model).get_trace(*data).nodes
    fns = {n: nodes[n]["fn"] for n in nodes if n.endswith(("weight", "bias"))}
    cores = {n: find_core(fn) for n, fn in fns.items()}
    return {n: getattr(c, "base_dist", c).scale.detach().clone() for n, c in cores.items()}


def test_what_is_compacted_learns_on(network, data):
    model, guide = network
    small = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence(margin=-0.5)).compact(
        *data
    )
    shapes = {n: v.shape for n, v in small.guide.median().items()}
    units = shapes["net.0.bias"].numel()
    assert units < 12
    scales = read_scales(small.model, data)
    assert {n: s.shape for n, s in scales.items()} == shapes
    losses = bmr.fit(small.model, small.guide, *data, num_epochs=100, lr=0.003, seed=0)
    assert sum(losses[-20:]) < sum(losses[:20])
    learned = read_scales(small.model, data)
    changed = {n: (learned[n] != before).sum() for n, before in scales.items()}
    assert all(changed[n] == kept.sum() for n, kept in small.model.masks.by_site().items())
    again = bmr.reduce(small.guide, *data, select=bmr.by_evidence(margin=-0.5))
    assert all(mask.shape == shapes[name] for name, mask in again.masks.items())


def test_what_is_compacted_can_be_reduced_at_once(network, data):
    """Its scales come into the param store when the model first runs."""
    model, guide = network
    keep_half = {"select": bmr.top_k(30)}
    small = bmr.reduce(guide, model=model, **keep_half).compact(*data)
    before = bmr.reduce(small.guide, **keep_half)
    small.model(*data)
    after = bmr.reduce(small.guide, **keep_half)
    assert sum(int((~mask).sum()) for mask in before.masks.values()) > 0
    assert not before.summary()["note"].str.startswith("not reduced").any()
    for name, mask in after.masks.items():
        assert torch.equal(mask, before.masks[name])


def test_learned_scales_are_pickled_and_saved(network, data, tmp_path):
    net = bmr.bayesianize(nn.Linear(2, 1), prior=bmr.nn.learned_normal())
    same = pickle.loads(pickle.dumps(net))
    assert torch.equal(same.weight_prior_scale, net.weight_prior_scale)

    model, guide = network
    small = bmr.reduce(guide, model=model, select=bmr.by_evidence(margin=-0.5)).compact(*data)
    bmr.fit(small.model, small.guide, *data, num_epochs=5, lr=0.003, seed=0)
    expected = read_scales(small.model, data)
    small.save(tmp_path / "small.bmr")
    other = Regression(make_network(), 2.0)
    read = bmr.load(tmp_path / "small.bmr", other, *data)
    found = read_scales(read.model, data)
    for name, scale in expected.items():
        torch.testing.assert_close(found[name], scale)


@pytest.mark.rare
def test_prune_learns_the_scales(data):
    """As long as it trains: they follow the posterior of what is kept."""
    model, guide = train_network(data)
    before = read_scales(model, data)
    result = bmr.prune(
        *(model, guide, *data),
        num_epochs=20,
        max_rounds=1,
        select=bmr.by_evidence(margin=-0.5),
        algorithm="paper",
        lr=0.01,
        seed=0,
    )
    scales, means = read_scales(result.model, data), result.guide.median()
    kept = {n: result.masks[n] for n in ("net.0.weight", "net.2.weight")}
    assert all(mask.any() and not mask.all() for mask in kept.values())
    for name, mask in kept.items():
        assert (scales[name][mask] != before[name][mask]).all()
        large = mask & (means[name].abs() > 0.3)
        assert large.any()
        torch.testing.assert_close(scales[name][large], means[name].abs()[large], rtol=0.3, atol=0)


def test_scales_stay_scales_in_a_network_that_is_made_bayesian_again():
    inner = bmr.bayesianize(nn.Linear(3, 2), prior=bmr.nn.learned_normal())
    net = bmr.bayesianize(nn.Sequential(inner, nn.Linear(2, 1)))
    trace = poutine.trace(net).get_trace(torch.zeros(4, 3))
    assert trace.stochastic_nodes == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(list(net.parameters())) == 2
    with pytest.raises(ValueError, match="nothing|no "):
        bmr.bayesianize(inner)


def test_the_name_of_the_scales_must_be_free():
    layer = nn.Linear(3, 2)
    layer.register_buffer("weight_prior_scale", torch.ones(2, 3))
    with pytest.raises(ValueError, match="attribute 'weight_prior_scale' already"):
        bmr.bayesianize(layer, prior=bmr.nn.learned_normal())


def test_filters_tables_and_shared_weights_have_scales():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5)
            self.out.weight = self.words.weight

        def forward(self, x):
            return self.out(self.words(x))

    net = bmr.bayesianize(Shared(), prior=bmr.nn.learned_normal())
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    assert shapes == {
        "words.weight_prior_scale_unconstrained": (5, 4),
        "out.bias_prior_scale_unconstrained": (5,),
    }
    assert net(torch.tensor([[1, 0]])).shape == (1, 2, 5)
    filters = bmr.bayesianize(nn.Conv2d(2, 3, 5), prior=bmr.nn.learned_normal())
    torch.testing.assert_close(filters.weight_prior_scale, torch.full((3, 2, 5, 5), 50**-0.5))
