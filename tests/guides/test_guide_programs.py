"""Guides of which some sites are read, and the others drawn by the user's own program."""

import copy
import threading
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.programs.wrapped import peel

LOC, SCALE = torch.tensor([2.0, 0.0, 0.0, 0.02]), 0.05


@pytest.fixture
def data():
    x = torch.randn(60, 4)
    return x, 2 * x[:, 0] + 0.5 * torch.randn(60)


def by_hand(width=1.0):
    """What each weight's spike does to F."""
    prior, posterior = dist.Normal(0.0, width), dist.Normal(LOC, SCALE)
    return prior.log_prob(torch.zeros(4)) - posterior.log_prob(torch.zeros(4))


def total(delta_f):
    return float(delta_f.clamp(max=0).sum())


def model_with(prior, mean=lambda w, other: w):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        other = pyro.sample("other", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ mean(w, other), 0.5 + 0.01 * other.sum()), obs=y)

    return model


def weights():
    loc = pyro.param("loc", LOC.clone())
    scale = pyro.param("scale", torch.full((4,), SCALE), constraint=constraints.positive)
    return pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def written(family, *values):
    def guide(x, y=None):
        weights()
        positive = {"constraint": constraints.positive}
        own = [pyro.param(f"p{i}", torch.tensor(v), **positive) for i, v in enumerate(values)]
        pyro.sample("other", family(*own))

    return guide


