"""One way of calling: the model's arguments by position, its keywords in kwargs=."""

import inspect
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyro_bmr as bmr
from pyro_bmr import testing
from pyro_bmr.sklearn import PrunedClassifier, PrunedRegressor

X = torch.linspace(-1, 1, 40).reshape(20, 2)
Y = 2 * X[:, 0] + 1.0
OFFSET = torch.ones(20)


def model(x, y=None, *, offset):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = x @ w + offset
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
    return mean


GIVEN = {"kwargs": {"offset": OFFSET}}
FAST = {"num_epochs": 2, "compile": False, "progress": False}
FEW = {"num_samples": 2}


@pytest.fixture
def guide():
    start = init_to_value(values={"w": torch.tensor([2.0, 0.0])})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.1)
    guide(X, Y, offset=OFFSET)
    return guide


@pytest.fixture
def result(guide):
    return bmr.reduce(guide, X, Y, **GIVEN)


# By name: how each verb is called with the data.
OF_A_GUIDE = {
    "reduce": lambda guide, *data, **given: bmr.reduce(guide, *data, **given),
    "presence": lambda guide, *data, **given: bmr.presence(guide, *data, **given),
    "average": lambda guide, *data, **given: bmr.average(guide, *data, **given),
    "compare_models": lambda guide, *data, **given: bmr.compare_models(
        guide, {"full": {}, "one": {"w[0]": False}}, *data, **given
    ),
    "tune_prior": lambda guide, *data, **given: bmr.tune_prior(guide, *data, **given),
    "measure_sparsities": lambda guide, *data, **given: bmr.measure_sparsities(
        guide, *data, **given, **FEW, num_points=2
    ),
}
OF_A_PAIR = {
    "fit": lambda pair, *data, **given: bmr.fit(*pair, *data, **given, **FAST),
    "prune": lambda pair, *data, **given: bmr.prune(*pair, *data, **given, **FAST, **FEW),
    "free_energy": lambda pair, *data, **given: bmr.free_energy(*pair, *data, **given, **FEW),
    "to_arviz": lambda pair, *data, **given: bmr.to_arviz(*pair, *data, **given, **FEW),
    "to_module": lambda pair, *data, **given: bmr.to_module(*pair, *data, **given, **FEW),
}
OF_PAIRS = {
    "compare": lambda pairs, *data, **given: bmr.compare(pairs, *data, **given, **FEW, loo=False),
    "plot_predictions": lambda pairs, *data, **given: bmr.plot_predictions(
        pairs, *data, **given, **FEW
    ),
    "measure_costs": lambda pairs, *data, **given: bmr.measure_costs(
        pairs, *data, **given, **FEW, seconds=0.0
    ),
}
OF_A_RESULT = {
    "audit": lambda result, *data, **given: result.audit(*data, **given, **FEW, progress=False),
    "to_arviz": lambda result, *data, **given: result.to_arviz(*data, **given, **FEW),
    "compact": lambda result, *data, **given: result.compact(*data, **given),
    "to_module": lambda result, *data, **given: result.to_module(*data, **given, **FEW),
    "report": lambda result, *data, **given: result.report(*data, **given, **FEW),
    "take_inputs": lambda result, *data, **given: result.compact().take_inputs(*data, **given),
}


@pytest.mark.parametrize("verb", OF_A_GUIDE.values(), ids=OF_A_GUIDE)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_verbs_of_a_guide(verb, guide):
    def written(*data, offset):
        loc = pyro.param("loc", torch.tensor([2.0, 0.0]))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    assert verb(guide, X, Y, **GIVEN) is not None
    written(X, Y, offset=OFFSET)
    assert verb(written, X, Y, model=model, **GIVEN) is not None
    with pytest.raises((TypeError, RuntimeError), match="offset"):
        verb(guide, X, Y, kwargs={"offsets": OFFSET})


@pytest.mark.parametrize("name", OF_A_PAIR)
def test_verbs_of_a_model_and_its_guide(name, guide, result):
    verb = OF_A_PAIR[name]
    assert verb((model, guide), X, Y, **GIVEN) is not None
    with pytest.raises(TypeError, match=rf"{name}\(result.model, result.guide, x, y\)"):
        verb((result, X), Y, **GIVEN)


@pytest.mark.parametrize("verb", OF_PAIRS.values(), ids=OF_PAIRS)
def test_verbs_of_pairs(verb, guide, result):
    """A pair is a result, or (model, guide), or a mapping from names to these."""
    pair = model, guide
    for pairs in (result, pair, {"full": pair, "reduced": result}):
        assert verb(pairs, X, Y, **GIVEN) is not None
    expected = r"Expected a pair: what reduce or prune returned, or \(model, guide\); or a mapping"
    for nothing, got in ((guide, "AutoNormal. "), ({"full": model}, "function as 'full'. ")):
        with pytest.raises(TypeError, match=f"got an? {got}{expected}"):
            verb(nothing, X, Y, **GIVEN)
    with pytest.raises(ValueError, match="got no models. Expected a pair"):
        verb({}, X, Y, **GIVEN)


