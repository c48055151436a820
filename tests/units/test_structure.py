"""Units of models: against torch-pruning, against what the networks compute, and by hand."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Regression, _make, _normal, _observe, make_residual_cnn
from pyro import poutine
from torch import nn
from torch.nn import functional as F

from pyro_bmr.graphs.capture import capture
from pyro_bmr.nn import LAYERS, bayesianize
from pyro_bmr.units.axes import find_structure


def find(network, seed=0):
    captured = capture(network.model, network.args, {}, network.draw(seed))
    return captured, find_structure(captured)


def draw(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "data"}


def structure_of(run, *args):
    return find_structure(capture(run, args, {}, draw(run, *args)))


def members(structure, unit):
    """All indices of a unit: name, axis, index, and whether it reads."""
    return {
        (name, i, index, axis.reads)
        for axes_of in (structure.sites, structure.tensors)
        for name, axes in axes_of.items()
        for i, axis in enumerate(axes)
        for index in (axis.units == unit).nonzero().flatten().tolist()
    }


def layers(structure):
    return [(layer.name, layer.kind, len(layer.units)) for layer in structure.layers]


EXPECTED = {
    "functional_mlp": [("w1", "unit", 7), ("w2", "unit", 6), ("w1", "input", 5)],
    "plated_mlp": [("w1", "unit", 7), ("w1", "input", 5)],
    "module_mlp": [
        ("net.0.weight", "unit", 7),
        ("net.2.weight", "unit", 6),
        ("net.0.weight", "input", 5),
    ],
    "lenet": [
        ("net.0.weight", "channel", 3),
        ("net.3.weight", "channel", 6),
        ("net.7.weight", "unit", 11),
        ("net.9.weight", "unit", 8),
        ("net.0.weight", "input", 1),
    ],
    "residual_cnn": [
        ("net.0.weight", "channel", 5),
        ("net.3.conv1.weight", "channel", 7),
        ("net.5.conv1.weight", "channel", 6),
        ("net.0.weight", "input", 3),
    ],
    "gru_cell": [("net.cell.weight_ih", "unit", 5), ("net.cell.weight_ih", "input", 3)],
    "functional_gru": [("w_in", "unit", 5), ("w_in", "input", 3)],
    "vit": [
        ("net.blocks.0.attention.qkv.weight", "head", 2),
        ("net.blocks.0.mlp.0.weight", "unit", 13),
        ("net.blocks.1.attention.qkv.weight", "head", 3),
        ("net.blocks.1.mlp.0.weight", "unit", 17),
        ("net.patches.weight", "input", 3),
    ],
    "embedding_mlp": [("net.embedding.weight", "unit", 4), ("net.fc1.weight", "unit", 6)],
    "hierarchical": [("w1", "unit", 7), ("w1", "input", 5)],
    "noncentred": [("z1", "unit", 7), ("z1", "input", 5)],
}
EXPECTED["vit_with_class_token"] = EXPECTED["vit"]


@pytest.mark.parametrize("name", NETWORKS)
def test_layers(name):
    _, structure = find(NETWORKS[name]())
    assert layers(structure) == EXPECTED[name]
    used = torch.cat([layer.units for layer in structure.layers])
    axes = [a.units for axes in structure.sites.values() for a in axes]
    assert sorted(used.tolist()) == [u for u in torch.cat(axes).unique().tolist() if u >= 0]


def test_gates_move_together():
    _, structure = find(NETWORKS["gru_cell"]())
    assert members(structure, 1) == {
        *(("net.cell.weight_ih", 0, i, False) for i in (1, 6, 11)),
        *(("net.cell.weight_hh", 0, i, False) for i in (1, 6, 11)),
        *(("net.cell.bias_ih", 0, i, False) for i in (1, 6, 11)),
        *(("net.cell.bias_hh", 0, i, False) for i in (1, 6, 11)),
        ("net.cell.weight_hh", 1, 1, True),
        ("net.head.weight", 1, 1, True),
    }


def test_whole_heads():
    _, structure = find(NETWORKS["vit"]())
    qkv, _ = structure.sites["net.blocks.0.attention.qkv.weight"]
    assert torch.equal(qkv.units, qkv.units[[0, 6]].repeat_interleave(6).repeat(3))
    assert "native_layer_norm" in structure.protected["net.patches.weight"]


def test_scales_go_with_what_they_scale():
    _, structure = find(NETWORKS["hierarchical"]())
    assert members(structure, 0) == {("input_scale", 0, 0, True), ("w1", 0, 0, True)}
    assert ("unit_scale", 0, 2, False) in members(structure, 7)


def perturb(network, captured, structure, unit, read):
    """Outputs with a unit at zero and what reads a unit anywhere else."""
    values = {name: value.clone() for name, value in network.draw().items()}
    tensors = {n: t for n, t in captured.originals.items() if structure.tensors[n]}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad(), pyro.validation_enabled(False):
        for name, tensor in (values | tensors).items():
            axes = structure.sites.get(name) or structure.tensors[name]
            for i, axis in enumerate(axes):
                if axis.reads:
                    there = (axis.units == read).nonzero().flatten()
                    shape = [*tensor.shape[:i], len(there), *tensor.shape[i + 1 :]]
                    tensor.index_copy_(i, there, 3 * torch.rand(shape))
                else:
                    tensor.index_fill_(i, (axis.units == unit).nonzero().flatten(), 0)
        try:
            return network.outputs(values)
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(before[name])


def check_by_perturbation(network):
    """What is said to be one unit is: its readers see nothing else."""
    captured, structure = find(network)
    found = 0
    for layer in structure.layers:
        if layer.kind == "input":
            continue
        units, others = layer.units.tolist(), layer.units.roll(1).tolist()
        for unit, other in list(zip(units, others, strict=True))[:3]:
            torch.manual_seed(1)
            one = perturb(network, captured, structure, unit, unit)
            torch.manual_seed(2)
            two = perturb(network, captured, structure, unit, unit)
            assert torch.allclose(one, two, atol=1e-5)
            torch.manual_seed(1)
            wrong = perturb(network, captured, structure, unit, other)
            # A unit that is dead for all data would hide it; not all are.
            found += not torch.allclose(one, wrong, atol=1e-5)
    assert found


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_else_is_read(name):
    check_by_perturbation(NETWORKS[name]())


STEPS = ["dense", "residual", "beside", "gated", "flattened"]


def write_program(steps, sizes):
    """A network of random parts."""

    def model(x, y=None):
        h, width = torch.tanh(x @ _normal("w", x.shape[-1], 5) + _normal("b", 5)), 5
        for i, (step, size) in enumerate(zip(steps, sizes, strict=True)):
            if step == "dense":
                h, width = F.gelu(h @ _normal(f"w{i}", width, size)), size
            elif step == "residual":
                inner = torch.relu(
                    F.linear(h, _normal(f"w{i}", size, width), _normal(f"b{i}", size))
                )
                h = h + inner @ _normal(f"v{i}", size, width)
            elif step == "beside":
                new = torch.tanh(torch.einsum("bi,oi->bo", x, _normal(f"w{i}", size, x.shape[-1])))
                h, width = torch.cat([new, h], -1), width + size
            elif step == "gated":
                gate, value = (h @ _normal(f"w{i}", width, 2 * size)).chunk(2, -1)
                h, width = gate.sigmoid() * value.relu(), size
            else:
                new = (h @ _normal(f"w{i}", width, 3 * size)).view(len(x), 3, size)
                h, width = (new[:, 0] * new[:, 1]).tanh() + new[:, 2], size
        return _observe(h @ _normal("out", width, 2), y)

    return _make(model, (torch.randn(9, 3),), (9, 2))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(2, 4)), min_size=1, max_size=3))
def test_random_programs(parts):
    steps, sizes = zip(*parts, strict=True)
    network = write_program(steps, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, structure = find(network)
    assert structure.sites["w"][1].units.min() >= 0
    check_by_perturbation(network)


def oracle_groups(net, x):
    """By output channel of each layer, what torch-pruning would cut with it."""
    pruning = pytest.importorskip("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(net, example_inputs=x)
    names = {module: name for name, module in net.named_modules()}
    groups = {}
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        cut = (
            pruning.prune_linear_out_channels
            if isinstance(module, nn.Linear)
            else pruning.prune_conv_out_channels
        )
        for channel in range(len(module.weight)):
            found = set()
            for dependency, indices in graph.get_pruning_group(module, cut, [channel]):
                target = dependency.target.module
                if target not in names:
                    continue
                out = graph.is_out_channel_pruning_fn(dependency.handler)
                norm = isinstance(target, nn.BatchNorm2d)
                tensors = dict(target.named_parameters()) | (
                    {n: b for n, b in target.named_buffers() if b.dim()} if norm else {}
                )
                for key in tensors if out or norm else ["weight"]:
                    axis = 0 if out or norm else 1
                    found |= {(f"net.{names[target]}.{key}", axis, i) for i in indices}
            groups[f"net.{name}.weight", channel] = found
    return groups


def make_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2))


def make_lenet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 11),
        nn.ReLU(),
        nn.Linear(11, 10),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (make_mlp, (4, 5)),
        (make_lenet, (2, 1, 16, 16)),
        (make_residual_cnn, (2, 3, 8, 8)),
    ],
)
def test_agrees_with_torch_pruning(make, shape):
    net, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        y = net(x)
    network = _make(Regression(bayesianize(net)).eval(), (x,), y.shape)
    _, structure = find(network)
    compared = 0
    for (name, channel), expected in oracle_groups(net, x).items():
        unit = int(structure.sites[name][0].units[channel])
        if unit < 0:
            # It may cut outputs; we may not.
            assert name == [site for site in structure.sites if site.endswith("weight")][-1]
            continue
        ours = {member[:3] for member in members(structure, unit)}
        assert ours == expected
        compared += 1
    assert compared == sum(
        len(structure.sites[name][0].units)
        for name in structure.sites
        if name.endswith("weight") and structure.sites[name][0].units[0] >= 0
    )


X = torch.randn(4, 5)
IMAGE = torch.randn(2, 3, 8, 8)


def test_constants_are_cut_with_units():
    mask, data = torch.rand(5, 7), torch.randn(6, 5)
    weight = functools.partial(_normal, "w", 5, 7)
    structure = structure_of(lambda: (data @ (mask * weight())).tanh() @ _normal("v", 7, 2))
    assert layers(structure) == [("w", "unit", 7), ("w", "input", 5)]
    for axes, of_site in zip(structure.tensors["constant 0"], structure.sites["w"], strict=True):
        assert torch.equal(axes.units, of_site.units)
        assert axes.reads == of_site.reads
    assert torch.equal(structure.tensors["constant 1"][1].units, structure.sites["w"][0].units)


def test_tensors_are_those_of_the_program():
    network = NETWORKS["residual_cnn"]()
    captured, _ = find(network)
    norm = network.model.net[1]
    assert captured.originals["net.1.running_mean"] is norm.running_mean
    assert captured.originals["net.1.weight"] is norm.weight


def test_capture_leaves_the_model_as_it_was():
    network = NETWORKS["residual_cnn"]()
    network.model.train()
    before = {name: b.clone() for name, b in network.model.named_buffers()}
    values, state = network.draw(), torch.get_rng_state()
    network.model.load_state_dict(before, strict=False)
    before = {name: b.clone() for name, b in network.model.named_buffers()}
    captured = capture(network.model, network.args, {}, values)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in network.model.named_buffers())
    assert layers(find_structure(captured)) == EXPECTED["residual_cnn"]


def test_shared_weights_are_no_outputs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.out = nn.Linear(5, 2)

        def forward(self, x):
            return self.out(self.second(self.first(x).tanh()).tanh())

    net = bayesianize(Tied())
    captured = capture(net, (X,), {}, draw(net, X))
    assert [name for name, _ in captured.outputs] == ["return value"]
    # Its inputs are its units, since the same weights read both.
    assert layers(find_structure(captured)) == [("first.weight", "input", 5)]


def test_a_site_that_data_show_is_an_output():
    def model(x):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([4, 5]).to_event(2))
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        out = pyro.sample("out", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("shown", dist.Normal(bias, 1.0).to_event(1), obs=torch.zeros(4))
        return (x @ weight.mT + bias).tanh() @ out

    captured = capture(model, (X,), {}, draw(model, X))
    assert [name for name, _ in captured.outputs] == ["shown", "return value"]
    assert layers(find_structure(captured)) == [("weight", "input", 5)]


def test_sizes_that_the_program_says():
    def run(x, y):
        h = x.new_zeros(len(x), 7) + (x @ _normal("w", 5, 7))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(h.view(4, 7, 1)[:, :3, 0].sum(-1), 1.0), obs=y)

    captured = capture(run, (X, torch.zeros(4)), {}, draw(run, X, torch.zeros(4)))
    said = [(call.function.__name__, call.args) for call in captured.sized]
    assert said[0] == ("new_zeros", (None, 4, 7))
    assert ("view", (None, 4, 7, 1)) in said
    assert not [name for name, _ in said if name == "expand"]
    assert captured.sized[0].nodes[0].name == "new_zeros"


def test_sizes_inside_attention():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    net, x = bayesianize(Attend(), layers=(*LAYERS, nn.MultiheadAttention)), torch.randn(2, 5, 12)
    captured = capture(net, (x,), {}, draw(net, x))
    structure = find_structure(captured)
    assert layers(structure) == [
        ("attention.in_proj_weight", "head", 3),
        ("attention.out_proj.weight", "unit", 12),
        ("attention.in_proj_weight", "input", 12),
    ]
    said = [(call.function.__name__, call.args) for call in captured.sized]
    assert ("view", (None, 5, 6, 4)) in said


def test_control_flow_on_values():
    def run(x):
        w = _normal("w", 5)
        return x @ w if w.sum() > 0 else -x @ w

    with pytest.raises(RuntimeError, match="same operations whatever the values"):
        capture(run, (X,), {}, {"w": torch.ones(5)})