# The prior, the guide's family with its parameters, and a word of why it is not read.
FAMILIES = {
    "HalfNormal": (dist.HalfNormal(1.0), dist.HalfNormal, [0.3], "AbsTransform"),
    "Uniform": (dist.Uniform(0.0, 4.0), dist.Uniform, [0.5, 2.0], "a Uniform"),
    "InverseGamma": (dist.InverseGamma(3.0, 1.0), dist.InverseGamma, [9.0, 4.0], "a Gamma seen"),
    "StudentT": (dist.Normal(0.0, 1.0), dist.StudentT, [5.0, 0.1, 0.2], "a StudentT"),
    "Delta": (dist.LogNormal(0.0, 1.0), dist.Delta, [0.7], "point mass"),
    "Poisson": (dist.Poisson(3.0), dist.Poisson, [2.0], "it is discrete"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_beside_the_weights(name, data):
    prior, family, values, why = FAMILIES[name]
    model, guide = model_with(prior), written(family, *values)
    guide(*data)
    for options in ({"sites": ["w"]}, {}):
        result = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence(), **options)
        assert result.delta_f == pytest.approx(total(by_hand()), abs=1e-3)
    assert why in result.summary().loc["other", "note"]
    pyro.set_rng_seed(0)
    draws = Predictive(result.guide, num_samples=200)(*data)
    pyro.set_rng_seed(1)
    expected = family(*map(torch.tensor, values)).sample(torch.Size([200]))
    error = (draws["other"].var(0) / 200 + expected.var(0) / 200).sqrt() + 1e-6
    assert ((draws["other"].mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert (draws["w"].reshape(200, 4)[:, ~result.masks["w"]] == 0).all()
    if name == "Poisson":
        assert result.realised is None
        assert "has no reparameterised draws" in result.notes[0]
        return
    audit = result.audit(*data, num_samples=30, progress=False).total
    assert audit.realised == pytest.approx(result.realised, abs=5 * (audit.error + 0.5))


def test_what_is_drawn_is_trained_on(data):
    model, guide = model_with(dist.HalfNormal(1.0)), written(dist.HalfNormal, 0.3)
    guide(*data)
    result = bmr.reduce(guide, *data, model=model, sites="w")
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    first = result.audit(*data, progress=False)
    options = {"num_epochs": 3, "compile": False, "progress": False}
    bmr.fit(result.model, result.guide, *data, **options)
    after = pyro.get_param_store()
    assert not torch.equal(after["p0"], before["p0"])
    assert torch.equal(after["loc"], before["loc"]), "the guide that came in keeps its weights"
    audit = result.audit(*data, progress=False)
    assert [check.name for check in audit.later] == ["after training"]
    assert audit.total.realised == pytest.approx(first.total.realised), "the pair that came in"
    assert torch.equal(pyro.param("p0"), after["p0"]), "and all is left as it is"
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"no parameters \['loc', 'p0', 'scale'\]"):
        result.audit(*data, progress=False)


def test_a_prior_at_the_point_estimate_of_its_scale(data):
    def model(x, y=None):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(0.0, width).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    start = init_to_value(values={"w": LOC, "width": torch.tensor(0.3)})
    guide = AutoGuideList(model)
    hidden, exposed = poutine.block(model, hide=["width"]), poutine.block(model, expose=["width"])
    guide.append(AutoNormal(hidden, init_loc_fn=start, init_scale=SCALE))
    guide.append(AutoDelta(exposed, init_loc_fn=start))
    guide(*data)
    result = bmr.reduce(guide, *data, select=bmr.by_evidence())
    assert result.delta_f == pytest.approx(total(by_hand(0.3)), abs=1e-3)
    assert "point estimate" in result.summary().loc["width", "note"]
    assert result.guide.median(*data)["width"].item() == pytest.approx(0.3)


def test_a_prior_is_expected_under_a_beta(data):
    def model(x, y=None):
        width = pyro.sample("width", dist.Beta(2.0, 2.0))
        w = pyro.sample("w", dist.Normal(0.0, width).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def guide(x, y=None):
        weights()
        pyro.sample("width", dist.Beta(torch.tensor(8.0), torch.tensor(8.0)))

    guide(*data)
    result = bmr.reduce(guide, *data, model=model, sites="w", select=bmr.top_k(2))
    gone = ~result.masks["w"]
    # E[ln s] of Beta(8, 8), which is what the prior at zero depends on.
    expected = torch.digamma(torch.tensor(8.0)) - torch.digamma(torch.tensor(16.0))
    assert result.delta_f == pytest.approx(float((by_hand() - expected)[gone].sum()), abs=0.2)


@pytest.mark.parametrize("part", [AutoDelta, AutoIAFNormal])
def test_parts_of_a_list_that_are_not_gaussian(part, data):
    prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    model = model_with(prior)
    guide = AutoGuideList(model)
    start = init_to_value(values={"w": LOC})
    weights_only = poutine.block(model, hide=["other"])
    guide.append(AutoMultivariateNormal(weights_only, init_loc_fn=start, init_scale=SCALE))
    guide.append(part(poutine.block(model, expose=["other"])))
    guide(*data)
    result = bmr.reduce(guide, *data, select=bmr.by_evidence())
    assert result.delta_f == pytest.approx(total(by_hand()), abs=1e-3)
    again = bmr.reduce(result.guide, *data, select=lambda scores: scores.kept)
    assert again.delta_f == 0 and again.sparsity == result.sparsity
    values = Predictive(result.guide, num_samples=20)(*data)["other"]
    assert bool((values.std(0) > 0).any()) == (part is AutoIAFNormal)
    assert ("other" in result.guide.median(*data)) == (part is AutoDelta), "a flow tells no median"
    assert guide(*data).keys() == {"w", "other"}, "the list itself still runs"


def test_a_discrete_part_of_a_list(data, tmp_path):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5 + k), obs=y)

    start = init_to_value(values={"w": LOC})
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["k"]), init_loc_fn=start, init_scale=SCALE))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    guide(*data)
    result = bmr.reduce(guide, *data, select=bmr.by_evidence())
    assert result.delta_f == pytest.approx(total(by_hand()), abs=1e-3)
    assert "discrete" in result.summary().loc["k", "note"]
    assert set(result.guide(*data)) == {"w", "k"}
    assert "predicted, not measured" not in str(result), "that the data were given is known"
    assert set(result.guide.median(*data)) == {"w"}, "a guide of discrete sites tells no median"
    result.save(tmp_path / "result.bmr")
    again = bmr.load(tmp_path / "result.bmr", model, *data, guide=guide)
    assert str(again) == str(result)


