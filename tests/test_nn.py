"""Networks from torch: they compute what torch computes, and behave as Pyro modules."""

import copy
import inspect
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.nn import LAYERS, bayesianize, fan_in_normal, init_to_pretrained, normal


class Recurrent(nn.Module):
    """Classify sequences of tokens, the last of which may be padding."""

    def __init__(self, cell):
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.cell = cell
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        state = None
        for x in self.embedding(tokens).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class ByHand(nn.Module):
    """Read the weights of its layers, and keep layers in lists and dictionaries."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.more = nn.ModuleList([nn.Linear(3, 3), nn.ModuleDict({"out": nn.Linear(3, 2)})])

    def forward(self, x):
        hidden = F.linear(x, self.fc.weight, self.fc.bias).tanh() @ self.fc.weight[:, :3]
        return self.more[1]["out"](self.more[0](hidden))


class Tied(nn.Module):
    """Predict tokens with the weights that embed them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.embedding(tokens))


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), 2.0))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.gain * self.fc(x)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Sequential(nn.Linear(5, 2, bias=False)))


def conv():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.GroupNorm(3, 3),
        nn.Flatten(),
        nn.Linear(75, 2),
    )
    for _ in range(3):
        net(torch.randn(8, 2, 6, 6))
    return net.eval()


TOKENS = torch.tensor([[1, 2, 3], [4, 6, 0]])
NETWORKS = {
    "mlp": (mlp, torch.ones(3, 4)),
    "conv": (conv, torch.ones(3, 2, 6, 6)),
    "GRUCell": (lambda: Recurrent(nn.GRUCell(3, 4)), TOKENS),
    "LSTMCell": (lambda: Recurrent(nn.LSTMCell(3, 4)), TOKENS),
    "by hand": (ByHand, torch.ones(3, 4)),
    "tied": (Tied, TOKENS),
    "one layer": (lambda: nn.Linear(4, 2), torch.ones(3, 4)),
}


@pytest.fixture(params=list(NETWORKS))
def case(request):
    make, x = NETWORKS[request.param]
    return make(), x


def at_pretrained(net, module):
    return poutine.condition(net, {n: p.detach() for n, p in module.named_parameters()})


def latent_sites(net, *args):
    trace = poutine.trace(net).get_trace(*args)
    return {name: trace.nodes[name] for name in trace.stochastic_nodes}


def train(model, guide, *args, steps=3):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)


def test_it_computes_what_the_module_computes(case):
    module, x = case
    net = bayesianize(module)
    assert isinstance(net, type(module))
    assert isinstance(net, PyroModule)
    torch.testing.assert_close(at_pretrained(net, module)(x), module(x))


def test_a_draw_is_the_module_with_the_weights_drawn(case):
    module, x = case
    trace = poutine.trace(bayesianize(module)).get_trace(x)
    drawn = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    if "embedding.weight" in drawn and module.embedding.padding_idx is not None:
        drawn["embedding.weight"][module.embedding.padding_idx] = 0
    expected = torch.func.functional_call(module, drawn, (x,))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)


def test_sites_are_the_parameters_of_bayesian_layers(case):
    module, x = case
    sites = latent_sites(bayesianize(module), x)
    expected = {
        name: p.shape
        for name, p in module.named_parameters()
        if not isinstance(
            module.get_submodule(name.rpartition(".")[0]),
            nn.BatchNorm2d | nn.GroupNorm | nn.PReLU,
        )
    }
    assert {name: node["value"].shape for name, node in sites.items()} == expected


def test_the_module_that_came_in_is_left_alone(case):
    module, x = case
    before = {k: v.clone() for k, v in module.state_dict().items()}
    types = [type(m) for m in module.modules()]
    bayesianize(module).double()(x if x.dtype == torch.long else x.double())
    assert types == [type(m) for m in module.modules()]
    torch.testing.assert_close(dict(module.state_dict()), before)
    assert all(p.requires_grad for p in module.parameters())


def test_norm_layers_and_modes_stay():
    module = conv()
    net = bayesianize(module)
    assert not any(m.training for m in net.modules())
    assert set(dict(net.named_parameters())) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    torch.testing.assert_close(net[1].running_var, module[1].running_var)
    asked = bayesianize(module, layers=(*LAYERS, nn.BatchNorm2d))
    assert {"1.weight", "1.bias"} < set(latent_sites(asked, torch.ones(3, 2, 6, 6)))


