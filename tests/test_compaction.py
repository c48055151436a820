"""Compacted models compute what masked ones do, whatever was pruned, and remain models."""

import functools

import networks
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import nn

from pyro_bmr import compaction as module
from pyro_bmr.compaction import compact
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.nn import LAYERS, bayesianize
from pyro_bmr.problem import assemble
from pyro_bmr.smaller import checking
from pyro_bmr.structure.axes import find_structure
from pyro_bmr.structure.capture import capture


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
        return known[id(model)][0]

    def structure_before(captured):
        return known[id(captured)][1]

    def prepare(name):
        network, factors, captured, structure = prepared(name)
        known[id(network.model)] = known[id(captured)] = captured, structure
        return network, factors, structure

    monkeypatch.setattr(module, "capture", captured_before)
    monkeypatch.setattr(module, "find_structure", structure_before)
    monkeypatch.setattr(checking, "NUM_DRAWS", 0)
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
    with torch.no_grad():
        for values in (guide.median(), draw(guide, args, 1)):
            expected = output(model, values, args)
            found = output(compaction.model, shrink(values, compaction), args)
            assert expected.isfinite().all()
            assert (expected - found).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    ["module_mlp", "functional_gru", "gru_cell", "lenet", "residual_cnn", "residual_cnn_with_norms",
     "vit"],
)  # fmt: skip
def test_compacted_equals_masked(name, prepared_once):
    network, factors, structure = prepared_once(name)
    sizes = set()

    @settings(
        max_examples=200 if name not in {"gru_cell", "residual_cnn"} else 50,
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
    assert len(sizes) > 4
