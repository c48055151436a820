"""Saving and loading: the same numbers as without the detour, and clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from networks import NETWORKS
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from safetensors.torch import load_file, save_file
from torch import nn
from unit_pruning import prune_units

import pyro_bmr as bmr
from conftest import make_case
from pyro_bmr.compaction import compact
from pyro_bmr.files.plans import read_plan, write_plan
from pyro_bmr.files.supports import pack_support, unpack_support

GUIDES = ["AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "mean_field"]


def train(result, args, steps=5):
    torch.manual_seed(7)
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(*args) for _ in range(steps)]
    return losses, {k: v.clone() for k, v in result.guide.state_dict().items()}


def draws(result, args):
    torch.manual_seed(3)
    return result.guide(*args)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("model_name", "guide_name"),
    [*(("network", name) for name in GUIDES), ("functional", "AutoNormal")],
)
def test_round_trip(tmp_path, model_name, guide_name):
    case = make_case(model_name, guide_name)
    result = case.reduce()
    train(result, case.args)  # parameters that no reduction would write
    result.save(tmp_path / "result.bmr")
    fresh = make_case(model_name, guide_name)
    loaded = bmr.load(tmp_path / "result.bmr", fresh.model, *fresh.args)
    assert str(loaded) == str(result)
    assert loaded.summary().equals(result.summary())
    assert loaded.delta_f == result.delta_f
    assert_same(loaded.masks, result.masks)
    assert_same(loaded.scores, result.scores)
    assert_same(loaded.model.masks.by_site(), result.model.masks.by_site())
    assert_same(draws(loaded, case.args), draws(result, case.args))
    losses, state = train(result, case.args)
    loaded_losses, loaded_state = train(loaded, fresh.args)
    assert loaded_losses == losses
    assert_same(
        {k: v for k, v in zip(state, loaded_state.values(), strict=True)},
        state,
    )
    again = bmr.reduce(loaded.guide)
    assert again.sparsity >= result.sparsity


@pytest.mark.parametrize("reduced", [bmr.Gaussian(0.0, 0.1), bmr.Laplace(0.1)])
def test_switched_priors(tmp_path, reduced):
    case = make_case("functional", "AutoNormal")
    first = case.reduce()
    result = bmr.reduce(
        first.guide, reduced_prior={"weight": reduced}, select=bmr.by_evidence(margin=-1e9)
    )
    assert result.shrunk
    result.save(tmp_path / "a")
    loaded = bmr.load(tmp_path / "a", case.model, *case.args)
    assert str(loaded) == str(result)
    # A second time, from what was loaded.
    loaded.save(tmp_path / "b")
    loaded = bmr.load(tmp_path / "b", case.model)
    assert train(loaded, case.args)[0] == train(result, case.args)[0]


def test_names_types_and_own_parameters(tmp_path):
    """Sites with dots and slashes in float64, `pyro.param` in the model, a plate, an interval."""

    def make():
        net = nn.Linear(2, 2, dtype=torch.float64)

        def model(x, y=None):
            pyro.module("net", net)
            one = torch.ones((), dtype=torch.float64)
            noise = pyro.param("noise/of.it", 0.3 * one, constraint=constraints.positive)
            with pyro.plate("in/puts", 2):
                w = pyro.sample("a/b.c", dist.Normal(0 * one, one))
            rate = pyro.sample("rate", dist.Uniform(0 * one, 2 * one))
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(net(x) @ w * rate, noise), obs=y)

        return net, model

    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    args = (x, x[:, 0])
    net, model = make()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(*args)
    result = bmr.reduce(guide, select=bmr.top_k(1))
    path = tmp_path / "folder" / "result.bmr"
    result.save(path)
    noise = pyro.param("noise/of.it").clone()
    expected = train(result, args)
    pyro.clear_param_store()
    fresh, fresh_model = make()
    assert not torch.equal(fresh.weight, net.weight)
    loaded = bmr.load(path, fresh_model, *args)
    assert torch.equal(pyro.param("noise/of.it"), noise)
    found = train(loaded, args)
    assert found[0] == expected[0]
    assert torch.equal(fresh.weight, net.weight)
    assert loaded.guide.median()["a/b.c"].dtype == torch.float64
    # Into a store that has other values, which the model would use.
    pyro.clear_param_store()
    other, other_model = make()
    train(replace(loaded, model=other_model), args, 1)
    loaded = bmr.load(path, other_model)
    assert train(loaded, args)[0] == expected[0]


@pytest.mark.parametrize("name", ["residual_cnn", "vit"])
def test_compaction(tmp_path, name):
    """Sites, sizes that the program writes out, and smaller buffers and parameters."""
    net = NETWORKS[name]()
    guide = AutoNormal(net.model)
    guide(*net.args)
    result = prune_units(bmr.reduce(guide, select=lambda scores: scores.kept))
    compaction = compact(result.model, result.guide)
    assert compaction.elements[1] < compaction.elements[0]
    train(compaction, net.args)
    compaction.save(tmp_path / "small.bmr")
    expected = train(compaction, net.args)
    pyro.clear_param_store()
    fresh = NETWORKS[name]()
    for args in (net.args, ()):
        loaded = bmr.load(tmp_path / "small.bmr", fresh.model, *args)
        assert str(loaded) == str(compaction)
        assert loaded.kept.keys() == compaction.kept.keys()
        losses, state = train(loaded, net.args)
        assert losses == expected[0]
        assert_same(state, expected[1])


MODULE = """
import sys
import torch, pyro, pyro.distributions as dist
from torch import nn
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
import pyro_bmr as bmr

