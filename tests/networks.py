"""Small networks as Pyro models, for whatever looks at their structure.

No two axes of a network have the same size by accident.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.nn import functional as F

from pyro_bmr.nn import bayesianize


@dataclass(frozen=True)
class Network:
    """A Pyro model, what it is called with, and its latent sites in the order of the model."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    sites: tuple[str, ...]

    def draw(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Values of the latent sites."""
        torch.manual_seed(seed)
        nodes = poutine.trace(self.model).get_trace(*self.args).nodes
        return {name: nodes[name]["value"].detach() for name in self.sites}

    def outputs(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean of what is observed, at values of the latent sites."""
        nodes = poutine.trace(poutine.condition(self.model, values)).get_trace(*self.args).nodes
        return nodes["y"]["fn"].mean


class Regression(PyroModule):
    """Observations around the output of a network."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        mean = self.net(x)
        with pyro.plate("data", len(mean)):
            return pyro.sample("y", dist.Normal(mean, 0.1).to_event(mean.dim() - 1), obs=y)


def _observe(mean, y):
    with pyro.plate("data", len(mean)):
        return pyro.sample("y", dist.Normal(mean, 0.1).to_event(mean.dim() - 1), obs=y)


def _normal(name, *shape):
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
    fn = dist.Normal(torch.zeros(shape), scale).to_event(len(shape))
    return pyro.sample(name, fn)


def _make(model, args, targets):
    trace = poutine.trace(model).get_trace(*args)
    nodes = ((name, trace.nodes[name]) for name in trace.stochastic_nodes)
    sites = tuple(name for name, node in nodes if name != "y" and not site_is_subsample(node))
    return Network(model, (*args, torch.randn(targets)), sites)


def functional_mlp():
    """5-7-6-2, sites of explicit shapes."""

    def model(x, y=None):
        h = torch.tanh(x @ _normal("w1", 5, 7) + _normal("b1", 7))
        h = torch.relu(h @ _normal("w2", 7, 6) + _normal("b2", 6))
        return _observe(h @ _normal("w3", 6, 2) + _normal("b3", 2), y)

    return _make(model, (torch.randn(4, 5),), (4, 2))


def plated_mlp():
    """5-7-2, with plates over inputs and units."""

    def model(x, y=None):
        zero, one = x.new_zeros(()), x.new_ones(())
        inputs, hidden, out = (
            pyro.plate(name, size, dim=dim)
            for name, size, dim in (("inputs", 5, -2), ("hidden", 7, -1), ("out", 2, -1))
        )
        with inputs, hidden:
            w1 = pyro.sample("w1", dist.Normal(zero, one))
        with hidden:
            b1 = pyro.sample("b1", dist.Normal(zero, one))
        with pyro.plate("hidden rows", 7, dim=-2), out:
            w2 = pyro.sample("w2", dist.Normal(zero, one))
        mean = torch.relu(x @ w1 + b1) @ w2
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)

    return _make(model, (torch.randn(4, 5),), (4, 2))


def module_mlp():
    """5-7-6-2, from torch."""
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 2))
    return _make(Regression(bayesianize(net)), (torch.randn(4, 5),), (4, 2))


def lenet():
    """LeNet-5, narrower."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4, 11),
        nn.Tanh(),
        nn.Linear(11, 8),
        nn.ReLU(),
        nn.Linear(8, 10),
    )
    return _make(Regression(bayesianize(net)), (torch.randn(2, 1, 16, 16),), (2, 10))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, channels, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + x)


def make_residual_cnn():
    """The plain module."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        ResidualBlock(5, 7),
        nn.MaxPool2d(2),
        ResidualBlock(5, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def residual_cnn():
    """Two residual blocks with BatchNorm, in eval mode."""
    model = Regression(bayesianize(make_residual_cnn()))
    return _make(model.eval(), (torch.randn(2, 3, 8, 8),), (2, 4))


class CellNetwork(nn.Module):
    """A recurrent cell over a sequence, with a state of its own size."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 5)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


def gru_cell():
    """`torch.nn.GRUCell` over a sequence."""
    return _make(Regression(bayesianize(CellNetwork())), (torch.randn(4, 6, 3),), (4, 2))