@pytest.mark.parametrize("embedded", [False, True])
def test_codes_of_an_encoder_stay_with_it(embedded):
    """Of an encoder, or of an embedding of whole numbers, to which no gradient leads."""
    rows = torch.arange(30) if embedded else torch.randn(30, 5)
    encoder = torch.nn.Embedding(30, 2) if embedded else torch.nn.Linear(5, 2)
    y = torch.randn(30, 5)

    def model(rows, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 5]).to_event(2))
        with pyro.plate("rows", len(rows)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal(z @ w, 0.3).to_event(1), obs=y)

    def guide(rows, y=None):
        pyro.module("encoder", encoder)
        loc = pyro.param("loc", lambda: 0.02 * torch.randn(2, 5))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(2))
        with pyro.plate("rows", len(rows)):
            pyro.sample("z", dist.Normal(encoder(rows), 1e-3).to_event(1))

    guide(rows)
    result = bmr.reduce(guide, rows, y, model=model, select=bmr.by_evidence())
    assert "amortised" in result.summary().loc["z", "note"]
    assert not result.masks["w"].all() and set(result.masks) == {"w"}
    codes = result.guide(rows[20:])["z"].detach()
    torch.testing.assert_close(codes, encoder(rows[20:]).detach(), atol=0.01, rtol=0)


def test_a_plate_that_both_are_in(data):
    def model(x, y=None):
        with pyro.plate("inputs", 4):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5 + s.mean()), obs=y)

    def guide(x, y=None):
        with pyro.plate("inputs", 4):
            pyro.sample("w", dist.Normal(pyro.param("loc", LOC.clone()), SCALE))
            pyro.sample("s", dist.HalfNormal(pyro.param("s_width", torch.full((4,), 0.2))))

    guide(*data)
    result = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence())
    assert result.delta_f == pytest.approx(total(by_hand()), abs=1e-3)
    trace = poutine.trace(result.guide).get_trace(*data)
    trace.compute_log_prob()
    assert trace.nodes["s"]["fn"].shape() == (4,)
    f, error = bmr.free_energy(model, guide, *data, num_samples=50)
    reduced, its_error = bmr.free_energy(result.model, result.guide, *data, num_samples=50)
    assert reduced - f == pytest.approx(result.realised, abs=5 * (error + its_error))


def test_masked_and_scaled_statements_hold(data):
    def model(x, y=None):
        with poutine.mask(mask=False):
            pyro.sample("v", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def guide(x, y=None):
        with poutine.mask(mask=False):
            pyro.sample("v", dist.Normal(pyro.param("v_loc", torch.tensor(3.0)), 1.0))
        weights()

    guide(*data)
    result = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence())
    assert "scaled or masked" in result.summary().loc["v", "note"]
    trace = poutine.trace(result.guide).get_trace(*data)
    trace.compute_log_prob()
    assert trace.nodes["v"]["log_prob_sum"] == 0


def test_copies_share_the_parameters_of_functions(data):
    model, guide = model_with(dist.HalfNormal(1.0)), written(dist.HalfNormal, 0.3)
    guide(*data)
    result = bmr.reduce(guide, *data, model=model)
    twin = copy.deepcopy(result.guide)
    assert set(twin(*data)) == {"w", "other"}
    assert twin.median()["w"].equal(result.guide.median()["w"])
    assert "other" not in twin.median(), "a program does not tell its median"


