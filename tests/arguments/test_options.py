"""Options of the wrong kind: an error names the option and says what was expected."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import Adam

import pyro_bmr as bmr
from pyro_bmr.arguments.checks import check_choice, read_count, read_names, read_number, show

X = torch.linspace(-1, 1, 40).reshape(10, 4).sin()
Y = 2 * X[:, 0]
QUIET = {"compile": False, "progress": False}


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.fixture
def guide():
    start = init_to_value(values={"w": torch.tensor([2.0, 0.0, 0.0, 0.1])})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.1)
    guide(X, Y)
    return guide


OF_FIT = {
    "estimator": [Trace_ELBO, None, 3, torch.nn.MSELoss(), "locale"],
    "lr": [Adam({"lr": 0.1}), lambda _: None, lambda _: -0.1, lambda: 0.1, "fast", math.nan, True],
    "batch_size": [2.5, "8", 0, -1, True, 11],
    "patience": [1.5, 0, "2"],
    "num_epochs": [2.5, "10", True, 0, math.inf, None],
    "clip_norm": ["1", -1.0, math.nan],
    "seed": ["a", -1, 2**40, 1.5],
    "compile": ["no", 0, None],
    "progress": ["no", 1],
    "callback": [3, AutoNormal],
    "kwargs": [[1], {1: 2}, "a"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OF_FIT.items() for value in values]
)
@pytest.mark.parametrize("verb", [bmr.fit, bmr.prune])
def test_options_of_fit(verb, name, value, guide):
    """The same message from both, before anything is trained."""
    options = {"num_epochs": 1, **QUIET, name: value}
    before = guide.state_dict()["locs.w_unconstrained"].clone()
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*Expected"):
        verb(model, guide, X, Y, **options)
    assert torch.equal(guide.state_dict()["locs.w_unconstrained"], before)


def test_whole_numbers_of_numpy_are_whole_numbers(guide):
    options = {"num_epochs": np.int64(2), "batch_size": np.int32(5), "patience": np.uint8(1)}
    rates = {"lr": np.float32(0.1), "clip_norm": np.float64(10.0), "seed": np.int64(3)}
    assert bmr.fit(model, guide, X, Y, **options, **rates, **QUIET)
    assert bmr.free_energy(model, guide, X, Y, num_samples=np.int64(2))[1] > 0
    assert bmr.fit(model, guide, X, Y, num_epochs=1, lr=lambda _: torch.tensor(0.1), **QUIET)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_rounds", value) for value in (math.nan, -1, "2", 1.5)),
        *(("refit_epochs", value) for value in (0, "2")),
        *(("num_samples", value) for value in (0, 1, "5", 2.5)),
        *(("select", value) for value in (0.5, AutoNormal)),
        *(("sites", value) for value in (3, [3], b"w")),
        *(("groups", value) for value in ("units", 3)),
        ("checkpoint", 3),
        ("algorithm", "other"),
    ],
)
def test_options_of_prune(name, value, guide):
    options = {"num_epochs": 1, **QUIET, name: value}
    with pytest.raises((TypeError, ValueError), match=f"{name}=.*Expected"):
        bmr.prune(model, guide, X, Y, **options)


PROGRAMS = {
    "fit": lambda model, guide: bmr.fit(model, guide, X, Y, num_epochs=1, **QUIET),
    "free_energy": lambda model, guide: bmr.free_energy(model, guide, X, Y),
    "to_arviz": lambda model, guide: bmr.to_arviz(model, guide, X, Y),
    "compare": lambda model, guide: bmr.compare((model, guide), X, Y),
    "reduce": lambda model, guide: bmr.reduce(guide, X, Y, model=model),
}


@pytest.mark.parametrize("verb", PROGRAMS.values(), ids=PROGRAMS)
def test_programs(verb, guide):
    with pytest.raises(TypeError, match=r"class AutoNormal.*Expected.*AutoNormal\(model\)"):
        verb(model, AutoNormal)
    with pytest.raises(TypeError, match="Expected"):
        verb(model, None)
    if verb is not PROGRAMS["reduce"]:
        with pytest.raises(TypeError, match="Expected"):
            verb(None, guide)
    with pytest.raises(TypeError, match="got model=3|got an int|a tuple. Expected"):
        verb(3, guide)


@pytest.mark.parametrize("verb", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_fails_is_named_with_what_it_was_called(verb, guide):
    def failing(x, y=None):
        model(x, y)
        return x["column"]

    with pytest.raises(Exception, match=r"could not be run.*Expected"):
        verb(failing, guide)


CALLS = {
    "samples=0": lambda guide: bmr.free_energy(model, guide, X, Y, num_samples=0),
    "samples='5'": lambda guide: bmr.to_arviz(model, guide, X, Y, num_samples="5"),
    "one sample": lambda guide: bmr.compare((model, guide), X, Y, num_samples=1),
    "estimator": lambda guide: bmr.free_energy(model, guide, X, Y, estimator=Trace_ELBO),
    "sites": lambda guide: bmr.reduce(guide, X, Y, sites=3),
    "kwargs": lambda guide: bmr.reduce(guide, X, Y, kwargs=[1]),
    "lists": lambda guide: bmr.reduce(guide, select=lambda scores: {"w": [True] * 4}),
    "floats": lambda guide: bmr.reduce(guide, select=lambda scores: {"w": torch.ones(4)}),
    "samples": lambda guide: bmr.reduce(
        {"w": torch.zeros(9, 4), "v": torch.zeros(8)}, X, Y, model=with_two
    ),
    "a tensor to draw": lambda guide: bmr.plot_delta_f(X),
    "no network": lambda guide: bmr.init_to_pretrained(None),
    "words": lambda guide: bmr.Gaussian("0", "1"),
    "a float mask": lambda guide: bmr.extend.PrunedModel(model, {"w": torch.ones(4)}),
    "a float mask of a module": lambda guide: bmr.apply_masks(
        torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2)}
    ),
    "audit": lambda guide: bmr.reduce(guide, X, Y).audit(X, Y, num_samples="5"),
    "seed": lambda guide: bmr.compare((model, guide), X, Y, seed=-1),
    "axes": lambda guide: bmr.plot_criteria(bmr.reduce(guide), ax=3),
}


def with_two(x, y=None):
    pyro.sample("v", dist.Normal(0.0, 1.0))
    model(x, y)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, guide):
    with pytest.raises((TypeError, ValueError), match="Expected"):
        call(guide)


def test_checks():
    assert read_count("n", np.int8(3)) == 3
    assert read_number("x", np.float16(0.5), lambda _: True) == 0.5
    assert read_names("sites", (name for name in ("a", "b"))) == ("a", "b")
    assert read_names("sites", "w") == ("w",)
    assert read_names("sites", None) is None
    check_choice("by", "site", ("site", "layer"))
    with pytest.raises(ValueError, match="got by='x'. Expected 'site' or 'layer'"):
        check_choice("by", "x", ("site", "layer"))
    with pytest.raises(ValueError, match="got n=True. Expected a whole number, 1 or more"):
        read_count("n", True)
    with pytest.raises(ValueError, match="between 1 and 3"):
        read_count("n", 4, most=3)


def test_what_came_in_is_shown_in_a_few_words():
    shown = {
        show(one)
        for one in (AutoNormal, torch.zeros(2, 3), np.zeros(2), "a", object(), list(range(99)))
    }
    assert shown == {
        "the class AutoNormal",
        "a Tensor of shape (2, 3)",
        "a ndarray of shape (2,)",
        "'a'",
        "an object",
        "a list",
    }
