"""Compacted models compute what masked ones do, whatever was pruned, and remain models."""

import copy
import functools
import warnings

import networks
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from often import often
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr import compaction as module
from pyro_bmr.compaction import compact
from pyro_bmr.graphs.capture import capture
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.nn import LAYERS, bayesianize
from pyro_bmr.selection.decision import assemble
from pyro_bmr.units.axes import find_structure


def residual_cnn_with_norms():
    """Two residual blocks, of which BatchNorm has sites too."""
    layers = (*LAYERS, nn.BatchNorm2d)
    model = networks.Regression(bayesianize(networks.make_residual_cnn(), layers=layers))
    return networks._make(model.eval(), (torch.randn(2, 3, 8, 8),), (2, 4))


NETWORKS = networks.NETWORKS | {"residual_cnn_with_norms": residual_cnn_with_norms}


@functools.cache
def prepared(name):
    """A network, the factors of a guide, and its structure."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with pyro.get_param_store().scope():
        guide = AutoNormal(network.model, init_loc_fn=init_to_sample, init_scale=0.1)
        guide(*network.args)
        factors = tuple(read_guide(guide))
    values = {n: value for f in factors for n, value in f.locations().items()}
    sites = {site.name: site for f in factors for site in f.sites}
    values = {n: sites[n].constrain(value).detach() for n, value in values.items()}
    captured = capture(network.model, network.args, {}, values)
    return network, factors, captured, find_structure(captured)


@pytest.fixture
def prepared_once(monkeypatch):
    """Capture each network once, and leave the check of `compact` to the test."""
    known = {}

    def captured_before(model, args, kwargs, values):
        return (args, kwargs), known[id(model)][0]

    def structure_before(captured):
        return known[id(captured)][1]

    def prepare(name):
        network, factors, captured, structure = prepared(name)
        known[id(network.model)] = known[id(captured)] = captured, structure
        return network, factors, structure

    monkeypatch.setattr(module, "capture_few_rows", captured_before)
    monkeypatch.setattr(module, "find_structure", structure_before)
    monkeypatch.setattr(module, "check_same", lambda *_: None)
    return prepare


def prune(network, factors, masks):
    """A masked model and its guide."""
    remaining = tuple(factor.prune(masks) for factor in factors)
    model, guide, _ = assemble(Origin(network.model, network.args), remaining, {})
    return model, guide


KINDS = ("nothing", "everything", "elements", "rows", "columns", "most")


def draw_masks(data, factors, structure):
    """Prune elements, rows, columns, or whole units, or all or nothing of a site."""
    seed = data.draw(st.integers(0, 2**31 - 1), "seed")
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for factor in factors:
        (site,) = factor.sites
        kind = data.draw(st.sampled_from(KINDS), site.name)
        mask = torch.ones(site.shape, dtype=torch.bool)
        if kind == "everything":
            mask[...] = False
        elif kind in {"elements", "most"}:
            share = 0.5 if kind == "elements" else 0.05
            mask = torch.rand(site.shape, generator=generator) < share
        elif kind != "nothing" and mask.dim():
            dim = 0 if kind == "rows" else mask.dim() - 1
            left = torch.rand(mask.shape[dim], generator=generator) < 0.4
            mask = mask & left.reshape([-1 if d == dim else 1 for d in range(mask.dim())])
        masks[site.name] = mask
    for layer in structure.layers:
        how = data.draw(st.sampled_from(["", "made", "read", "made"]), layer.name)
        if how and layer.kind != "input":
            gone = layer.units[torch.rand(len(layer.units), generator=generator) < 0.6]
            for name, axes in structure.sites.items():
                for dim, axis in enumerate(axes):
                    if axis.reads == (how == "read"):
                        masks[name].transpose(0, dim)[torch.isin(axis.units, gone)] = False
    return masks


def output(model, values, args):
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    return trace.nodes["y"]["fn"].mean


def draw(guide, args, seed):
    torch.manual_seed(seed)
    nodes = poutine.trace(guide).get_trace(*args).nodes
    return {
        name: node["value"].detach()
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not node["infer"].get("is_auxiliary")
        and isinstance(node["fn"], dist.TorchDistribution)
    }


def shrink(values, compaction):
    """Leave of values what the compacted model has."""
    result = {}
    for name, value in values.items():
        for dim, index in enumerate(compaction.kept.get(name, ())):
            value = value if index is None else value.index_select(dim, index)
        result[name] = value
    return result


def assert_same(model, guide, compaction, args, tolerance=1e-6):
    """At the posterior's location, and for a draw with the same noise."""
    with torch.no_grad():
        for values in (guide.median(), draw(guide, args, 1)):
            expected = output(model, values, args)
            found = output(compaction.model, shrink(values, compaction), args)
            assert expected.isfinite().all()
            assert (expected - found).abs().max() <= tolerance * expected.abs().max()