def scales(module, *args, **options):
    sites = latent_sites(bayesianize(module, **options), *args)
    return {
        name: torch.unique(node["fn"].base_dist.stddev).tolist() for name, node in sites.items()
    }


def test_fan_in_normal():
    assert scales(mlp(), torch.ones(3, 4), prior=fan_in_normal(2.0)) == {
        "0.weight": [1.0],
        "0.bias": [2.0],
        "2.0.weight": [pytest.approx(2 / 5**0.5)],
    }
    by_site = scales(conv(), torch.ones(3, 2, 6, 6))
    for name, fan_in in {"0.weight": 9, "0.bias": 1, "3.weight": 12, "6.weight": 75}.items():
        assert by_site[name] == [pytest.approx(fan_in**-0.5)]
    by_site = scales(Recurrent(nn.GRUCell(3, 4)), TOKENS)
    assert by_site["embedding.weight"] == [1.0]
    assert by_site["cell.weight_ih"] == [pytest.approx(3**-0.5)]
    assert by_site["cell.weight_hh"] == [0.5]


def test_the_variance_of_a_unit_does_not_depend_on_the_width():
    for width in (10, 1000):
        net = bayesianize(nn.Linear(width, 4000))
        assert float(net(torch.ones(1, width)).std()) == pytest.approx(2**0.5, rel=0.1)


def test_a_prior_of_ones_own_sees_name_value_and_layer():
    seen = []

    def prior(name, parameter, layer):
        seen.append((name, type(layer).__name__))
        return dist.Laplace(parameter, 2.0 * parameter.new_ones(parameter.shape[-1:]))

    module = mlp()
    sites = latent_sites(bayesianize(module, prior=prior), torch.ones(3, 4))
    assert set(seen) == {
        ("0.weight", "PyroLinear"),
        ("0.bias", "PyroLinear"),
        ("2.0.weight", "PyroLinear"),
    }
    torch.testing.assert_close(sites["0.weight"]["fn"].mean, module[0].weight.detach())
    assert sites["0.weight"]["fn"].event_shape == (5, 4)


def test_normal():
    sites = latent_sites(bayesianize(mlp(), prior=normal(1.0, 3.0)), torch.ones(3, 4))
    assert all((n["fn"].mean == 1).all() and (n["fn"].stddev == 3).all() for n in sites.values())


def test_a_correlated_prior():
    def prior(_name, parameter, _layer):
        size = parameter.shape[-1]
        return dist.MultivariateNormal(parameter.new_zeros(size), torch.eye(size))

    sites = latent_sites(bayesianize(nn.Linear(3, 2), prior=prior), torch.ones(1, 3))
    assert sites["weight"]["fn"].event_shape == (2, 3)


@pytest.mark.parametrize(
    ("prior", "error", "match"),
    [
        (dist.Normal(0.0, 1.0), TypeError, "Expected a function"),
        (lambda *_: 1.0, TypeError, "builtins.float for 'weight'"),
        (lambda *_: torch.distributions.Normal(0.0, 1.0), TypeError, "from pyro.distributions"),
        (lambda *_: dist.Normal(torch.zeros(5), 1.0), ValueError, r"\(5,\) for 'weight'"),
        (lambda *_: dist.Normal(torch.zeros(4), 1).to_event(1), ValueError, r"\(4,\) for 'weight'"),
        (lambda *_: dist.Normal(torch.zeros(7, 2, 3), 1), ValueError, r"broadcasts to \(2, 3\)"),
    ],
)
def test_priors_that_do_not_fit(prior, error, match):
    with pytest.raises(error, match=match):
        bayesianize(nn.Linear(3, 2), prior=prior)