def test_files_hold_what_was_read_only(data, tmp_path):
    model, guide = model_with(dist.HalfNormal(1.0)), written(dist.HalfNormal, 0.3)
    guide(*data)
    result = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence())
    result.save(tmp_path / "result.bmr")
    with pytest.raises(ValueError, match=r"\['other'\] are drawn by the guide.*guide=guide"):
        bmr.load(tmp_path / "result.bmr", model, *data)
    again = bmr.load(tmp_path / "result.bmr", model, *data, guide=guide)
    assert str(again) == str(result)
    pyro.set_rng_seed(0)
    expected = result.guide(*data)
    pyro.set_rng_seed(0)
    assert all(torch.equal(value, expected[name]) for name, value in again.guide(*data).items())


def listed(model, part=AutoDelta):
    """Its weights under a Gaussian, and what else there is under another part."""
    start, weights_only = init_to_value(values={"w": LOC}), poutine.block(model, hide=["other"])
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(weights_only, init_loc_fn=start, init_scale=SCALE))
    guide.append(part(poutine.block(model, expose=["other"])))
    return guide


class Written(PyroModule):
    """With an encoder, and a value that a run left behind."""

    def __init__(self, encoder=None):
        super().__init__()
        self.loc = PyroParam(LOC.clone())
        self.encoder = encoder or nn.Linear(4, 2)

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, SCALE).to_event(1))
        self.last = self.encoder(x.square().mean(0))
        pyro.sample("other", dist.Normal(self.last, 0.1).to_event(1))


PAIR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
OWNERS = {
    "AutoDelta": listed,
    "AutoIAFNormal": lambda model: listed(model, AutoIAFNormal),
    "module": lambda _: Written(),
    "module in partial": lambda _: partial(Written(), y=None),
}


