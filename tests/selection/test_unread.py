"""What nothing depends on any more goes too, for its divergence from the prior."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from networks import Regression
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.nn import bayesianize

ROWS, PRIOR = 12, 1.0


def sample(name, *shape, prior=dist.Normal):
    return pyro.sample(name, prior(torch.zeros(shape), PRIOR).to_event(len(shape)))


def make(activation, prior=dist.Normal):
    """3-4-5-2 with biases."""

    def model(x, y=None):
        h = activation(x @ sample("w1", 3, 4, prior=prior) + sample("b1", 4, prior=prior))
        h = activation(h @ sample("w2", 4, 5, prior=prior) + sample("b2", 5, prior=prior))
        mean = h @ sample("w3", 5, 2, prior=prior) + sample("b3", 2, prior=prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    return model


@pytest.fixture
def data():
    return torch.randn(ROWS, 3), torch.randn(ROWS, 2)


def live(model, data, family=AutoNormal):
    """A guide of which by itself no element is worth dropping."""
    guide = family(model, init_scale=0.05)
    guide(*data)
    if family is AutoNormal:
        for loc in guide.locs.parameters():
            loc.data.copy_(torch.where(torch.rand_like(loc) < 0.5, -1.0, 1.0))
    else:
        guide.loc.data.copy_(torch.where(torch.rand_like(guide.loc) < 0.5, -1.0, 1.0))
    return guide


def set_zero(guide, **where):
    """Put elements where the evidence drops them."""
    for name, index in where.items():
        getattr(guide.locs, name.replace("__", ".")).data[index] = 0.0
    return guide


def divergence(guide, name):
    """KL of each element from the standard normal."""
    loc, scale = getattr(guide.locs, name).detach(), getattr(guide.scales, name).detach()
    return kl_divergence(Normal(loc.double(), scale.double()), Normal(0.0, PRIOR))


EVERY = slice(None)


def test_what_produces_a_unit_that_nothing_reads(data):
    guide = set_zero(live(make(torch.tanh), data), w3=3)
    result = bmr.reduce(guide)
    expected = {name: torch.ones_like(mask) for name, mask in result.masks.items()}
    expected["w3"][3] = expected["b2"][3] = False
    expected["w2"][:, 3] = False
    for name, mask in result.masks.items():
        assert torch.equal(mask, expected[name]), name


@pytest.mark.parametrize("with_data", [False, True])
def test_through_two_layers_in_one_reduction(with_data, data):
    """A unit of the first layer is read by units of the second that nothing reads."""
    guide = live(make(torch.tanh), data)
    guide = set_zero(guide, w3=slice(0, 3), w2=(0, slice(3, 5)))
    select = bmr.by_evidence()
    result = bmr.reduce(guide, *(data if with_data else ()), select=select)
    assert not result.masks["w2"][:, :3].any() and not result.masks["b2"][:3].any()
    assert not result.masks["w1"][:, 0].any() and not result.masks["b1"][0]
    assert result.masks["w1"][:, 1:].all() and result.masks["b1"][1:].all()
    assert result.masks["w2"][1:, 3:].all() and result.masks["b3"].all()


def test_what_goes_for_nothing_else_costs_minus_its_divergence(data):
    guide = set_zero(live(make(torch.tanh), data), w3=slice(0, 3), w2=(0, slice(3, 5)))
    result = bmr.reduce(guide)
    by_spikes = sum(
        float(result.scores[name][where].sum())
        for name, where in {"w3": slice(0, 3), "w2": (0, slice(3, 5))}.items()
    )
    released = sum(
        float(part.sum())
        for part in (
            divergence(guide, "w2")[:, :3],
            divergence(guide, "b2")[:3],
            divergence(guide, "w1")[:, 0],
            divergence(guide, "b1")[0],
        )
    )
    assert result.delta_f == pytest.approx(by_spikes - released, rel=1e-6)
    rows = {row.name: row.delta_f for row in result.sites}
    assert rows["w1"] == pytest.approx(-float(divergence(guide, "w1")[:, 0].sum()), rel=1e-6)


def test_the_audit_agrees_where_all_else_is_exact(data):
    """What reads has gone before, so that what is left to go is unread alone."""
    guide = set_zero(live(make(torch.tanh), data), w3=EVERY)
    first = bmr.reduce(guide, select=lambda _: {"w3": torch.zeros(5, 2, dtype=torch.bool)})
    result = bmr.reduce(first.guide, *data, select=bmr.by_evidence())
    gone = {name: mask for name, mask in result.masks.items() if not mask.any()}
    assert gone.keys() == {"w1", "b1", "w2", "b2", "w3"}
    exact = -sum(float(divergence(guide, name).sum()) for name in ("w1", "b1", "w2", "b2"))
    assert result.delta_f == pytest.approx(exact, rel=1e-6)
    assert result.realised == pytest.approx(exact, rel=1e-4)
    audit = result.audit(*data, num_samples=10, progress=False)
    assert audit.verdict == "within error" and audit.total.error < 1e-2


def test_what_reads_a_dead_unit(data):
    """ReLU of nothing is nothing: what reads it goes."""
    guide = set_zero(live(make(torch.relu), data), w1=(EVERY, 2), b1=2)
    result = bmr.reduce(guide)
    assert not result.masks["w1"][:, 2].any() and not result.masks["b1"][2]
    assert not result.masks["w2"][2].any()
    assert result.masks["w2"][[0, 1, 3]].all() and result.masks["b2"].all()
    released = float(divergence(guide, "w2")[2].sum())
    row = next(row for row in result.sites if row.name == "w2")
    assert row.delta_f == pytest.approx(-released, rel=1e-6)


def test_a_unit_of_zeros_is_not_dead_under_a_sigmoid(data):
    guide = set_zero(live(make(torch.sigmoid), data), w1=(EVERY, 2), b1=2)
    result = bmr.reduce(guide)
    assert not result.masks["w1"][:, 2].any() and not result.masks["b1"][2]
    assert result.masks["w2"].all()


def test_a_bias_keeps_a_unit_alive(data):
    guide = set_zero(live(make(torch.relu), data), w1=(EVERY, 2))
    assert bmr.reduce(guide).masks["w2"].all()


def test_a_skip_connection_keeps_the_unit(data):
    def model(x, y=None):
        h = torch.tanh(x @ sample("w1", 3, 4))
        mean = h @ sample("w2", 4, 2) + h[:, :2]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    guide = set_zero(live(model, data), w2=EVERY)
    result = bmr.reduce(guide)
    assert not result.masks["w2"].any()
    assert result.masks["w1"][:, :2].all() and not result.masks["w1"][:, 2:].any()


def test_a_hidden_activation_that_is_returned_keeps_the_unit(data):
    def model(x, y=None):
        h = torch.tanh(x @ sample("w1", 3, 4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(h @ sample("w2", 4, 2), 0.5).to_event(1), obs=y)
        return h

    result = bmr.reduce(set_zero(live(model, data), w2=EVERY))
    assert not result.masks["w2"].any() and result.masks["w1"].all()


def test_a_functional_model(data):
    def model(x, y=None):
        mean = (x @ sample("w", 3, 4)).tanh() @ sample("v", 4, 2)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    result = bmr.reduce(set_zero(live(model, data), v=1))
    assert torch.equal(result.masks["w"], torch.tensor([True, False, True, True]).expand(3, 4))


def test_a_sum_of_constants(data):
    def model(x, y=None):
        scale = torch.tensor([0.2, 0.3]).sum()
        mean = (x @ sample("w", 3, 4)).tanh() @ sample("v", 4, 2)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    result = bmr.reduce(set_zero(live(model, data), v=1))
    assert torch.equal(result.masks["w"], torch.tensor([True, False, True, True]).expand(3, 4))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x))).mean((-1, -2))


def test_a_convolution():
    model = Regression(bayesianize(Convolutions()))
    data = torch.randn(4, 1, 6, 6), torch.randn(4, 2)
    guide = AutoNormal(model, init_scale=0.01)
    guide(*data)
    names = {name: name for name in guide.median()}
    weight = next(name for name in names if name.endswith("conv2.weight"))
    for name in names:
        loc = torch.ones_like(guide.median()[name])
        if name == weight:
            loc[:, 1] = 0.0
        _set(guide.locs, name, loc)
    result = bmr.reduce(guide)
    for name in names:
        expected = torch.ones_like(guide.median()[name], dtype=torch.bool)
        if "conv1" in name:
            expected[1] = False
        if name == weight:
            expected[:, 1] = False
        assert torch.equal(result.masks[name], expected), name


def _set(module, name, value):
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    getattr(module, last).data.copy_(value)


def test_correlated_guides_are_left_as_they_are(data):
    guide = live(make(torch.tanh), data, AutoMultivariateNormal)
    sizes = {name: value.numel() for name, value in guide.median().items()}
    start = sum(sizes[name] for name in ("w1", "b1", "w2", "b2"))
    guide.loc.data[start : start + sizes["w3"]] = 0.0
    result = bmr.reduce(guide)
    assert not result.masks["w3"].any()
    assert result.masks["w1"].all() and result.masks["w2"].all() and result.masks["b2"].all()


def test_priors_that_are_not_gaussian_are_left_as_they_are(data):
    guide = set_zero(live(make(torch.tanh, dist.Laplace), data), w3=EVERY)
    result = bmr.reduce(guide)
    assert not result.masks["w3"].any()
    assert result.masks["w1"].all() and result.masks["w2"].all() and result.masks["b2"].all()


def test_what_a_user_selects_is_what_goes(data):
    guide = set_zero(live(make(torch.tanh), data), w3=EVERY)
    own = {"w3": torch.zeros(5, 2, dtype=torch.bool)}
    result = bmr.reduce(guide, select=lambda _: own)
    assert not result.masks["w3"].any() and result.masks["w2"].all()
    total = sum(row.total for row in result.sites)
    first = bmr.reduce(guide, select=bmr.top_k(total - 10))
    assert not first.masks["w3"].any() and first.masks["w2"].all() and first.masks["b2"].all()


def test_a_model_that_cannot_be_captured(data):
    def model(x, y=None):
        w, v = sample("w", 3, 4), sample("v", 4, 2)
        mean = (x @ w).tanh() @ v if w.sum().item() > 100 else torch.tanh(x @ w) @ v
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    result = bmr.reduce(set_zero(live(model, data), v=1))
    assert result.masks["w"].all() and not result.masks["v"][1].any()
    assert any("the units of the model are not known" in note for note in result.notes)


def test_compact_takes_no_live_elements(data):
    guide = live(make(torch.relu), data)
    guide = set_zero(guide, w3=slice(0, 3), w2=(0, slice(3, 5)), w1=(EVERY, 3), b1=3)
    result = bmr.reduce(guide, *data, select=bmr.by_evidence())
    compacted = result.compact(*data)
    assert not any("live" in note for layer in compacted.layers for note in layer.notes)
    factors = [part.factor() for part in compacted.guide.parts]
    kept = {name: int(mask.sum()) for one in factors for name, mask in one.kept().items()}
    assert kept == {row.name: row.kept for row in result.sites}
    own = bmr.reduce(guide, select=lambda _: {"w3": result.masks["w3"]}).compact(*data)
    assert any("live" in note for layer in own.layers for note in layer.notes)
    before = bmr.free_energy(result.model, result.guide, *data, num_samples=40)
    after = bmr.free_energy(compacted.model, compacted.guide, *data, num_samples=40)
    assert abs(before[0] - after[0]) < 4 * (before[1] ** 2 + after[1] ** 2) ** 0.5


def test_laws(data):
    guide = set_zero(live(make(torch.tanh), data), w3=slice(0, 3), w2=(0, slice(3, 5)))
    before = copy.deepcopy(guide.state_dict())
    result = bmr.reduce(guide, *data, select=bmr.by_evidence())
    # 1: names and shapes, and exact zeros in every draw.
    for _ in range(3):
        for name, value in result.guide(*data).items():
            assert value.shape == guide.median()[name].shape
            assert (value[~result.masks[name]] == 0).all()
    # 2: the loss of Pyro is the free energy.
    losses = [Trace_ELBO().loss(result.model, result.guide, *data) for _ in range(40)]
    loss, its_error = mean_and_error(torch.tensor(losses, dtype=torch.float64))
    mean, error = bmr.free_energy(result.model, result.guide, *data, num_samples=40)
    assert abs(loss - mean) < 4 * (error**2 + its_error**2) ** 0.5
    # 4: it can be reduced again, and reductions compose.
    again = bmr.reduce(result.guide, select=bmr.by_evidence())
    for name, mask in again.masks.items():
        assert torch.equal(mask & result.masks[name], mask)
    parts = bmr.reduce(
        bmr.reduce(guide, select=lambda _: {"w1": result.masks["w1"]}).guide,
        select=lambda _: {n: m for n, m in result.masks.items() if n != "w1"},
    )
    for name, mask in result.masks.items():
        assert torch.equal(parts.guide.median(*data)[name] != 0, mask & (guide.median()[name] != 0))
    # 5: the guide is as it was.
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