@pytest.mark.parametrize("make", [fan_in_normal, lambda scale: normal(0.0, scale)])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_none(make, scale):
    with pytest.raises(ValueError, match="Expected a positive standard deviation"):
        make(scale)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Sequential(nn.GRU(3, 4)), r"'0', a GRU .*weight_ih_l0.*GRUCell"),
        (
            nn.TransformerEncoderLayer(4, 2, 8),
            r"'self_attn', a MultiheadAttention .*in_proj_weight.*\*pyro_bmr.nn.LAYERS, Multihead",
        ),
        (Scaled(), r"got a Scaled .*\(gain\).*layers=\(\*pyro_bmr.nn.LAYERS, Scaled\)"),
        (nn.Sequential(nn.LazyLinear(3)), "'0', a LazyLinear that is lazy"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "'1', .* is lazy"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm=1.0"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "computes its weight from other"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), "its weight from weight_orig in a hook"),
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), "no layer of layers= has trainable"),
        (nn.Linear(2, 2).requires_grad_(False), "no layer of layers= has trainable"),
    ],
)
def test_modules_that_cannot_be_converted(module, match):
    with pytest.raises(ValueError, match=match):
        bayesianize(module)


def test_what_is_no_module():
    with pytest.raises(TypeError, match="got a function. Expected a torch.nn.Module"):
        bayesianize(mlp)


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_are_asked_for(training):
    x = torch.randn(3, 5, 4)
    layers = (*LAYERS, Scaled, nn.GRU, nn.MultiheadAttention, nn.LayerNorm)
    for module in (
        Scaled(),
        nn.GRU(4, 3, num_layers=2, bidirectional=True),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    ):
        module.train(training)
        net = bayesianize(module, layers=layers)
        with torch.no_grad():
            expected, got = module(x), at_pretrained(net, module)(x)
            torch.testing.assert_close(got, expected)
        assert set(latent_sites(net, x)) == set(dict(module.named_parameters()))
        moved = copy.deepcopy(net).double()
        assert all(
            n["value"].dtype == x.double().dtype for n in latent_sites(moved, x.double()).values()
        )


