"""The experiments with networks: rivals, and scores, on images small enough to learn in seconds."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, vmap

NETWORKS = Path(__file__).parents[1] / "benchmarks" / "networks"
NAMES = [
    *(
        "architectures",
        "bayesian_compression",
        "dense",
        "magnitude",
        "problems",
        "pruned",
        "scoring",
    ),
    *("sparse_vd", "training", "variational"),
]
METHODS = ["dense", "magnitude", "sparse_vd", "bayesian_compression"]
LAYERS = [nn.Linear(5, 3), nn.Conv2d(2, 3, 3)]
DRAWS = 40_000
# Weights and biases of the network.
SIZE = 60 + 200 + 18


@pytest.fixture(scope="module")
def modules():
    """The modules of the experiments, which are no package; other experiments have such names."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(NETWORKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(NETWORKS))
    for name in NAMES:
        del sys.modules[name]
    sys.modules.update(others)


def make_network(widths):
    filters, units = widths
    return nn.Sequential(
        *(nn.Conv2d(1, filters, 3), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(4 * filters, units), nn.ReLU()),
        nn.Linear(units, 2),
    )


@pytest.fixture(scope="module")
def problem(modules):
    """Images that are brighter on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(512) % 2
    x = torch.rand(512, 1, 6, 6, generator=generator)
    x[y == 0, :, :, :3] += 0.3
    x[y == 1, :, :, 3:] += 0.3
    schedule = modules["problems"].Schedule(12, (4, 4, 4), 27.0, 0.1, 32, 1e-2)
    rows = x[:256], y[:256], x[256:], y[256:]
    return modules["problems"].Problem("halves", make_network, (6, 8), schedule, *rows, {})


@pytest.fixture(scope="module", params=METHODS)
def method(request, modules):
    return modules[request.param]


def count(pruned):
    return sum(int(value.count_nonzero()) for value in pruned.weights.values())


def test_every_method_learns_and_then_prunes_more_and_more(method, modules, problem, tmp_path):
    curve = list(method.train(problem, 0, tmp_path))
    names = [name for name, _ in problem.make_network(0).named_parameters()]
    assert all(list(pruned.weights) == names for pruned in curve)
    counts = [count(pruned) for pruned in curve]
    assert counts == sorted(counts, reverse=True)
    assert method.__name__ == "dense" or counts[-1] < 0.9 * SIZE
    assert modules["scoring"].judge(curve[0].predict, problem)["error"] < 10
    assert curve[-1].epochs == problem.schedule.epochs
    seconds = [pruned.seconds for pruned in curve]
    assert seconds == sorted(seconds)
    chances = curve[-1].predict(problem.x_test)
    torch.testing.assert_close(chances.sum(-1), torch.ones(256))
    again = list(method.train(problem, 0, tmp_path))
    assert torch.equal(again[-1].predict(problem.x_test), chances)
    assert [pruned.seconds for pruned in again] == seconds, "read, not trained again"


def test_a_training_that_was_stopped_goes_on(method, problem, tmp_path, monkeypatch):
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    chances = list(method.train(problem, 0, tmp_path / "whole"))[-1].predict(problem.x_test)
    epochs = iter(range(5))

    class Stopped(Exception):
        pass

    def save(*args):
        if next(epochs, None) is None:
            raise Stopped
        torch_save(*args)

    torch_save = torch.save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(torch, "save", save)
        list(method.train(problem, 0, tmp_path / "stopped"))
    again = list(method.train(problem, 0, tmp_path / "stopped"))[-1].predict(problem.x_test)
    assert torch.equal(again, chances)


def test_files_of_another_training_are_refused(modules, problem, tmp_path):
    list(modules["dense"].train(problem, 0, tmp_path))
    other = replace(problem, schedule=replace(problem.schedule, lr=2e-2))
    with pytest.raises(ValueError, match="another folder for --work"):
        list(modules["dense"].train(other, 0, tmp_path))


def test_what_magnitude_has_pruned_stays_zero(modules, problem, tmp_path):
    rounds = list(modules["magnitude"].train(problem, 0, tmp_path))
    assert [pruned.level for pruned in rounds] == pytest.approx([3, 9, 27])
    for pruned in rounds:
        assert 0 < count(pruned) <= round(SIZE / pruned.level)
    for before, after in zip(rounds, rounds[1:], strict=False):
        for name, value in before.weights.items():
            assert not after.weights[name][value == 0].any()
        moved = [(value != after.weights[name]).any() for name, value in before.weights.items()]
        assert any(moved), "the others are trained again"


def test_magnitude_keeps_the_largest_shares_of_layers(modules):
    weights = {
        **{"1.weight": torch.tensor([[3.0, -5.0]]), "1.bias": torch.tensor([-4.0, 1.0])},
        **{"3.weight": torch.tensor([[6.0, -8.0, 0.0]]), "3.bias": torch.tensor([-6.5])},
    }
    # Of one layer 9/50, 25/25, 16/41, 1/51, of the other 36/142.25, 64/64, 0, 42.25/106.25.
    masks = modules["magnitude"].keep_largest(weights, 8 / 3)
    assert masks["1.weight"].tolist() == [[False, True]]
    assert masks["1.bias"].tolist() == [False, False]
    assert masks["3.weight"].tolist() == [[False, True, False]]
    assert masks["3.bias"].tolist() == [True]


def test_every_epoch_takes_every_image_once(modules, problem, tmp_path):
    seen, fractions = [], []
    parameter = nn.Parameter(torch.zeros(()))

    def loss(x, _y, done):
        seen.append(x)
        fractions.append(done)
        return parameter * 1.0

    generator = torch.Generator().manual_seed(0)
    modules["training"].minimise(problem, [parameter], loss, 2, generator, tmp_path / "run.pt")
    torch.testing.assert_close(fractions, [step / 16 for step in range(16)])
    for epoch in seen[:8], seen[8:]:
        together = torch.cat(epoch).flatten(1)
        assert not torch.equal(together, problem.x.flatten(1))
        expected = problem.x.flatten(1)
        assert torch.equal(together[together[:, 0].argsort()], expected[expected[:, 0].argsort()])
    # Adam moves by the rate while the gradient stays the same: 1 for half, then down to 0.01.
    rates = 8 + sum(1 - 0.99 * (2 * step / 16 - 1) for step in range(8, 16))
    assert parameter.item() == pytest.approx(-rates * 1e-2, rel=1e-4)


@pytest.mark.parametrize("log_alpha", torch.linspace(-8, 4, 13).tolist())
def test_the_kl_of_sparse_vd_is_the_integral(modules, log_alpha):
    """KL(N(m, α m²) ‖ log-uniform) = E log|1 + √α e| - ½ log α, less its limit at infinite α."""
    root = math.exp(0.5 * log_alpha)

    def integrand(e):
        return math.log(abs(1 + root * e)) * math.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)

    # The logarithm is infinite at -1/√α, where that is in reach.
    ends = [-10, max(-10, -1 / root), 10]
    parts = [quad(integrand, a, b, limit=200)[0] for a, b in zip(ends, ends[1:], strict=False)]
    at_infinity = -0.5 * (0.5772156649 + math.log(2))
    exact = sum(parts) - 0.5 * log_alpha - at_infinity
    approximate = modules["variational"].log_uniform_kl(torch.tensor(log_alpha)).item()
    assert approximate == pytest.approx(exact, abs=0.01)


def layer_inputs(layer):
    return torch.rand(5) if isinstance(layer, nn.Linear) else torch.rand(2, 4, 5)


def assert_same_moments(drawn, expected):
    """Compare means and variances of draws, within five standard errors of the expected draws."""
    error = expected.var(0).mean().sqrt() * (2 / DRAWS) ** 0.5
    torch.testing.assert_close(drawn.mean(0), expected.mean(0), atol=5 * error.item(), rtol=0)
    torch.testing.assert_close(drawn.var(0), expected.var(0), atol=0, rtol=0.06)


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_are_drawn_as_if_weights_were(modules, layer):
    x, generator = layer_inputs(layer), torch.Generator().manual_seed(0)
    rows = x.expand(DRAWS, *x.shape)
    noisy = modules["sparse_vd"].SparseLayer(layer, generator)
    noisy.log_variance.data.normal_(-2, 1)
    with torch.no_grad():
        weights = Normal(layer.weight, (0.5 * noisy.log_variance).exp()).sample((DRAWS,))
        assert_same_moments(noisy(rows), run(layer, x, weights, layer.bias.expand(DRAWS, -1)))


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_of_groups_are_drawn_as_if_scales_and_weights_were(modules, layer):
    x, generator = layer_inputs(layer), torch.Generator().manual_seed(0)
    noisy = modules["bayesian_compression"].GroupLayer(layer, generator)
    noisy.log_variance.data.normal_(-2, 1)
    noisy.scale.data.normal_(1, 0.3)
    noisy.log_scale_variance.data.normal_(-2, 1)
    with torch.no_grad():
        scale = Normal(noisy.scale, (0.5 * noisy.log_scale_variance).exp()).sample((DRAWS,))
        filters = isinstance(layer, nn.Conv2d)
        wide = scale[..., None, None, None] if filters else scale[:, None]
        spread = (0.5 * noisy.log_variance).exp()
        weights = Normal(layer.weight * wide, spread * wide.abs()).sample()
        bias = layer.bias * scale if filters else layer.bias.expand(DRAWS, -1)
        assert_same_moments(noisy(x.expand(DRAWS, *x.shape)), run(layer, x, weights, bias))


def run(layer, x, weights, bias):
    def one(weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, x[None])[0]

    return vmap(one)(weights, bias)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_kl_of_weights_is_the_same_at_every_scale(modules, layer):
    noisy = modules["bayesian_compression"].GroupLayer(layer, torch.Generator())
    noisy.log_variance.data.normal_(-2, 1)
    # Scales of infinite α, whose KL divergence is 0.
    noisy.log_scale_variance.data.fill_(100)
    for z in 0.5, -3.0:
        posterior = Normal(z * layer.weight, abs(z) * (0.5 * noisy.log_variance).exp())
        expected = kl_divergence(posterior, Normal(0, abs(z))).sum()
        torch.testing.assert_close(noisy.kl(), expected)


def test_groups_are_inputs_of_units_and_filters(modules):
    layers = [
        modules["bayesian_compression"].GroupLayer(layer, torch.Generator()) for layer in LAYERS
    ]
    for layer in layers:
        layer.scale.data.fill_(2)
        # Its α is 1, that of the others e⁻⁹.
        layer.log_scale_variance.data[1] = math.log(4)
    units, filters = (layer.prune(-1.0) for layer in layers)
    kept = torch.tensor([2.0, 0, 2, 2, 2])
    torch.testing.assert_close(units["weight"], LAYERS[0].weight * kept)
    torch.testing.assert_close(units["bias"], LAYERS[0].bias)
    torch.testing.assert_close(filters["weight"], LAYERS[1].weight * kept[:3, None, None, None])
    torch.testing.assert_close(filters["bias"], LAYERS[1].bias * kept[:3])


def test_noisy_weights_are_pruned_and_means_kept(modules):
    layer = modules["sparse_vd"].SparseLayer(nn.Linear(2, 1), torch.Generator())
    layer.mean.data = torch.tensor([[0.1, -0.1]])
    layer.log_variance.data = torch.tensor([[0.01, 0.3]]).log()
    torch.testing.assert_close(layer.prune(3.0)["weight"], torch.tensor([[0.1, 0.0]]))


def test_what_no_weight_takes_is_pruned_and_computes_the_same(modules, problem):
    network = problem.make_network(0)
    with torch.no_grad():
        # The second unit is read by nothing, and it alone reads the third filter.
        network[-1].weight[:, 1] = 0
        network[3].weight[:, 8:12] = 0
        network[3].weight[1, 8:12] = 1
        expected = network(problem.x).softmax(-1)
    weights = dict(network.named_parameters())
    pruned = modules["pruned"].make_pruned(network, weights, 1.0, 0, 0.0)
    torch.testing.assert_close(pruned.predict(problem.x), expected)
    assert not pruned.weights["3.weight"][1].any()
    assert not pruned.weights["3.bias"][1]
    assert not pruned.weights["0.weight"][2].any()
    assert not pruned.weights["0.bias"][2]
    # The unit has 24 weights and a bias, and 2 that were 0 before; the filter 9 and a bias.
    before = sum(int(value.count_nonzero()) for value in weights.values())
    assert before - count(pruned) == 4 + 1 + 20 + 9 + 1


def test_units_live_that_take_and_are_taken(modules, problem):
    """Of three filters one has no weights, and one is read by a unit alone that nothing reads."""
    filters, units, classes = torch.ones(3, 1, 3, 3), torch.zeros(4, 12), torch.ones(2, 4)
    filters[0] = 0
    units[0, 8] = 1
    units[1, :4] = 1
    units[2, 4] = 1
    classes[:, 2] = 0
    weights = {"0.weight": filters, "3.weight": units, "5.weight": classes}
    assert modules["scoring"].living_widths(list(weights.values())) == (1, 1)
    counts = modules["scoring"].count(problem, weights)
    size = {"weights": 18 + 6 + 6, "compression": SIZE / 30}
    assert counts == {**size, "widths": "1-1-2", "flops": 2 * (16 * 9 + 4 + 2)}