MASKED = ("module_mlp", "lenet", "gru_cell", "residual_cnn", "functional_gru")
MASKS = [(name, 40 if name == "gru_cell" else 20) for name in MASKED]
MASKS += [
    pytest.param(name, 200, marks=pytest.mark.rare)
    for name in (*MASKED, "residual_cnn_with_norms", "vit")
]


@pytest.mark.parametrize(("name", "examples"), MASKS)
def test_compacted_equals_masked(name, examples, prepared_once):
    network, factors, structure = prepared_once(name)
    sizes = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        masks = draw_masks(data, factors, structure)
        model, guide = prune(network, factors, masks)
        compaction = compact(model, guide)
        assert_same(model, guide, compaction, network.args)
        sizes.add(compaction.elements[1])

    check()
    assert len(sizes) >= 3


def make_result(name, seed=0, share=0.3):
    """A reduction of a network, with random elements pruned."""
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    guide = AutoNormal(network.model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*network.args)
    return network, bmr.reduce(guide, select=lambda scores: random_masks(scores, share, seed))


def random_masks(scores, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(t.shape, generator=generator).to(t.device) < share
        for name, t in scores.delta_f.items()
    }


@pytest.mark.parametrize("name", often(NETWORKS, *MASKED))
def test_every_network(name):
    network, result = make_result(name, share=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compaction = result.compact()
    if name != "noncentred":
        assert_same(result.model, result.guide, compaction, network.args)
    before = set(result.guide(*network.args))
    assert set(compaction.guide(*network.args)) == before
    assert [layer.name in str(compaction) for layer in compaction.layers]
    assert len(compaction.summary()) == len(compaction.layers)
    again = bmr.reduce(compaction.guide, select=lambda s: random_masks(s, 0.7)).compact()
    assert set(again.guide(*network.args)) == before


def unit_gone(scores):
    """The first two units of module_mlp, with all that reads them."""
    masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in scores.delta_f.items()}
    masks["net.0.weight"][:2] = False
    masks["net.0.bias"][:2] = False
    masks["net.2.weight"][:, :2] = False
    return masks


def make_mlp_result(select=unit_gone, guide_type=AutoNormal):
    torch.manual_seed(1)
    network = networks.module_mlp()
    guide = guide_type(network.model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*network.args)
    return network, bmr.reduce(guide, select=select)


def elbo_at(model, guide, values, args):
    """Minus the ELBO at a draw: ln q - ln p."""
    guide_trace = poutine.trace(poutine.condition(guide, values)).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    return (guide_trace.log_prob_sum() - model_trace.log_prob_sum()).item()