torch.manual_seed(1)
x = torch.randn(30, 3)
y = x[:, 0].sin()
net = bmr.bayesianize(
    nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
)

def model(x, y=None):
    mean = net(x)[:, 0]
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

def train(model, guide, steps):
    pyro.set_rng_seed(5)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(x, y) for _ in range(steps)]

def numbers(losses, result):
    values = [*result.guide.state_dict().values(), *net.state_dict().values()]
    return [loss.hex() for loss in losses] + [v.double().sum().item().hex() for v in values]
"""


def test_another_process(tmp_path, monkeypatch, capsys):
    """Training goes on there as it does here."""
    (tmp_path / "program.py").write_text(MODULE)
    here = """
from program import *
guide = AutoNormal(model)
train(model, guide, 30)
result = bmr.reduce(guide, select=bmr.top_k(15))
result.save(sys.argv[1])
print(numbers(train(result.model, result.guide, 10), result))
"""
    there = """
from program import *
result = bmr.load(sys.argv[1], model)
print(numbers(train(result.model, result.guide, 10), result))
"""
    path = str(tmp_path / "result.bmr")
    monkeypatch.setattr(sys, "argv", ["", path])
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    exec(here, names)
    monkeypatch.delitem(sys.modules, "program")
    command = [sys.executable, "-c", there, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = capsys.readouterr().out
    assert output == done.stdout
    assert output.count("0x") > 20


@pytest.fixture
def saved(tmp_path):
    case = make_case("network", "AutoNormal")
    result = case.reduce()
    path = tmp_path / "result.bmr"
    result.save(path)
    return case, result, path


def test_cut_off(saved):
    case, _, path = saved
    whole = path.read_bytes()
    for length in (0, 5, *range(100, len(whole), len(whole) // 50), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="could not be read"):
            bmr.load(path, case.model)


def test_damaged(saved):
    """A bit that flipped anywhere, in numbers too, is noticed, and the model left as it was."""
    case, _, path = saved
    whole, before = path.read_bytes(), {k: v.clone() for k, v in case.model.state_dict().items()}
    for place in range(3, len(whole), len(whole) // 100):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="could not be read"):
            bmr.load(path, case.model)
    assert_same(dict(case.model.state_dict()), before)


@pytest.mark.parametrize(
    "content",
    ["[]", "1", '"x"', "{}", '{"format": null}', '{"format": 1, "version": "", "plan": {}}']
    + ["[" * 100_000, "9" * 5_000],
)
def test_odd_content(tmp_path, content):
    save_file({"a": torch.ones(1)}, tmp_path / "odd", {"pyro_bmr": content})
    with pytest.raises(ValueError, match="could not be read"):
        bmr.load(tmp_path / "odd", print)


def test_other_files(saved, tmp_path):
    case, _, path = saved
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="Expected a file that pyro_bmr saved"):
        bmr.load(tmp_path / "other", case.model)
    plan = read_plan(path)
    write_plan(tmp_path / "unknown", plan | {"kind": "sculpture"})
    with pytest.raises(ValueError, match="sculpture"):
        bmr.load(tmp_path / "unknown", case.model)
    with pytest.raises(FileNotFoundError):
        bmr.load(tmp_path / "absent", case.model)
    with pytest.raises(IsADirectoryError):
        bmr.load(tmp_path, case.model)


def test_newer_format(saved, tmp_path):
    case, _, path = saved
    content = {"format": 99, "version": "9.0", "plan": {}}
    save_file(load_file(path), tmp_path / "new", {"pyro_bmr": json.dumps(content)})
    with pytest.raises(ValueError, match=r"format 99 .* by pyro-bmr 9.0.*pip install --upgrade"):
        bmr.load(tmp_path / "new", case.model)


@pytest.mark.parametrize("size", [1, 3])
def test_tensors_that_are_expanded(tmp_path, size):
    """Of a single element, the stride can be 0 and the tensor contiguous."""
    write_plan(tmp_path / "a", {"scale": torch.tensor(0.5).expand(size)})
    assert torch.equal(read_plan(tmp_path / "a")["scale"], torch.full((size,), 0.5))


def test_another_model(saved):
    case, _, path = saved
    other = make_case("functional", "AutoNormal")
    with pytest.raises(ValueError, match="saved for another model"):
        bmr.load(path, other.model)
    wider = make_case("network", "AutoNormal").model
    wider.norm = nn.BatchNorm1d(7, affine=False)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"running_mean: .*\(5,\) in the file, .*\(7,\) here"):
        bmr.load(path, wider)
    assert_same(dict(wider.state_dict()), before)
    with pytest.raises(TypeError, match="Expected the Pyro model"):
        bmr.load(path, None)


def test_another_function(tmp_path):
    case = make_case("functional", "AutoNormal")
    case.reduce().save(tmp_path / "a")

    def other(x, y=None):
        w = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="latent sites differ .*extra: none in the file"):
        bmr.load(tmp_path / "a", other, *case.args)
    loaded = bmr.load(tmp_path / "a", other)
    with pytest.raises(ValueError, match="latent sites differ"):
        loaded.model(*case.args)


@pytest.mark.parametrize("given", [True, False])
def test_saved_with_observations_and_used_without(tmp_path, given):
    case = make_case("functional", "AutoNormal")
    x, y = case.args
    result = case.reduce()
    result.save(tmp_path / "a")
    loaded = bmr.load(tmp_path / "a", case.model, *(x,) if given else ())
    draws = [
        Predictive(one.model, guide=one.guide, num_samples=3, parallel=parallel)
        for parallel in (False, True)
        for one in (result, loaded)
    ]
    for one, other in (draws[:2], draws[2:]):
        torch.manual_seed(0)
        expected = one(x)
        torch.manual_seed(0)
        assert_same(other(x), expected)
    loaded.save(tmp_path / "b", x)
    loaded = bmr.load(tmp_path / "b", case.model, x, y)
    assert train(loaded, case.args) != train(result, (x, 2 * y))


def test_another_prior_or_constraint(tmp_path):
    def make(prior, **constraint):
        def model(x, y=None):
            w = pyro.sample("w", prior(torch.zeros(2), 1.0).to_event(1))
            noise = pyro.param("noise", torch.tensor(0.5), **constraint)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

        return model

    x, path = torch.randn(5, 2), tmp_path / "a"
    model = make(dist.Normal, constraint=constraints.positive)
    model(x)
    guide = AutoNormal(model)
    guide(x, x[:, 0])
    bmr.reduce(guide).save(path)
    with pytest.raises(ValueError, match=r"priors differ \(w: Normal in the file, Laplace here\)"):
        bmr.load(path, make(dist.Laplace, constraint=constraints.positive), x)
    pyro.clear_param_store()
    # Its value is not the same number under another constraint.
    pyro.param("noise", torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"noise: GreaterThan.* in the file, Real\(\) here"):
        bmr.load(path, model)
    assert pyro.param("noise") == 3


def test_on_and_on(tmp_path):
    """Save, load, reduce, compact, save, load, train, save, load, reduce, compact."""
    case = make_case("network", "AutoNormal")
    path = tmp_path / "result"
    case.reduce().save(path)
    result = prune_units(bmr.load(path, case.model, *case.args))
    small = result.compact()
    small.save(path)
    loaded = bmr.load(path, make_case("network", "AutoNormal").model, *case.args)
    assert str(loaded) == str(small)
    assert train(loaded, case.args)[0] == train(small, case.args)[0]
    loaded.save(path)
    fresh = make_case("network", "AutoNormal").model
    again = bmr.reduce(bmr.load(path, fresh, *case.args).guide, select=bmr.top_k(9)).compact()
    again.save(path)
    last = bmr.load(path, make_case("network", "AutoNormal").model, *case.args)
    assert last.elements == again.elements
    assert torch.equal(last.to_module()(case.args[0]), again.to_module()(case.args[0]))


def test_nothing_else_changes(tmp_path):
    """The old file stays until the new one is whole; generators and the store are left alone."""
    case = make_case("network", "AutoNormal")
    result = case.reduce()
    path = tmp_path / "result.bmr"
    result.save(path)
    whole, state = path.read_bytes(), torch.get_rng_state()
    before = case.state()
    result.save(path)
    bmr.load(path, case.model, *case.args)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(case.state(), before)
    with pytest.raises(TypeError, match="cannot save a .*function"):
        write_plan(path, {"broken": print})
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["result.bmr"]


def test_model_that_cannot_be_run(tmp_path):
    case = make_case("network", "AutoNormal")
    case.reduce().save(tmp_path / "a")
    loaded = bmr.load(tmp_path / "a", case.model)
    with pytest.raises(RuntimeError, match=r"as in save\(path, x, y\)"):
        loaded.save(tmp_path / "b")
    loaded.save(tmp_path / "b", *case.args)
    assert str(bmr.load(tmp_path / "b", case.model)) == str(loaded)


@pytest.mark.parametrize(
    "support",
    [
        constraints.positive,
        constraints.nonnegative,
        constraints.unit_interval,
        constraints.simplex,
        constraints.real_vector,
        constraints.interval(-1.0, 3.0),
        constraints.less_than(2.0),
        constraints.independent(constraints.positive, 2),
        constraints.lower_cholesky,
        constraints.softplus_positive,
    ],
)
def test_supports(support):
    again = unpack_support(json.loads(json.dumps(pack_support(support, "w"))))
    assert repr(again) == repr(support)
    assert type(again) is type(support)
    x = torch.randn(4, 4)
    assert torch.equal(constraints_map(again, x), constraints_map(support, x))


def constraints_map(support, x):
    return torch.distributions.transform_to(support)(x)


def test_unknown_support():
    with pytest.raises(ValueError, match="cannot save w, .* Expected one of real"):
        pack_support(constraints.cat([constraints.real]), "w")


def earlier(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    mean = torch.tanh(x @ w) @ v
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
    return mean


@pytest.mark.parametrize("name", ["units", "shrunk", "compaction"])
def test_files_from_before_the_packages_were_moved(name):
    """Written before prune returned a result, with what was printed then."""
    path = Path(__file__).with_name("earlier") / f"{name}.bmr"
    x = torch.linspace(-1, 1, 40).reshape(10, 4)
    loaded = bmr.load(path, earlier, x, x[:, 0])
    assert str(loaded) == path.with_suffix(".txt").read_text()
    assert loaded.to_module()(x).shape == (10,)


def test_priors_of_written_sizes(tmp_path):
    """torch.zeros(4, 3) is a function of torch too, though it takes no tensor."""

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), torch.ones(4, 3)).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return torch.tanh(x @ w) @ v

    x = torch.randn(5, 4)
    guide = AutoNormal(model)
    guide(x)
    result = bmr.reduce(guide, x, select=lambda _: {"v": torch.tensor([True, False, True])})
    small = result.compact(x)
    assert small.guide.median()["w"].shape == (4, 2)
    small.save(tmp_path / "small.bmr")
    loaded = bmr.load(tmp_path / "small.bmr", model, x)
    torch.testing.assert_close(loaded.to_module(x)(x), small.to_module(x)(x), rtol=0, atol=0)


def rows_of_five():
    with pyro.plate("rows", 5, subsample_size=4):
        pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def vectors_in_nested_plates():
    rows, columns = pyro.plate("r", 5, subsample_size=2, dim=-2), pyro.plate("c", 4, dim=-1)
    with rows, columns:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def prior_of_each_row():
    with pyro.plate("rows", 5, subsample_size=2) as index:
        pyro.sample("w", dist.Normal(0.0, 1.0 + index))
    pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def of_all_sites(model):
    return AutoNormal(model)


def list_of(family):
    def make(model):
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, expose=["w"])))
        guide.append(family(poutine.block(model, hide=["w"])))
        return guide

    return make


@pytest.mark.parametrize("model", [rows_of_five, vectors_in_nested_plates, prior_of_each_row])
@pytest.mark.parametrize(
    "make", [of_all_sites, list_of(AutoDiagonalNormal), list_of(AutoMultivariateNormal)]
)
def test_sub_sampled_plates(tmp_path, model, make):
    """The guide holds all rows, the model draws some of them."""
    pyro.set_rng_seed(0)
    guide = make(model)
    guide()
    result = bmr.reduce(guide, select=bmr.baselines.random(0.5))
    result.save(tmp_path / "result.bmr")
    loaded = bmr.load(tmp_path / "result.bmr", model)
    assert_same(loaded.masks, result.masks)
    assert loaded.delta_f == result.delta_f
    assert_same(loaded.guide.median(), result.guide.median())
    assert_same(draws(loaded, ()), draws(result, ()))
    loaded.model()
    assert bmr.reduce(loaded.guide, select=lambda scores: dict(scores.kept)).delta_f == 0


def test_sub_sampled_plates_of_another_size(tmp_path):
    guide = AutoNormal(rows_of_five)
    guide()
    bmr.reduce(guide, select=bmr.baselines.random(0.5)).save(tmp_path / "result.bmr")

    def other():
        with pyro.plate("rows", 6, subsample_size=4):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    loaded = bmr.load(tmp_path / "result.bmr", other)
    with pytest.raises(ValueError, match="plate"):
        loaded.model()