def functional_gru():
    """A GRU written out, with chunk."""

    def model(x, y=None):
        w_in, w_state = _normal("w_in", 15, 3), _normal("w_state", 15, 5)
        b_in, b_state = _normal("b_in", 15), _normal("b_state", 15)
        w_out, b_out = _normal("w_out", 2, 5), _normal("b_out", 2)
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            reset_in, update_in, new_in = (x[:, t] @ w_in.T + b_in).chunk(3, -1)
            reset_state, update_state, new_state = F.linear(h, w_state, b_state).chunk(3, -1)
            reset = torch.sigmoid(reset_in + reset_state)
            update = torch.sigmoid(update_in + update_state)
            candidate = torch.tanh(new_in + reset * new_state)
            h = (1 - update) * candidate + update * h
        return _observe(h @ w_out.T + b_out, y)

    return _make(model, (torch.randn(4, 6, 3),), (4, 2))


class Attention(nn.Module):
    """Whole heads through views."""

    def __init__(self, width, heads, dim):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv = nn.Linear(width, 3 * heads * dim)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(batch, tokens, self.heads * self.dim))


class Block(nn.Module):
    """A transformer block, norm first."""

    def __init__(self, width, heads, dim, inner):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dim)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches by a convolution, two blocks, and the mean over tokens or a class token."""

    def __init__(self, pool="mean"):
        super().__init__()
        self.pool = pool
        self.patches = nn.Conv2d(3, 10, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.randn(4 + (pool == "class"), 10))
        self.position.requires_grad_(False)
        self.token = nn.Parameter(torch.randn(1, 1, 10), requires_grad=False)
        self.blocks = nn.Sequential(Block(10, 2, 6, 13), Block(10, 3, 5, 17))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 7)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.pool == "class":
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.position))
        return self.head(x[:, 0] if self.pool == "class" else x.mean(1))


def vit():
    """A small vision transformer."""
    model = Regression(bayesianize(VisionTransformer()))
    return _make(model, (torch.randn(2, 3, 8, 8),), (2, 7))


def vit_with_class_token():
    """The same, with a class token."""
    model = Regression(bayesianize(VisionTransformer("class")))
    return _make(model, (torch.randn(2, 3, 8, 8),), (2, 7))


class Embedder(nn.Module):
    """Tokens to embeddings, laid side by side, to an MLP."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, tokens):
        return self.fc2(F.relu(self.fc1(self.embedding(tokens).sum(1))))


def embedding_mlp():
    """An embedding of tokens before an MLP."""
    model = Regression(bayesianize(Embedder()))
    return _make(model, (torch.randint(11, (3, 5)),), (3, 2))


def hierarchical():
    """5-7-2, with scales of inputs and units that have priors of their own."""

    def model(x, y=None):
        inputs = pyro.sample("input_scale", dist.LogNormal(torch.zeros(5), 1.0).to_event(1))
        units = pyro.sample("unit_scale", dist.LogNormal(torch.zeros(7), 1.0).to_event(1))
        scale = inputs[:, None] * units
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(5, 7), scale).to_event(2))
        w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([7, 2]).to_event(2))
        return _observe(torch.relu(x @ w1) @ w2, y)

    return _make(model, (torch.randn(4, 5),), (4, 2))


def noncentred():
    """The same, with scales that multiply the weights."""

    def model(x, y=None):
        units = pyro.sample("unit_scale", dist.LogNormal(torch.zeros(7), 1.0).to_event(1))
        w1 = _normal("z1", 5, 7) * units
        return _observe(torch.relu(x @ w1 + _normal("b1", 7)) @ _normal("w2", 7, 2), y)

    return _make(model, (torch.randn(4, 5),), (4, 2))


NETWORKS = {
    make.__name__: make
    for make in (
        functional_mlp,
        plated_mlp,
        module_mlp,
        lenet,
        residual_cnn,
        gru_cell,
        functional_gru,
        vit,
        vit_with_class_token,
        embedding_mlp,
        hierarchical,
        noncentred,
    )
}
