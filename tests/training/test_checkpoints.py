"""`fit(checkpoint=)`: killed at any moment, a training ends as if it had not been."""

import json
import math
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from often import often
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.files.plans import read_plan, write_plan
from pyro_bmr.programs.fingerprints import fingerprint
from pyro_bmr.training import keeping
from pyro_bmr.training.checkpoint_files import CheckpointFile
from pyro_bmr.training.generators import pack_generators, set_generators

X = torch.linspace(-1, 1, 48).reshape(12, 4)
Y = X[:, 0].sin()
OPTIONS = {"num_epochs": 6, "batch_size": 5, "seed": 3, "progress": False, "compile": False}

# At this fraction of the training, it is interrupted.
STOP = 2.0


def falling(done):
    return 0.05 * (1 - done)


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(keeping, "_LEAST_APART", 0.0)
    monkeypatch.setattr(keeping, "_MOST_WRITING", torch.inf)


def linear():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    return model, AutoMultivariateNormal(model)


def with_state_of_its_own():
    """Running means, a parameter of the store, and noise of NumPy and Python."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def model(x, y=None):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        noise = 0.01 * (np.random.standard_normal() + random.random())
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] * w + noise, scale), obs=y)

    return model, AutoNormal(model)


def by_batch():
    """Parameters that come into being after the first step."""
    model, _ = linear()
    steps = iter(range(10**6))

    def guide(x, y=None):
        late = pyro.param("late", torch.tensor(0.5)) if next(steps) > 3 else 0.0
        loc = pyro.param("loc", torch.zeros(4))
        scale = pyro.param("scale", torch.ones(4), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc + late, scale).to_event(1))

    return model, guide


def run(make, path=None, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    model, guide = make()
    options = OPTIONS | options

    def interrupt(one):
        if (one.epoch + 1) / options["num_epochs"] >= STOP:
            raise KeyboardInterrupt

    losses = bmr.fit(model, guide, X, Y, **options, checkpoint=path, callback=interrupt)
    store = {n: t.detach().clone() for n, t in pyro.get_param_store().named_parameters()}
    return losses, store, torch.get_rng_state(), np.random.random(), random.random()


def assert_same(first, second):
    assert first[0] == second[0] and first[3:] == second[3:]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    assert torch.equal(first[2], second[2])


CASES = {
    "eager": (linear, {"clip_norm": 1.0, "patience": 4}),
    "all rows": (linear, {"batch_size": None}),
    "state of its own": (with_state_of_its_own, {}),
    "compiled": (linear, {"compile": True, "num_epochs": 400}),
}


@pytest.mark.parametrize("kind", often(CASES, "eager", "all rows", "state of its own"))
def test_an_interrupted_training_ends_as_one_that_was_not(kind, tmp_path, monkeypatch):
    make, options = CASES[kind]
    options = {"lr": falling, **options}
    whole = run(make, **options)
    path = tmp_path / "new" / "run.fit"
    for stop in (0.2, 0.5, 0.8):
        monkeypatch.setitem(globals(), "STOP", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make, path, **options)
    monkeypatch.setitem(globals(), "STOP", 2.0)
    assert_same(run(make, path, **options), whole)
    monkeypatch.setitem(globals(), "STOP", 0.0)
    assert_same(run(make, path, **options), whole)
    assert [file.name for file in path.parent.iterdir()] == ["run.fit"]


def test_parameters_that_come_later(tmp_path, monkeypatch):
    """The guide counts its calls, which no checkpoint knows: one resumed before it has them all."""
    path = tmp_path / "run.fit"
    whole = run(by_batch, lr=falling)
    monkeypatch.setitem(globals(), "STOP", 0.7)
    with pytest.raises(KeyboardInterrupt):
        run(by_batch, path, lr=falling)
    monkeypatch.setitem(globals(), "STOP", 2.0)
    losses, store, *_ = run(by_batch, path, lr=falling)
    assert store.keys() == whole[1].keys() and "late" in store
    assert losses[:4] == whole[0][:4]


@pytest.mark.rare
def test_compiled_and_not(tmp_path, monkeypatch):
    """The one goes on from the other, since a machine may have no compiler."""
    path = tmp_path / "run.fit"
    options = {"lr": falling, "num_epochs": 400}
    for compile, stop in ((True, 0.3), (False, 0.6), (True, 2.0)):
        monkeypatch.setitem(globals(), "STOP", stop)
        if stop < 1:
            with pytest.raises(KeyboardInterrupt):
                run(linear, path, compile=compile, **options)
        else:
            losses, *_ = run(linear, path, compile=compile, **options)
    assert len(losses) == 400 and losses[-1] < losses[0]


def test_of_another_run_or_damaged(tmp_path):
    path = tmp_path / "run.fit"
    run(linear, path)
    whole = path.read_bytes()
    for options, match in (
        ({"num_epochs": 7}, "another run: num_epochs was 6 and is 7"),
        ({"lr": 0.1}, "another run: lr was 0.01 and is 0.1"),
        ({"batch_size": 4}, "another run: batch_size was 5 and is 4"),
    ):
        with pytest.raises(ValueError, match=match):
            run(linear, path, **options)
    with pytest.raises(ValueError, match=r"of another run: it has 'AutoM.*\(4,\)"):
        run(of_another_size, path)
    damaged = bytearray(whole)
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    pyro.clear_param_store()
    model, guide = linear()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="could not be read as a checkpoint .*fit"):
        bmr.fit(model, guide, X, Y, **OPTIONS, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), before) and not pyro.get_param_store().keys()
    assert path.read_bytes() == damaged
    plan = read_plan_of(whole, path)
    plan["content"]["steps"]["parameters"][0]["value"][0] = torch.nan
    write_plan(path, plan)
    with pytest.raises(ValueError, match="expected finite numbers"):
        run(linear, path)
    with pytest.raises(ValueError, match="/kind"):
        bmr.prune(*linear(), X, Y, num_epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="/kind"):
        bmr.load(path, model)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        run(linear, tmp_path)
    with pytest.raises(ValueError, match="checkpoint=''"):
        run(linear, "")


def scaled(factor):
    return partial(lambda by, done: by * (1 - done), factor)


def by_default(factor):
    return lambda done, by=factor: by * (1 - done)


class Slope:
    def __init__(self, by):
        self.by = by

    def __call__(self, done):
        return self.by * (1 - done)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("batch_size", np.int64(8), 12),
        ("seed", np.int64(1), 2),
        ("lr", np.float32(0.1), 0.5),
        ("lr", scaled(0.1), scaled(0.5)),
        ("lr", by_default(0.1), by_default(0.5)),
        ("lr", Slope(0.1), Slope(0.5)),
        ("lr", lambda done: 0.1 * (1 - done), lambda done: 0.1 * (1 + done)),
        ("lr", math.cos, math.exp),
        ("estimator", Trace_ELBO(num_particles=1), Trace_ELBO(num_particles=5)),
    ],
)
def test_a_changed_option_is_another_run(tmp_path, name, before, after):
    run(linear, tmp_path / "run.fit", **{name: before})
    run(linear, tmp_path / "run.fit", **{name: before})
    with pytest.raises(ValueError, match=f"of another run: {name} was .*Expected"):
        run(linear, tmp_path / "run.fit", **{name: after})


def test_an_option_of_another_kind_and_the_same_value_is_the_same_run(tmp_path):
    first = run(linear, tmp_path / "run.fit", batch_size=8, lr=0.25)
    again = run(linear, tmp_path / "run.fit", batch_size=np.int64(8), lr=np.float32(0.25))
    assert_same(first, again)


def test_fingerprints_of_functions_and_objects():
    def recursive(n):
        return recursive(n - 1) if n else {"a", "b"}

    pairs = [
        (scaled(0.1), scaled(0.5)),
        (by_default(0.1), by_default(0.5)),
        (Slope(0.1), Slope(0.5)),
        (Slope(0.1).__call__, Slope(0.5).__call__),
        (Slope(np.ones(2)), Slope(np.zeros(2))),
        (lambda t: 0.1 * (1 - t), lambda t: 0.1 * (1 + t)),
        (lambda t: math.sin(t), lambda t: math.cos(t)),
        (math.sin, math.cos),
    ]
    for one, other in pairs:
        assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    itself = Slope(recursive)
    itself.by = itself
    for one in (recursive, itself, np.int64(8), pairs):
        json.dumps(fingerprint(one))


def test_a_checkpoint_that_is_no_path_is_named():
    with pytest.raises(TypeError, match="checkpoint=3"):
        run(linear, 3)


def read_plan_of(content, path):
    path.write_bytes(content)
    return read_plan(path)


def of_another_size():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, :3] @ w, 0.3), obs=y)

    return model, AutoMultivariateNormal(model)


def test_costs_little(tmp_path, monkeypatch):
    """Not more often than it is worth, but at the end."""
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(CheckpointFile, "write", lambda self, run, content: written.append(content))
    run(linear, tmp_path / "run.fit")
    assert len(written) <= 2 and len(written[-1]["losses"]) == 6


def test_generators_where_other_devices_are_seen():
    """Saved where two were in use, set where none is, and the other way round."""
    pyro.set_rng_seed(1)
    packed = pack_generators(set())
    drawn = torch.rand(3), np.random.random(), random.random()
    set_generators({**packed, "devices": [packed["torch"]] * 2}, {torch.device("cpu")})
    assert torch.equal(torch.rand(3), drawn[0])
    assert (np.random.random(), random.random()) == drawn[1:]