def test_frozen_parameters_stay_as_they_are():
    module = nn.Sequential(Scaled(), nn.LayerNorm(3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    net = bayesianize(module)
    x = torch.randn(6, 4)
    torch.testing.assert_close(at_pretrained(net, module)(x), module(x))

    def model(x):
        pyro.sample("y", dist.Normal(net(x), 1.0).to_event(2), obs=torch.ones(len(x), 3))

    train(model, AutoNormal(model), x)
    torch.testing.assert_close(net[0].gain, module[0].gain.detach())
    torch.testing.assert_close(net[1].bias, module[1].bias.detach())
    assert not torch.equal(net[1].weight, module[1].weight)
    assert set(net.state_dict()) == set(module.state_dict()) - {"2.weight", "2.bias"}


def test_tied_parameters_are_one_site_also_in_copies():
    module = Tied()
    module.alias = module.decoder.weight
    net = bayesianize(module)
    for each in (net, copy.deepcopy(net)):
        trace = poutine.trace(each).get_trace(TOKENS)
        assert trace.stochastic_nodes == ["embedding.weight", "decoder.bias"]
        value = trace.nodes["embedding.weight"]["value"]
        torch.testing.assert_close(trace.nodes["decoder.weight"]["value"], value)
        with each._pyro_context:
            assert torch.equal(each.alias, each.embedding.weight)


def test_a_module_in_two_places_is_sampled_once():
    layer = nn.Linear(3, 3)
    module, x = nn.Sequential(layer, nn.Tanh(), layer), torch.ones(2, 3)
    net = bayesianize(module)
    weight, _ = (node["value"] for node in latent_sites(net, x).values())
    assert weight.shape == (3, 3)
    guide = AutoNormal(net, init_loc_fn=init_to_pretrained(net))
    guide(x)
    torch.testing.assert_close(poutine.condition(net, guide.median())(x), module(x))


def test_the_padding_row_stays():
    module = nn.Sequential(nn.Embedding(5, 3, padding_idx=1))
    module[0].weight.data[1] = 7.0
    net = bayesianize(module)
    out = net(torch.tensor([[0, 1], [1, 2]]))
    assert (out[0, 1] == 7).all()
    assert (out[1, 0] == 7).all()
    assert (out[0, 0] != 7).all()


def test_it_is_float64_where_the_module_is():
    module = mlp().double()
    x = torch.ones(3, 4, dtype=torch.float64)
    for net in (bayesianize(module), bayesianize(mlp()).double()):
        assert net(x).dtype == torch.float64
        assert all(n["fn"].mean.dtype == torch.float64 for n in latent_sites(net, x).values())


def test_it_moves_with_its_priors():
    net = bayesianize(Tied()).to("meta")
    with pyro.validation_enabled(False):
        assert net(TOKENS.to("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_moves_to_cuda():
    for make, x in NETWORKS.values():
        assert bayesianize(make()).to("cuda")(x.to("cuda")).is_cuda


def test_it_can_be_copied_pickled_and_saved(case):
    module, x = case
    net = bayesianize(module)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ]
    for each in copies:
        pyro.set_rng_seed(1)
        expected = net(x)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(each(x), expected)
    fresh = bayesianize(copy.deepcopy(module))
    assert fresh.load_state_dict(net.state_dict()) == ([], [])
    assert not any("pretrained" in key for key in net.state_dict())


class Regression(PyroModule):
    """A network with a noise precision that is sampled first."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.precision = PyroSample(dist.Gamma(2.0, 1.0))

    def forward(self, x, y=None):
        scale = self.precision.rsqrt()
        mean = pyro.deterministic("mean", self.net(x).squeeze(-1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def in_function(net):
    def model(x, y=None):
        scale = pyro.sample("precision", dist.Gamma(2.0, 1.0)).rsqrt()
        mean = pyro.deterministic("mean", net(x).squeeze(-1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


@pytest.mark.parametrize("wrap", [Regression, in_function])
def test_a_guide_can_start_at_the_pretrained_weights(wrap):
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 1)))
    net = bayesianize(module)
    model = wrap(net)
    guide = AutoNormal(model, init_loc_fn=init_to_pretrained(net), init_scale=1e-6)
    x = torch.randn(9, 4)
    guide(x, torch.zeros(9))
    mean = Predictive(model, guide=guide, num_samples=1, return_sites=["mean"])(x)["mean"]
    torch.testing.assert_close(mean.flatten(), module(x).flatten(), atol=1e-4, rtol=1e-4)
    prefix = "net." if wrap is Regression else ""
    torch.testing.assert_close(guide.median()[f"{prefix}0.weight"], module[0].weight.detach())
    assert set(guide.median()) == {
        "precision",
        *(f"{prefix}{name}" for name in ("0.weight", "0.bias", "2.0.weight", "2.0.bias")),
    }


def test_a_guide_starts_only_at_the_models_own_network():
    net = bayesianize(nn.Linear(4, 1))
    guide = AutoNormal(Regression(copy.deepcopy(net)), init_loc_fn=init_to_pretrained(net))
    with pytest.raises(ValueError, match=r"whose 'weight' is not the model's 'net.weight'"):
        guide(torch.ones(2, 4))
    with pytest.raises(ValueError, match="holds no pretrained weights"):
        init_to_pretrained(nn.Linear(2, 1))


@pytest.mark.parametrize("wrap", [Regression, in_function])
def test_reduce_prunes_it(wrap):
    x = torch.randn(60, 4)
    y = x[:, 0] + 0.1 * torch.randn(60)
    model = wrap(bayesianize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))))
    guide = AutoNormal(model, init_scale=0.05)
    train(model, guide, x, y, steps=300)
    result = bmr.reduce(guide)
    assert 0 < result.sparsity < 1
    assert result.delta_f < 0
    assert len(result.masks) == 4
    drawn = Predictive(result.model, guide=result.guide, num_samples=3)(x)
    for name, mask in result.masks.items():
        assert (drawn[name].reshape(3, *mask.shape)[:, ~mask] == 0).all()


def test_reduce_finds_the_priors_of_all_networks_constant(case):
    module, x = case
    net = bayesianize(module)
    guide = AutoNormal(net)
    guide(x)
    sites = bmr.reduce(guide, select=bmr.top_k(3)).masks
    assert set(sites) == set(latent_sites(net, x))
    assert sum(int(mask.sum()) for mask in sites.values()) == 3


def test_a_prior_is_shown_as_the_call_that_made_it():
    """Also after it was pickled, and in the signature that a notebook shows."""
    for prior, shown in (
        (bmr.nn.normal(scale=0.1), "normal(loc=0.0, scale=0.1)"),
        (bmr.nn.learned_normal(2.0), "learned_normal(scale=2.0)"),
    ):
        assert repr(prior) == repr(pickle.loads(pickle.dumps(prior))) == shown
    default = inspect.signature(bmr.bayesianize).parameters["prior"].default
    assert repr(default) == "fan_in_normal(scale=1.0)"
