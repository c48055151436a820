"""Models with discrete sites that are summed out, each beside the same model written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_median
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=GENERATOR)
Y = 1.5 * X[:, 0] + torch.randn(12, generator=GENERATOR)
CHAIN = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
STEPS = 3


@dataclass(frozen=True)
class Pair:
    """A model with discrete sites, and the same one with their sum written out."""

    summed: Callable[..., Any]
    written_out: Callable[..., Any]
    discrete: tuple[str, ...]

    def guide(self, *args: Any) -> AutoNormal:
        """Make a guide, which is the same for both."""
        hidden = poutine.block(self.summed, hide=self.discrete)
        guide = AutoNormal(hidden, init_loc_fn=init_to_median(num_samples=1), init_scale=0.2)
        torch.manual_seed(1)
        guide(*args)
        return guide


def _weights() -> Tensor:
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def outliers(x, y=None):
    w = _weights()
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.15), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x @ w, 0.3 + 3.7 * k), obs=y)


def outliers_written_out(x, y=None):
    w = _weights()
    parts = dist.Categorical(torch.tensor([0.85, 0.15]))
    normal = dist.Normal((x @ w)[:, None], torch.tensor([0.3, 4.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(parts, normal), obs=y)


@config_enumerate
def clusters(x, y=None):
    chances = pyro.sample("chances", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(chances))
        pyro.sample("y", dist.Normal(loc[k], 0.5), obs=y)


def clusters_written_out(x, y=None):
    chances = pyro.sample("chances", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 3.0))
    mixture = dist.MixtureSameFamily(dist.Categorical(chances), dist.Normal(loc, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", mixture, obs=y)


@config_enumerate
def two_sites(x, y=None):
    w, noise = _weights(), pyro.sample("noise", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        j = pyro.sample("j", dist.Bernoulli(0.3))
        k = pyro.sample("k", dist.Categorical(CHAIN[j.long()]))
        pyro.sample("y", dist.Normal(x @ w * j + k, noise), obs=y)


def two_sites_written_out(x, y=None):
    w, noise = _weights(), pyro.sample("noise", dist.LogNormal(0.0, 0.3))
    chances = torch.tensor([[0.7], [0.3]]) * CHAIN
    locs = (x @ w)[:, None] * torch.tensor([0.0, 0.0, 1.0, 1.0]) + torch.tensor([0.0, 1.0] * 2)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(chances.flatten()), dist.Normal(locs, noise[..., None])
    )
    with pyro.plate("data", len(x)):
        pyro.sample("y", mixture, obs=y)


@config_enumerate
def shared(x, y=None):
    """All rows share one site."""
    w, k = _weights(), pyro.sample("k", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + k, 1.0), obs=y)


def shared_written_out(x, y=None):
    w, chances = _weights(), torch.tensor([0.7, 0.3])
    rows = dist.Normal((x @ w)[:, None] + torch.tensor([0.0, 1.0]), 1.0).log_prob(y[:, None])
    pyro.factor("y", (chances.log() + rows.sum(0)).logsumexp(0))


@config_enumerate
def nested(x, y=None):
    """A site of each of four groups, and one of each of their three rows."""
    w, rows = _weights(), None if y is None else y.reshape(3, 4)
    with pyro.plate("groups", 4, dim=-1):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("rows", 3, dim=-2):
            j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k))
            pyro.sample("y", dist.Normal((x @ w).reshape(3, 4) + 2 * k + j, 1.0), obs=rows)


def nested_written_out(x, y=None):
    loc, groups = (x @ _weights()).reshape(3, 4), []
    for k, chance in ((0.0, 0.7), (1.0, 0.3)):
        one = 0.2 + 0.5 * k
        parts = [
            torch.tensor(p).log() + dist.Normal(loc + 2 * k + j, 1.0).log_prob(y.reshape(3, 4))
            for j, p in ((0.0, 1 - one), (1.0, one))
        ]
        groups.append(torch.tensor(chance).log() + torch.stack(parts).logsumexp(0).sum(0))
    pyro.factor("y", torch.stack(groups).logsumexp(0).sum())


@config_enumerate
def chains(x, y=None):
    """Four hidden Markov chains of three steps."""
    w, state = _weights(), torch.tensor(0)
    rows = None if y is None else y.reshape(4, STEPS)
    with pyro.plate("chains", 4):
        for t in pyro.markov(range(STEPS)):
            state = pyro.sample(f"state{t}", dist.Categorical(CHAIN[state]))
            loc = (x @ w).reshape(4, STEPS)[:, t] + 2.0 * state
            pyro.sample(f"y{t}", dist.Normal(loc, 1.0), obs=None if rows is None else rows[:, t])


def chains_written_out(x, y=None):
    loc, paths = (x @ _weights()).reshape(4, STEPS), []
    for path in itertools.product((0, 1), repeat=STEPS):
        chance = torch.stack([CHAIN[a, b] for a, b in itertools.pairwise((0, *path))]).log().sum()
        normal = dist.Normal(loc + 2.0 * torch.tensor(path), 1.0)
        paths.append(chance + normal.log_prob(y.reshape(4, STEPS)).sum(-1))
    pyro.factor("y", torch.stack(paths).logsumexp(0).sum())


@config_enumerate
def random_effects(x, y=None):
    """What is latent and continuous of a row depends on what is discrete of it."""
    w = _weights()
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        effect = pyro.sample("effect", dist.Normal(2 * k, 0.5))
        pyro.sample("y", dist.Normal(x @ w + effect, 1.0), obs=y)


def random_effects_written_out(x, y=None):
    w, parts = _weights(), dist.Categorical(torch.tensor([0.6, 0.4]))
    prior = dist.MixtureSameFamily(parts, dist.Normal(torch.tensor([0.0, 2.0]), 0.5))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", prior)
        pyro.sample("y", dist.Normal(x @ w + effect, 1.0), obs=y)


@config_enumerate
def masked(x, y=None):
    w = _weights()
    with pyro.plate("data", len(x)), poutine.scale(scale=2.0), poutine.mask(mask=x[:, 1] > 0):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(x @ w + k, 1.0), obs=y)


def masked_written_out(x, y=None):
    w, parts = _weights(), dist.Categorical(torch.tensor([0.6, 0.4]))
    normal = dist.Normal((x @ w)[:, None] + torch.tensor([0.0, 1.0]), 1.0)
    with pyro.plate("data", len(x)), poutine.scale(scale=2.0), poutine.mask(mask=x[:, 1] > 0):
        pyro.sample("y", dist.MixtureSameFamily(parts, normal), obs=y)


# Rows are independent given what the guide holds; in the others they are not.
ROWS_APART = {
    "outliers": Pair(outliers, outliers_written_out, ("k",)),
    "clusters": Pair(clusters, clusters_written_out, ("k",)),
    "two sites": Pair(two_sites, two_sites_written_out, ("j", "k")),
    "masked": Pair(masked, masked_written_out, ("k",)),
}
PAIRS = {
    **ROWS_APART,
    "random effects": Pair(random_effects, random_effects_written_out, ("k",)),
    "shared": Pair(shared, shared_written_out, ("k",)),
    "nested": Pair(nested, nested_written_out, ("k", "j")),
    "chains": Pair(chains, chains_written_out, ("state0", "state1", "state2")),
}