@pytest.mark.parametrize("verb", OF_A_RESULT.values(), ids=OF_A_RESULT)
def test_what_a_result_can_do(verb, result):
    assert verb(result, X, Y, **GIVEN) is not None


@pytest.mark.parametrize("verb", [bmr.reduce, bmr.presence, bmr.average, bmr.tune_prior])
def test_a_warning_shows_the_line_of_the_call(verb):
    guide = AutoNormal(lambda: pyro.sample("u", dist.LogNormal(0.0, 1.0)))
    guide()
    with pytest.warns(UserWarning, match="no site of this guide can be reduced") as caught:
        verb(guide)
    assert [one.filename for one in caught] == [__file__]


def test_files(guide, result, tmp_path):
    path = tmp_path / "result.bmr"
    for one in (result, result.compact()):
        one.save(path, X, Y, **GIVEN)
        assert str(bmr.load(path, model, X, Y, **GIVEN)) == str(one)
    testing.check_guide_family(guide, X, Y, **GIVEN, num_samples=100)


@pytest.mark.rare
def test_onnx(guide, result, tmp_path):
    """Of a result, a pair, or a module that was made from one."""
    path = tmp_path / "network.onnx"
    bmr.export_onnx(result, path, X, **GIVEN)
    bmr.export_onnx((model, guide), path, X, **GIVEN, **FEW)
    bmr.export_onnx(result.to_module(X, **GIVEN), path, X, OFFSET)
    result.export_onnx(path, X, **GIVEN)
    with pytest.raises(TypeError, match="got a list. Expected a pair"):
        bmr.export_onnx([guide], path, X)
    with pytest.raises(ValueError, match="got a module with kwargs="):
        bmr.export_onnx(result.to_module(X, **GIVEN), path, X, **GIVEN)


PUBLIC = [
    *(getattr(bmr, name) for name in (*bmr.__all__, "load")),
    *(getattr(bmr.extend, name) for name in bmr.extend.__all__),
    *(getattr(bmr.types, name) for name in bmr.types.__all__),
    *(bmr.plots.data, bmr.plots.plot_presence, bmr.plots.plot_sites),
    *(bmr.baselines.snr, bmr.baselines.spr, bmr.baselines.magnitude, bmr.baselines.random),
    *(bmr.nn.normal, bmr.nn.fan_in_normal, bmr.nn.learned_normal, testing.check_guide_family),
    *(PrunedClassifier, PrunedRegressor),
]
# What Pyro calls, in Pyro's way.
PROGRAMS = {"forward", "median", "quantiles", "split_loss", "loss"}
PROGRAMS |= {"loss_and_grads", "differentiable_loss", "differentiable_terms", "learn"}
VERBS = [one for one in PUBLIC if inspect.isfunction(one)] + [
    method
    for one in PUBLIC
    if inspect.isclass(one)
    for name, method in inspect.getmembers(one, inspect.isfunction)
    if method.__module__.startswith("pyro_bmr.") and name[0] != "_" and name not in PROGRAMS
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__qualname__)
def test_signatures(verb):
    """No args=, no num_draws, no bare keywords of the model."""
    parameters = inspect.signature(verb).parameters.values()
    kinds = {parameter.name: parameter.kind for parameter in parameters}
    assert kinds.get("args", inspect.Parameter.VAR_POSITIONAL) is inspect.Parameter.VAR_POSITIONAL
    assert "num_draws" not in kinds
    bare = [name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]
    assert bare == {bmr.prune: ["fit_options"], bmr.model_grid: ["factors"]}.get(verb, [])
    if "args" in kinds:
        assert kinds.get("kwargs") is inspect.Parameter.KEYWORD_ONLY


def test_every_verb_is_called_here():
    of_data = {verb.__name__ for verb in VERBS if "args" in inspect.signature(verb).parameters}
    with_files = {"save", "load", "export_onnx", "check_guide_family"}
    assert of_data == {*OF_A_GUIDE, *OF_A_PAIR, *OF_PAIRS, *OF_A_RESULT, *with_files}


def test_few_names_that_do_not_surprise():
    names = {}
    exec("from pyro_bmr import *", names)  # noqa: S102
    assert len(bmr.__all__) <= 60
    assert not names.keys() & {"load", "random", "normal", "nn", "Check", "Window", "Site", "Cost"}
    modules = ("baselines", "extend", "nn", "plots", "types")
    assert all(hasattr(bmr, name) for name in (*bmr.__all__, "load", *modules))
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", bmr.__version__)