def state_of(guide):
    stored = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    state = peel(guide).program.state_dict()
    return stored | {name: value.clone() for name, value in state.items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", OWNERS)
def test_the_result_runs_a_copy_of_modules(name, data, tmp_path):
    """What is run of a module is trained, copied and saved with the result, and only there."""
    x, y = data
    args = (x,) if "partial" in name else data
    model = model_with(PAIR)
    model = partial(model, y=y) if "partial" in name else model
    guide = OWNERS[name](model)
    guide(*args)
    before = state_of(guide)
    result = bmr.reduce(guide, *args, model=model, select=bmr.by_evidence())
    start = {key: value.clone() for key, value in result.guide.state_dict().items()}
    options = {"num_epochs": 3, "lr": 0.1, "compile": False, "progress": False}
    twin = copy.deepcopy(result)
    bmr.fit(twin.model, twin.guide, *args, **options)
    trained = twin.guide.state_dict()
    assert any(not torch.equal(start[k], trained[k]) for k in start if k.startswith("program."))
    assert same(start, result.guide.state_dict()), "the copy has parameters of its own"
    assert same(before, state_of(guide)), "the guide that came in is left as it was"
    audit = twin.audit(*args, num_samples=10, progress=False)
    assert [check.name for check in audit.later] == ["after training"]

    pyro.set_rng_seed(0)
    expected = twin.guide(*args)["other"]
    result.guide.load_state_dict(trained)
    twin.save(tmp_path / "result.bmr")
    loaded = bmr.load(tmp_path / "result.bmr", model, *args, guide=guide)
    for other in (result.guide, loaded.guide):
        pyro.set_rng_seed(0)
        assert torch.equal(other(*args)["other"], expected)
    bmr.fit(model, guide, *args, **options)
    assert not same(before, state_of(guide)), "it still knows its model, and trains"


def test_another_guide_cannot_take_the_state_of_a_file(data, tmp_path):
    model = model_with(PAIR)
    guide = listed(model)
    guide(*data)
    bmr.reduce(guide, *data, select=bmr.by_evidence()).save(tmp_path / "result.bmr")
    with pytest.raises(ValueError, match="has other parameters than the one that was reduced"):
        bmr.load(tmp_path / "result.bmr", model, *data, guide=Written())


def test_modules_of_the_model_stay_the_models(data):
    """A guide that shares layers with its model: the copy does as well."""
    layer = nn.Linear(4, 2)

    def model(x, y=None):
        pyro.module("layer", layer)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        other = pyro.sample("other", dist.Normal(layer.weight.mean(-1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5 + 0.01 * other.sum()), obs=y)

    guide = Written(layer)
    guide(*data)
    result = bmr.reduce(guide, *data, model=model, select=bmr.by_evidence())
    for one in (result.guide, copy.deepcopy(result.guide)):
        (copied,) = one.program.children()
        assert copied.encoder is not layer and copied.encoder.weight is layer.weight
        assert copied.loc_unconstrained is not guide.loc_unconstrained


def test_a_guide_that_cannot_be_copied(data):
    guide = Written()
    guide.lock = threading.Lock()
    guide(*data)
    model = model_with(PAIR)
    with pytest.raises(ValueError, match="could not copy the Written.*lambda"):
        bmr.reduce(guide, *data, model=model)
    shared = bmr.reduce(lambda x, y: guide(x, y), *data, model=model, select=bmr.by_evidence())
    assert not list(shared.guide.program.parameters())


WRAPS = {
    "partial": partial,
    "block": lambda guide: poutine.block(guide, hide_fn=lambda _: False),
    "infer_config": lambda guide: poutine.infer_config(guide, lambda _: {}),
}


@pytest.mark.parametrize("name", [*WRAPS, "bound", "list"])
def test_a_result_inside_of_something_else(name, data):
    """Sites that are run are there, also where the guide of a result is wrapped or in a list."""
    x, y = data
    model = model_with(PAIR)
    guide = listed(model)
    guide(*data)
    first = bmr.reduce(guide, *data, select=bmr.by_evidence())
    args = data
    if name == "bound":
        wrapped, args = partial(first.guide, x), (y,)
    elif name == "list":
        wrapped = AutoGuideList(model)
        wrapped.append(copy.deepcopy(first.guide))
        wrapped(*data)
    else:
        wrapped = WRAPS[name](first.guide)
    told = partial(first.model, x) if name == "bound" else first.model
    again = bmr.reduce(wrapped, *args, model=told, select=lambda scores: dict(scores.kept))
    assert again.sparsity == first.sparsity
    assert set(again.guide(*args)) == {"w", "other"}
    (f, _), (expected, _) = (
        bmr.free_energy(*pair, num_samples=2)
        for pair in ((again.model, again.guide, *args), (first.model, first.guide, *data))
        if not pyro.set_rng_seed(0)
    )
    assert f == pytest.approx(expected)


def test_wrapped_parts_of_a_list_keep_what_is_bound_to_them(data):
    x, y = data
    model = model_with(PAIR)
    guide = listed(model)
    guide(*data)
    bound = partial(guide, x)
    result = bmr.reduce(bound, y, model=partial(model, x), select=bmr.by_evidence())
    assert set(result.guide(y)) == {"w", "other"}


def test_an_average_and_a_compaction_run_it_as_well(data):
    model = model_with(PAIR)
    guide = listed(model)
    guide(*data)
    average = bmr.average(guide, *data)
    assert set(average.guide(*data)) == {"w", "other"}
    compaction = bmr.reduce(guide, *data, select=bmr.by_evidence()).compact(*data)
    assert set(compaction.guide(*data)) == {"w", "other"}


def test_the_copy_of_a_list_can_be_reduced(data):
    model = model_with(PAIR)
    guide = listed(model)
    guide(*data)
    twin = copy.deepcopy(guide)
    result = bmr.reduce(twin, *data, model=model, select=bmr.by_evidence())
    assert result.delta_f == pytest.approx(total(by_hand()), abs=1e-3)


def frozen(encoder, x):
    with torch.no_grad():
        return encoder(x)


ENCODINGS = {
    "no_grad": frozen,
    "detach": lambda encoder, x: encoder(x).detach(),
    "numpy": lambda encoder, x: torch.from_numpy(np.tanh(frozen(encoder, x).numpy())),
    "a mean": lambda encoder, x: frozen(encoder, x).mean(0).expand(len(x), 4),
    "a scale": lambda encoder, x: frozen(encoder, x / x.std()),
}
# What depends on no value of the arguments.
TABLES = {
    "table": lambda table, x: table,
    "size": lambda table, x: table + len(x) + x.to(torch.float64).dtype.itemsize,
    "start": lambda table, x: pyro.param("start", lambda: x[:, :4].clone()),
}


@pytest.mark.parametrize("name", [*ENCODINGS, *TABLES, "given with a gradient", "given as array"])
def test_amortised_is_what_changes_with_the_arguments(name):
    """However little of its gradient reaches the arguments, and only that."""
    x, encoder, head = torch.randn(30, 5), nn.Linear(5, 4), nn.Linear(4, 4)
    table = torch.randn(30, 4)
    given = {"given with a gradient": x.clone().requires_grad_(), "given as array": x.numpy()}
    features = ENCODINGS.get(name) or (lambda encoder, x: encoder(torch.as_tensor(x)))

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 5]).to_event(2))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 0.3).to_event(1), obs=torch.as_tensor(x))

    def guide(x):
        pyro.module("head", head)
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(4, 5)), 0.1).to_event(2))
        with pyro.plate("rows", len(x)):
            loc = TABLES[name](table, x) if name in TABLES else head(features(encoder, x))
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    guide(given.get(name, x))
    result = bmr.reduce(guide, given.get(name, x), model=model, select=lambda s: dict(s.kept))
    assert ("z" in result.masks) == (name in TABLES)
    assert ("amortised" in result.summary().loc["z", "note"]) == (name not in TABLES)


