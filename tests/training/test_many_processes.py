"""Guides that many processes train are refused by name, wherever a guide comes in."""

import os
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pyro_bmr as bmr

X, Y = torch.linspace(-1, 1, 20).reshape(10, 2), torch.linspace(0, 1, 10)

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="this build of torch has no gloo"
)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = tmp_path_factory.mktemp("processes") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with warnings.catch_warnings(action="ignore"):
        yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def guide():
    guide = AutoNormal(model)
    guide(X, Y)
    return guide


VERBS = {
    "fit": lambda guide: bmr.fit(model, guide, X, Y, num_epochs=1, progress=False),
    "prune": lambda guide: bmr.prune(model, guide, X, Y, num_epochs=1, progress=False),
    "free_energy": lambda guide: bmr.free_energy(model, guide, X, Y, num_samples=2),
    "reduce": lambda guide: bmr.reduce(guide, X, Y, model=model),
    "presence": lambda guide: bmr.presence(guide, X, Y, model=model),
    "average": lambda guide: bmr.average(guide, X, Y, model=model),
    "tune_prior": lambda guide: bmr.tune_prior(guide, X, Y, model=model),
    "compare": lambda guide: bmr.compare((model, guide), X, Y, num_samples=2),
    "to_arviz": lambda guide: bmr.to_arviz(model, guide, X, Y, num_samples=2),
    "to_module": lambda guide: bmr.to_module(model, guide, X),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_replicated_guides(verb, guide, mesh):
    before = guide.locs.w.detach().clone()
    replicated = DistributedDataParallel(guide)
    with pytest.raises(TypeError, match=r"DistributedDataParallel.*Expected.*guide.module"):
        verb(replicated)
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        verb(partial(replicated))
    assert guide.locs.w.equal(before)


def test_a_replicated_encoder_inside_of_a_guide(mesh):
    encoder = DistributedDataParallel(nn.Linear(2, 2))

    def amortised(x, y=None):
        pyro.module("encoder", encoder)
        pyro.sample("w", dist.Normal(encoder(x).mean(0), 1.0).to_event(1))

    with pytest.raises(TypeError, match="DistributedDataParallel"):
        bmr.fit(model, amortised, X, Y, num_epochs=1, progress=False)


def test_split_guides(guide, mesh):
    part = nn.Linear(2, 2)
    part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh))
    guide.encoder = part
    for verb in (VERBS["fit"], VERBS["reduce"]):
        with pytest.raises(TypeError, match=r"got a guide with a DTensor.*Expected.*state dict"):
            verb(guide)
    guide.encoder = nn.Linear(2, 2)
    fully_shard(guide.encoder, mesh=mesh)
    with pytest.raises(TypeError, match="got a guide with a FSDPModule"):
        VERBS["reduce"](guide)
    guide.encoder = nn.Linear(2, 2)
    whole = FullyShardedDataParallel(guide.encoder, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="got a guide with a FullyShardedDataParallel"):
        VERBS["reduce"](whole)


def test_what_only_has_such_a_name_is_taken(guide):
    class DTensor(nn.Module):
        pass

    guide.other = DTensor()
    assert bmr.reduce(guide).masks["w"].shape == (2,)