def test_free_energy_is_that_of_the_masked_model_when_only_pruned_elements_went():
    network, result = make_mlp_result()
    compaction = result.compact()
    assert compaction.guide.median()["net.0.weight"].shape == (5, 5)
    for seed in range(3):
        torch.manual_seed(seed)
        trace = poutine.trace(result.guide).get_trace(*network.args)
        values = {
            n: node["value"] for n, node in trace.nodes.items() if n.endswith("_unconstrained")
        }
        kept = {f"{n}_unconstrained": k for n, k in compaction.kept.items()}
        fake = type("", (), {"kept": kept})
        full = elbo_at(result.model, result.guide, values, network.args)
        small = elbo_at(compaction.model, compaction.guide, shrink(values, fake), network.args)
        assert small == pytest.approx(full, rel=1e-5)


def test_elements_of_unread_units_leave_the_free_energy():
    def unread(scores):
        masks = unit_gone(scores)
        masks["net.0.weight"][:2] = True
        return masks

    _, result = make_mlp_result(unread)
    compaction = result.compact()
    assert compaction.guide.median()["net.0.weight"].shape == (5, 5)
    assert "2 unread, with live elements" in str(compaction)


def test_a_dead_unit_whose_bias_lives_stays_and_is_reported():
    def biased(scores):
        masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in scores.delta_f.items()}
        masks["net.0.weight"][3] = False
        return masks

    _, result = make_mlp_result(biased)
    compaction = result.compact()
    assert not compaction.kept
    assert "1 constant: its bias lives" in str(compaction)


def test_inputs_go_only_when_asked():
    def unused(scores):
        masks = unit_gone(scores)
        masks["net.0.weight"][:, 3] = False
        return masks

    network, result = make_mlp_result(unused)
    stays = result.compact()
    assert not stays.inputs
    assert stays.used_inputs["args[0]"][1].tolist() == [0, 1, 2, 4]
    smaller = result.compact(inputs=True)
    (x, y), _ = smaller.take_inputs(*network.args)
    assert x.shape == (4, 4)
    values = result.guide.median()
    expected = output(result.model, values, network.args)
    found = output(smaller.model, shrink(values, smaller), (x, y))
    torch.testing.assert_close(found, expected)
    assert smaller.guide(x, y)["net.0.weight"].shape == (5, 4)
    bmr.reduce(smaller.guide).compact()


def test_a_layer_that_dies_keeps_a_unit():
    def nothing(scores):
        return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in scores.delta_f.items()}

    network, result = make_mlp_result(nothing)
    compaction = result.compact()
    assert compaction.guide.median()["net.2.weight"].shape == (1, 1)
    assert_same(result.model, result.guide, compaction, network.args)
    assert set(compaction.guide(*network.args)) == set(network.sites)


def test_correlated_posteriors_are_marginalised():
    def unread(scores):
        masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in scores.delta_f.items()}
        masks["net.2.weight"][:, :2] = False
        return masks

    torch.manual_seed(1)
    network = networks.module_mlp()
    guide = AutoMultivariateNormal(network.model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*network.args)
    with torch.no_grad():
        lower = torch.randn(guide.scale_tril.shape).tril(-1) * 0.3
        guide.scale_tril = torch.eye(len(lower)) + lower
    result = bmr.reduce(guide, select=unread)
    compaction = result.compact()
    full, small = (read_guide(r.guide)[0].marginals() for r in (result, compaction))
    for name, marginal in small.items():
        for field in ("loc", "scale"):
            expected = shrink({name: getattr(full[name], field)}, compaction)[name]
            torch.testing.assert_close(getattr(marginal, field), expected)
    assert_same(result.model, result.guide, compaction, network.args)


def test_reduce_compact_fit_reduce_compact():
    network, result = make_mlp_result(lambda scores: random_masks(scores, 0.5))
    compaction = result.compact()
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    for estimator in ("global", "local"):
        bmr.fit(
            compaction.model, compaction.guide, *network.args,
            num_epochs=3, batch_size=4, lr=1e-2, estimator=estimator,
        )  # fmt: skip
    for name, value in before.items():
        assert torch.equal(pyro.get_param_store()[name], value)
    for name, mask in compaction.model.masks.by_site().items():
        assert (compaction.guide.median()[name][~mask] == 0).all()
    second = bmr.reduce(compaction.guide, select=lambda s: random_masks(s, 0.5, 3))
    again = second.compact()
    assert again.elements[1] < compaction.elements[1]
    assert_same(second.model, second.guide, again, network.args)
    assert set(again.guide.median()) == set(network.sites)