def with_a_factor(depends, x, y=None):
    w = weights()
    log_factor = 0.1 * w.sum() if depends else pyro.param("log_factor", torch.tensor(3.0))
    pyro.factor("extra", log_factor, has_rsample=True)


@pytest.mark.parametrize("in_list", [False, True])
def test_a_factor_of_the_guide_stays(in_list, data, tmp_path):
    model = model_with(PAIR)

    def factor_only(x, y=None):
        pyro.factor("extra", pyro.param("log_factor", torch.tensor(3.0)), has_rsample=True)

    def alone(x, y=None):
        with_a_factor(False, x, y)
        pyro.sample("other", dist.Normal(pyro.param("o", torch.zeros(2)), 0.1).to_event(1))

    guide = alone
    if in_list:
        guide = AutoGuideList(model)
        guide.append(AutoNormal(model, init_loc_fn=init_to_value(values={"w": LOC})))
        guide.append(factor_only)
    guide(*data)
    options = {"model": model, "select": lambda scores: dict(scores.kept)}
    result = bmr.reduce(guide, *data, **options)
    found = []
    for pair in ((model, guide), (result.model, result.guide)):
        pyro.set_rng_seed(0)
        found.append(bmr.free_energy(*pair, *data, num_samples=100, estimator=Trace_ELBO()))
    assert found[1][0] - found[0][0] == pytest.approx(0, abs=4 * (found[0][1] + found[1][1]))
    assert 4 * (found[0][1] + found[1][1]) < 2.5
    again = bmr.reduce(result.guide, *data, **options)
    assert poutine.trace(again.guide).get_trace(*data).nodes["extra"]["is_observed"]
    result.save(tmp_path / "result.bmr")
    with pytest.raises(ValueError, match="extra"):
        bmr.load(tmp_path / "result.bmr", model, *data)


def test_a_factor_that_depends_on_a_site(data):
    prior = dist.Normal(0.0, 1.0).expand([4]).to_event(1)

    def model(x, y=None):
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = partial(with_a_factor, True)
    guide(*data)
    with pytest.raises(TypeError, match="the factor 'extra' of the guide depends on it"):
        bmr.reduce(guide, *data, model=model)
