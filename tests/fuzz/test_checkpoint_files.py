"""Damaged and forged checkpoints: an error that says so, and nothing changed; or a sound run."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from damage import damage, forge
from peak import peak
from pyro.infer.autoguide import AutoNormal
from scale import random_source, times
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.files.plans import read_plan, write_plan
from pyro_bmr.training import keeping

X = torch.linspace(-1, 1, 24).reshape(8, 3)
Y = X[:, 0].sin()
QUIET = {"compile": False, "progress": False, "seed": 1}

# How many epochs are done, and after which one the training is interrupted.
EPOCHS = [0, -1]


def count(_epoch):
    EPOCHS[0] += 1
    if EPOCHS[0] == EPOCHS[1]:
        raise KeyboardInterrupt


class Run:
    """A model with buffers and parameters of its own, and a guide that has been called."""

    def __init__(self):
        pyro.clear_param_store()
        self.net = net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

        def model(x, y=None):
            pyro.module("net", net)
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(net(x) @ w, 0.3), obs=y)

        self.model, self.guide = model, AutoNormal(model)
        self.guide(X, Y)

    def fit(self, path):
        return bmr.fit(
            self.model, self.guide, X, Y, num_epochs=3, callback=count, checkpoint=path, **QUIET
        )

    def prune(self, path):
        options = {"num_epochs": 2, "max_rounds": 2, "num_samples": 2, "algorithm": "paper"}
        options |= {"select": bmr.baselines.snr(0.5), "callback": count, "checkpoint": path}
        return bmr.prune(self.model, self.guide, X, Y, **options, **QUIET)

    def state(self):
        store = [t for _, t in pyro.get_param_store().named_parameters()]
        tensors = [*store, *self.net.buffers(), torch.get_rng_state()]
        return [tensor.detach().clone() for tensor in tensors]


@pytest.fixture(params=["fit", "prune"])
def interrupted(request, tmp_path, monkeypatch):
    """A verb, and the file of a run of it that was interrupted in a training."""
    monkeypatch.setattr(keeping, "_LEAST_APART", 0.0)
    monkeypatch.setattr(keeping, "_MOST_WRITING", torch.inf)
    EPOCHS[:] = 0, {"fit": 2, "prune": 3}[request.param]
    with pytest.raises(KeyboardInterrupt):
        getattr(Run(), request.param)(tmp_path / "run")
    return request.param, tmp_path / "run"


def try_file(verb, path, *, forged):
    run = Run()
    before = run.state()
    try:
        getattr(run, verb)(path)
    except ValueError as error:
        assert "Expected" in str(error)
        assert all(map(torch.equal, run.state(), before))
        return
    assert forged, "a damaged file was resumed"
    assert all(p.isfinite().all() for p in run.guide.parameters())


def test_damaged(interrupted):
    verb, path = interrupted
    whole, before, random = path.read_bytes(), peak(), random_source(f"{verb} damaged")
    for _ in range(times(6)):
        damaged = damage(whole, random)
        if damaged != whole:
            path.write_bytes(damaged)
            try_file(verb, path, forged=False)
    assert peak() - before < 200


def test_forged(interrupted):
    """With the checksum that fits."""
    verb, path = interrupted
    plan, before, random = read_plan(path), peak(), random_source(f"{verb} forged")
    for _ in range(times({"fit": 6, "prune": 2}[verb])):
        write_plan(path, forge(plan, random))
        try_file(verb, path, forged=True)
    assert peak() - before < 200