def test_svi_trains_the_smaller_parameters_and_leaves_the_full_ones():
    network, result = make_result("residual_cnn", share=0.0)
    result.model.train()
    compaction = result.compact()
    full = network.model.net[3].norm1
    kept = [t.detach().clone() for t in (full.weight, full.bias, full.running_mean)]
    assert compaction.guide.median()["net.3.conv1.weight"].shape[0] == 1
    svi = SVI(compaction.model, compaction.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*network.args)
    for now, before in zip((full.weight, full.bias, full.running_mean), kept, strict=True):
        assert torch.equal(now, before)
    own = {n: v for n, v in pyro.get_param_store().items() if n.startswith("CompactedModel")}
    assert any(n.endswith("norm1/weight") and v.shape == (1,) for n, v in own.items())
    assert "net.3.norm1.weight" not in svi_parameters(compaction, network.args)


def svi_parameters(compaction, args):
    trace = poutine.trace(compaction.model, param_only=True).get_trace(*args)
    return set(trace.nodes)


def make_closure_model():
    """Explicit sizes, a constant along the units, and a parameter of the param store."""
    scales, norm = torch.rand(6) + 0.5, nn.BatchNorm1d(6).eval()
    norm.running_mean.uniform_()

    def model(x, y=None):
        h = torch.zeros(len(x), 6) + x @ networks._normal("w1", 3, 6)
        gain = pyro.param("gain", lambda: torch.rand(6) + 0.5)
        h = norm(h) * gain * scales.expand(len(x), 6)
        h = torch.relu(h).view(len(x), 2, 3).reshape(len(x), 6)
        a, b = (h @ networks._normal("w2", 6, 8)).split(4, dim=1)
        a = torch.cat([a[:, :2], a[:, 2:]], 1)
        state = x.new_full((len(x), 4), 0.0)
        for _ in range(3):
            state = torch.tanh(state + a * b)
        return networks._observe(state @ networks._normal("w3", 4, 2), y)

    return model


def test_closures_constants_parameters_and_written_sizes():
    torch.manual_seed(0)
    model, args = make_closure_model(), (torch.randn(5, 3), torch.randn(5, 2))
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)

    def cut(scores):
        masks = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in scores.delta_f.items()}
        masks["w2"][[0, 3, 4, 1]] = False
        masks["w3"][1] = False
        return masks

    result = bmr.reduce(guide, select=cut)
    compaction = result.compact()
    assert compaction.guide.median()["w3"].shape == (3, 2)
    assert_same(result.model, result.guide, compaction, args)
    # Other batch sizes are no other path.
    x = torch.randn(9, 3)
    assert Predictive(compaction.model, guide=compaction.guide, num_samples=4)(x)["y"].shape == (
        4, 9, 2,
    )  # fmt: skip


def test_law_6_copies_moves_and_state_dicts():
    network, result = make_result("residual_cnn", share=0.0)
    compaction = result.compact()
    copied = copy.deepcopy(compaction)
    values = shrink(result.guide.median(), compaction)
    expected = output(compaction.model, values, network.args)
    torch.testing.assert_close(output(copied.model, values, network.args), expected)
    with torch.no_grad():
        for parameter in (*copied.model.parameters(), *copied.guide.parameters()):
            parameter.add_(0.5)
    torch.testing.assert_close(output(compaction.model, values, network.args), expected)
    copied.model.load_state_dict(compaction.model.state_dict())
    copied.guide.load_state_dict(compaction.guide.state_dict())
    torch.testing.assert_close(output(copied.model, values, network.args), expected)
    as_double = copied.model.double()
    doubled = {name: value.double() for name, value in values.items()}
    x, y = (t.double() for t in network.args)
    torch.testing.assert_close(output(as_double, doubled, (x, y)).float(), expected)


def make_batched_model():
    def model(x, y=None):
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(3, 6), 1.0).to_event(2))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        # Draws in parallel come with one dimension or two before the event.
        h = torch.relu(x @ w1.reshape(-1, *w1.shape[-2:]))
        mean = (h * w2.reshape(-1, 1, w2.shape[-1])).sum(-1).squeeze(0)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model


def test_predictive_and_particles_in_parallel():
    torch.manual_seed(0)
    model, args = make_batched_model(), (torch.randn(5, 3), torch.randn(5))
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=1e-4)
    guide(*args)

    def cut(scores):
        return {"w2": torch.arange(6) > 2}

    result = bmr.reduce(guide, select=cut)
    compaction = result.compact()
    assert compaction.guide.median()["w1"].shape == (3, 3)
    draws = Predictive(compaction.model, guide=compaction.guide, num_samples=7, parallel=True)
    assert draws(args[0])["y"].shape == (7, 5)
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    one = Trace_ELBO().loss(compaction.model, compaction.guide, *args)
    assert elbo.loss(compaction.model, compaction.guide, *args) == pytest.approx(one, rel=0.02)


def test_shrunk_priors_are_cut_too():
    torch.manual_seed(0)
    network = networks.plated_mlp()
    guide = AutoNormal(network.model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*network.args)
    shrunk = bmr.reduce(
        guide,
        reduced_prior=bmr.Gaussian(0.0, torch.rand(7) + 0.1),
        sites=["w1"],
        select=lambda scores: {"w1": torch.zeros(5, 7, dtype=torch.bool)},
    )
    result = bmr.reduce(
        shrunk.guide, select=lambda scores: {"w2": (torch.arange(7) % 2 == 0)[:, None].expand(7, 2)}
    )
    compaction = result.compact()
    assert compaction.guide.median()["w1"].shape == (5, 4)
    prior = poutine.trace(compaction.model).get_trace(*network.args).nodes["w1"]["fn"]
    full = poutine.trace(result.model).get_trace(*network.args).nodes["w1"]["fn"]
    torch.testing.assert_close(prior.base_dist.scale, full.base_dist.scale[:, ::2])


LOC = torch.zeros(7, 3)


def observe_units(w, x, y):
    with pyro.plate("rows", 7, dim=-2), pyro.plate("out", 2, dim=-1):
        v = pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0))
    return networks._observe(torch.relu(x @ w.T) @ v, y)


def plate_with_written_sizes(x, y=None):
    with pyro.plate("hidden", 7):
        w = pyro.sample("w", dist.Normal(torch.zeros(7, 3), 1.0).to_event(1))
    return observe_units(w, x, y)


def plate_with_constant(x, y=None):
    with pyro.plate("hidden", 7):
        w = pyro.sample("w", dist.Normal(LOC, 1.0).to_event(1))
    return observe_units(w, x, y)


def plate_with_indices(x, y=None):
    with pyro.plate("hidden", 7) as index:
        w = pyro.sample("w", dist.Normal(LOC[index], 1.0).to_event(1))
    return observe_units(w, x, y)


def plate_with_parent(x, y=None):
    with pyro.plate("hidden", 7):
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(7)))
        w = pyro.sample("w", dist.Normal(0.0, tau[:, None].expand(7, 3)).to_event(1))
    return observe_units(w, x, y)


def plate_with_parameter(x, y=None):
    with pyro.plate("hidden", 7):
        start, positive = (lambda: torch.rand(7, 3) + 0.5), dist.constraints.positive
        scale = pyro.param("scale", start, constraint=positive, event_dim=1)
        w = pyro.sample("w", dist.Normal(0.0, scale).to_event(1))
    return observe_units(w, x, y)


@pytest.mark.parametrize(
    "model",
    [plate_with_written_sizes, plate_with_constant, plate_with_indices, plate_with_parent,
     plate_with_parameter],
)  # fmt: skip
def test_plates_over_units(model):
    torch.manual_seed(0)
    args = torch.randn(4, 3), torch.randn(4, 2)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)
    cut = {"v": ((torch.arange(7) % 3) > 0)[:, None].expand(7, 2)}
    result = bmr.reduce(guide, select=lambda scores: cut)
    compaction = result.compact()
    # What takes units by their number keeps them where they are.
    left = 7 if model is plate_with_indices else 4
    assert compaction.guide.median()["w"].shape == (left, 3)
    assert_same(result.model, result.guide, compaction, args)
    bmr.fit(compaction.model, compaction.guide, *args, num_epochs=2, batch_size=4, lr=0.01)


class Parametrised(PyroModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = PyroModule[nn.Linear](3, 6), PyroModule[nn.Linear](6, 2)
        self.a.weight = PyroSample(dist.Normal(0.0, torch.ones(6, 3)).to_event(2))
        self.b.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 6]).to_event(2))
        self.gain = PyroParam(torch.rand(6) + 0.5, constraint=dist.constraints.positive)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x, y=None):
        return networks._observe(self.b(torch.relu(self.norm(self.a(x)) * self.gain)), y)


def test_parameters_are_trained_by_every_estimator():
    torch.manual_seed(0)
    model, args = Parametrised().eval(), (torch.randn(4, 3), torch.randn(4, 2))
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)
    cut = {"b.weight": (torch.arange(6) % 3 > 0).expand(2, 6)}
    compaction = bmr.reduce(guide, select=lambda scores: cut).compact()
    for estimator in ("global", "local", "moments"):
        bmr.fit(
            compaction.model, compaction.guide, *args,
            num_epochs=2, batch_size=4, lr=0.01, estimator=estimator,
        )  # fmt: skip
    own = {n.split("/")[-1]: v for n, v in pyro.get_param_store().items() if "Compacted" in n}
    assert own["gain"].shape == (4,)
    assert (own["gain"] > 0).all()
    assert not torch.equal(own["gain"], model.gain[[1, 2, 4, 5]])


class AttentionNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.enter(x)
        return self.leave((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


class RecurrentNetwork(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(6, 2)
        self.memory = getattr(nn, kind)(4, 5, batch_first=True)
        self.out = nn.Linear(5, 6)

    def forward(self, x):
        return self.leave(self.out(self.memory(self.enter(x))[0][:, -1]).tanh())


class DirectNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 15), nn.Linear(5, 15)
        self.leave = nn.Linear(5, 2)

    def forward(self, x):
        weights = [self.inner.weight, self.outer.weight, self.inner.bias, self.outer.bias]
        start = x.new_zeros(1, len(x), 5)
        h, _ = torch.gru(x, start, weights, True, 1, 0.0, False, False, True)
        return self.leave(h[:, -1])


class CheckedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.enter(x).mean(1).tanh()
        assert h.shape[-1] == 5
        return self.leave(h)


def reduce_sequence_model(net, cut, **options):
    torch.manual_seed(0)
    layers = (*LAYERS, nn.MultiheadAttention, nn.RNNBase)
    model = networks.Regression(bayesianize(net, layers=layers))
    args = torch.randn(4, 6, 3), torch.randn(4, 2)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)

    def select(scores):
        masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in scores.delta_f.items()}
        cut(masks)
        return masks

    return bmr.reduce(guide, select=select, **options), args


def test_heads_of_torch_attention():
    def cut(masks):
        masks["net.attention.out_proj.weight"][:, :4] = False

    result, args = reduce_sequence_model(AttentionNetwork(), cut)
    compaction = result.compact()
    assert compaction.guide.median()["net.attention.in_proj_weight"].shape == (12, 8)
    for batch, steps in ((4, 6), (3, 5), (8, 8)):
        args = torch.randn(batch, steps, 3), torch.randn(batch, 2)
        assert_same(result.model, result.guide, compaction, args)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_units_of_fused_recurrent_layers_stay_which_reduce_tells(kind):
    def cut(masks):
        assert [*masks] == ["net.enter.weight", "net.memory.weight_ih_l0", "net.out.weight"]
        for mask in masks.values():
            mask[:2] = False

    net = RecurrentNetwork(kind)
    result, args = reduce_sequence_model(net, cut, groups=bmr.units)
    told = "not cut units out of net.enter.weight, net.memory.weight_ih_l0: torch.nn.RNN, LSTM and"
    assert told in result.notes[0]
    compaction = result.compact(inputs=True)
    assert [(layer.before, layer.after) for layer in compaction.layers] == [
        *((4, 4), (5, 5), (6, 4), (3, 3))
    ]
    kept = {"2 kept: torch.nn.RNN, LSTM and GRU check their sizes"}
    assert {*compaction.summary()["note"][:2]} == kept
    assert_same(result.model, result.guide, compaction, args)


def test_units_of_the_fused_operation_itself_are_cut():
    def cut(masks):
        (mask,) = masks.values()
        mask[:2] = False

    result, args = reduce_sequence_model(DirectNetwork(), cut, groups=bmr.units)
    assert not any("compact()" in note for note in result.notes)
    compaction = result.compact()
    assert compaction.guide.median()["net.outer.weight"].shape == (9, 3)
    assert_same(result.model, result.guide, compaction, args)


def test_a_module_that_checks_its_sizes_is_named():
    def cut(masks):
        masks["net.leave.weight"][:, :2] = False

    result, _ = reduce_sequence_model(CheckedNetwork(), cut)
    with pytest.raises(RuntimeError, match="AssertionError in a PyroCheckedNetwork"):
        result.compact()


def test_depthwise_convolutions_and_one_recorded_size_among_several():
    torch.manual_seed(0)

    def model(x, y=None):
        first = torch.relu(F.conv2d(x, networks._normal("w1", 6, 3, 3, 3)))
        deep = F.conv2d(first, networks._normal("d", 6, 1, 3, 3), groups=6)
        h = F.conv2d(deep, networks._normal("w2", 6, 6, 1, 1)).mean((2, 3)).view(-1, 6)
        return networks._observe(torch.relu(h).view(-1, 6) @ networks._normal("w3", 6, 4), y)

    args = torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(*args)
    w2, w3 = torch.ones(6, 6, 1, 1, dtype=torch.bool), torch.ones(6, 4, dtype=torch.bool)
    w2[:, [1, 4]] = False
    w3[2] = False
    result = bmr.reduce(guide, select=lambda scores: {"w2": w2, "w3": w3})
    compaction = result.compact()
    shapes = {name: tuple(value.shape) for name, value in compaction.guide.median().items()}
    assert shapes["d"] == (4, 1, 3, 3)
    assert shapes["w2"] == (5, 4, 1, 1)
    assert_same(result.model, result.guide, compaction, args)


def test_bad_input():
    network, result = make_mlp_result()
    with pytest.raises(TypeError, match="Expected the model and the guide of a reduction"):
        compact(network.model, result.guide)
    with pytest.raises(RuntimeError, match="could not be captured"):
        result.compact(torch.randn(4, 9))


def test_a_program_that_looks_at_its_sizes_is_refused():
    def model(x, y):
        w = networks._normal("w", 3, 6)
        h = torch.tanh(x @ w)
        return networks._observe(h @ networks._normal("v", 6, 2) * h.shape[1], y)

    guide = AutoNormal(model, init_loc_fn=init_to_sample)
    guide(torch.randn(4, 3), torch.randn(4, 2))
    cut = {"v": (torch.arange(6) > 2)[:, None].expand(6, 2)}
    result = bmr.reduce(guide, select=lambda scores: cut)
    with pytest.raises(RuntimeError, match="does not compute what the masked one does"):
        result.compact()
