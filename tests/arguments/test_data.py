"""Data of every usual kind: as tensors of the guide's dtype, or refused by name."""

from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy.sparse import csr_array

import pyro_bmr as bmr
from pyro_bmr.programs.data import read_data

X = torch.linspace(-1, 1, 40).reshape(10, 4).sin()
Y = 2 * X[:, 0] + torch.tensor([0.1, -0.1]).repeat(5)
NAMES = ["age", "sex", "bmi", "bp"]
FRAME = pd.DataFrame(X.numpy(), columns=NAMES)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def counts(x, y):
    """Looks up rows of a table by whole numbers."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.stack([0 * w[x], w[x]], -1)), obs=y)


def trained(dtype=torch.float32):
    loc = torch.tensor([2.0, 0.0, 0.0, 0.1], dtype=dtype)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": loc}), init_scale=0.1)
    guide(X.to(dtype), Y.to(dtype))
    return guide.to(dtype)


KINDS = {
    "numpy": (X.numpy(), Y.numpy()),
    "float64": (X.double().numpy(), Y.double().numpy()),
    "half": (X.numpy().astype("float16"), Y.numpy().astype("longdouble")),
    "big endian": (X.numpy().astype(">f8"), Y.numpy().astype(">f4")),
    "backwards": (X.flip(0).numpy()[::-1], Y.flip(0).numpy()[::-1]),
    "read only": (np.broadcast_to(X.numpy(), X.shape), Y.numpy()),
    "float64 tensors": (X.double(), Y.double()),
    "half tensors": (X.half(), Y.half()),
    "mixed": (X, Y.double().numpy()),
    "pandas": (FRAME, pd.Series(Y.numpy())),
    "nullable": (FRAME.astype("Float64"), pd.Series(Y.numpy(), dtype="Float32")),
    "xarray": (xr.DataArray(X.numpy(), dims=["row", "column"]), xr.DataArray(Y.numpy())),
    "lists": (X.tolist(), Y.tolist()),
    "a list": (X, Y.tolist()),
    "whole numbers": (X.numpy(), Y.round().long().numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    """Before a guide has parameters, and after; floats are those of the guide."""
    whole = kind == "whole numbers"
    for guide in (AutoNormal(model), trained()):
        (x, y), _ = read_data(model, guide, KINDS[kind], None)
        assert x.dtype == torch.float32
        assert y.dtype == (torch.int64 if whole else torch.float32)
        torch.testing.assert_close(x, X, atol=1e-3, rtol=0)
        torch.testing.assert_close(y.float(), Y.round() if whole else Y, atol=2e-3, rtol=0)


def test_the_dtype_is_that_of_the_guide_or_of_the_model():
    for x in (X, X.numpy(), FRAME):
        (found,), _ = read_data(model, trained(torch.float64), (x,), None)
        assert found.dtype == torch.float64

    def double(x):
        pyro.sample("w", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1)) @ x.mT

    assert read_data(double, AutoNormal(double), (X.numpy(),), None)[0][0].dtype == torch.float64
    assert read_data(None, {"w": Y.double()}, (X.numpy(),), None)[0][0].dtype == torch.float64


def test_tensors_that_the_program_takes_stay_as_they_are():
    def careful(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        late = (x - x.min()).float() + 0 * y
        pyro.sample("z", dist.Normal(late @ w, 1.0).to_event(1), obs=late[:, 0])

    times, places = X.double() + 1e9, torch.zeros(10, 1, dtype=torch.int32)
    args, _ = read_data(careful, AutoNormal(careful), (times, places), None)
    assert args[0] is times
    assert args[1] is places


def test_whole_numbers_stay_whole_unless_the_program_needs_floats():
    labels, seen = np.array([0, 2, 1], dtype="uint16"), np.array([True, False, True])
    args, _ = read_data(counts, AutoNormal(counts), (labels, seen), None)
    assert [one.dtype for one in args] == [torch.int64, torch.bool]
    grades = pd.DataFrame({name: range(10) for name in NAMES})
    args, _ = read_data(model, AutoNormal(model), (grades, Y), None)
    assert args[0].dtype == torch.float32
    assert args[0][3].tolist() == [3.0] * 4


def test_what_is_no_data_stays_as_it_is():
    given = ("name", 3, 0.5, None, [8, 4], (1.0, 2.0), {"a": "b"}, model, X)
    args, kwargs = read_data(lambda *_, **__: None, None, given, {"offset": np.float32(0.5)})
    assert all(one is other for one, other in zip(args[:4], given[:4], strict=True))
    assert args[4:8] == given[4:8]
    assert kwargs == {"offset": 0.5}
    numbers = np.int64(3), np.float16(0.5), Decimal("0.5"), np.bool_(True)
    args, _ = read_data(lambda *_: None, None, numbers, None)
    assert args == (3, 0.5, 0.5, numbers[3])
    assert [type(one) for one in args[:3]] == [int, float, float]


def test_data_inside_of_containers():
    (pair, parts), _ = read_data(None, None, ((X.numpy(), "a"), {"y": Y.numpy()}), None)
    assert torch.equal(pair[0], X)
    assert pair[1] == "a"
    assert torch.equal(parts["y"], Y)


class Batch(dict):
    """A mapping whose items are attributes, as many packages have one."""

    __getattr__ = dict.__getitem__


class Pair(NamedTuple):
    x: Any
    y: Any


def test_containers_stay_what_they_are():
    def attributes(batch, seen):
        seen.append(len(batch.x))
        model(batch.x, batch.y)

    seen = []
    guide = AutoNormal(model)
    guide(X, Y)
    for batch in (Batch(x=X, y=Y), Pair(X, Y)):
        args, _ = read_data(attributes, None, (batch, seen), None)
        assert args[0] is batch
        assert args[1] is seen
    for batch in (Batch(x=X.double().numpy(), y=Y), Pair(X.numpy(), Y.numpy())):
        args, _ = read_data(attributes, guide, (batch, seen), None)
        assert type(args[0]) is type(batch)
        assert torch.equal(args[0].x, X)
        assert args[0].y.dtype == torch.float32


def test_lists_that_the_model_takes_stay_lists():
    def layers(sizes):
        assert all(isinstance(one, int) for one in sizes)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(sizes).to_event(2))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(layers)
    assert bmr.fit(layers, guide, [8, 4], num_epochs=1, compile=False, progress=False)
    assert guide.median([8, 4])["w"].shape == (8, 4)


REFUSED = {
    "sparse": (X.to_sparse(), "argument 0, a Tensor .* sparse. Expected a dense one.*to_dense"),
    "scipy": (csr_array(X.numpy()), "sparse. Expected a dense one"),
    "meta": (X.to("meta"), "meta device, without numbers. Expected one with numbers"),
    "words": (np.array(["a", "b"]), "of <U1. Expected numbers: encode words"),
    "dates": (pd.Series(pd.to_datetime(["2020-01-01"])), "no numbers.*datetime64.*Expected"),
    "objects": (np.array([None, "a"]), "of object. Expected numbers"),
    "a frame of words": (FRAME.assign(job="nurse"), r"\{'job': '\w+'\}. Expected.*get_dummies"),
    "categories": (pd.Series(["a", "b"], dtype="category"), "no numbers.*category"),
    "a data set": (xr.Dataset({"x": ("row", [1.0])}), r"Dataset of \['x'\]. Expected one of its"),
    "a mask": (np.ma.array([1.0, 2.0], mask=[True, False]), "with a mask. Expected.*filled"),
    "no rows": (torch.zeros(0, 4), r"shapes \[\(0, 4\)\], without any rows. Expected"),
    "too large": (np.array([2**64 - 1], dtype="uint64"), "beyond.*Expected smaller ones"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("verb", [bmr.reduce, bmr.presence])
def test_what_holds_no_numbers_is_refused(kind, verb):
    value, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        verb(trained(), value)


def test_one_empty_tensor_among_others_is_no_fault():
    args, _ = read_data(None, None, (X, torch.zeros(0, dtype=torch.long)), None)
    assert len(args[1]) == 0


FEW = {"num_samples": 2}
VERBS = {
    "reduce": lambda guide, *data: bmr.reduce(guide, *data).realised,
    "presence": lambda guide, *data: bmr.presence(guide, *data),
    "tune_prior": lambda guide, *data: bmr.tune_prior(guide, *data),
    "measure_sparsities": lambda guide, *data: bmr.measure_sparsities(
        guide, *data, num_points=2, **FEW
    ),
    "free_energy": lambda guide, *data: bmr.free_energy(model, guide, *data, **FEW),
    "to_arviz": lambda guide, *data: bmr.to_arviz(model, guide, *data, **FEW, prior=False),
    "compare": lambda guide, *data: bmr.compare((model, guide), *data, test=data, loo=False, **FEW),
    "audit": lambda guide, *data: bmr.reduce(guide).audit(*data, **FEW),
    "to_module": lambda guide, *data: bmr.to_module(model, guide, *data)(X),
    "plot_predictions": lambda guide, *data: bmr.plot_predictions(
        (model, guide), *data, along=data[1], data=(data[1], data[1]), **FEW
    ),
    "compact": lambda guide, *data: bmr.reduce(guide).compact(*data),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_verb_takes_a_frame(verb):
    assert verb(trained(), FRAME, pd.Series(Y.numpy())) is not None


def test_fit_takes_all_kinds():
    for kind in ("float64 tensors", "pandas", "whole numbers"):
        pyro.clear_param_store()
        data = KINDS[kind]
        losses = bmr.fit(
            model, AutoNormal(model), *data, num_epochs=1, batch_size=5, progress=False
        )
        assert np.isfinite(losses).all()


def test_a_column_where_a_row_is_meant():
    """A table of densities of N x N would be a wrong number without a word."""
    result = bmr.reduce(trained(), X, Y)
    column = Y[:, None]
    calls = [
        lambda: result.audit(X, column),
        lambda: result.to_arviz(X, column, num_samples=2),
        lambda: bmr.reduce(trained(), X, column, select=bmr.by_free_energy()),
        lambda: bmr.compare(result, X, column, num_samples=4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"'y'.*shape \(10, 1\).*Expected data of the"):
            call()


def network(x, y=None):
    first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([5, 4]).to_event(2))
    second = pyro.sample("second", dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ first.mT).tanh() @ second[0], 1.0), obs=y)


def test_names_of_columns_are_labels():
    guide = AutoNormal(network)
    guide(X, Y)
    result = bmr.reduce(guide, FRAME, Y, select=bmr.top_k(20))
    axes = bmr.plot_weights(result, "first")
    labels = [label.get_text() for ax in axes for label in ax.get_yticklabels()]
    assert labels[-4:] == NAMES
    drawn = {text.get_text() for text in bmr.plot_network(result, ["first", "second"])[0].texts}
    assert drawn >= set(NAMES)
    title = bmr.plot_element(result, "first", (0, 2)).get_title(loc="left")
    assert title.startswith("first[0, bmi]: ")
    for data in (
        result.to_arviz(num_samples=3),
        bmr.to_arviz(network, guide, FRAME, Y, num_samples=3),
    ):
        assert data.posterior["first_dim_1"].values.tolist() == NAMES
        assert data.posterior["first_dim_0"].values.tolist() == list(range(5))
        assert data.constant_data["x_dim_1"].values.tolist() == NAMES
    given = {"first_dim_1": list("abcd")}
    data = bmr.to_arviz(network, guide, FRAME, Y, num_samples=3, coords=given)
    assert data.posterior["first_dim_1"].values.tolist() == list("abcd")


def test_names_that_may_be_of_another_axis_are_left_out():
    """Four columns, and four units: which axis runs along the columns is not known."""

    def square(x, y=None):
        first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([4, 4]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ first).sum(-1), 1.0), obs=y)

    guide = AutoNormal(square)
    guide(X, Y)
    data = bmr.to_arviz(square, guide, FRAME, Y, num_samples=3)
    assert data.posterior["first_dim_1"].values.tolist() == list(range(4))
    assert data.constant_data["x_dim_1"].values.tolist() == NAMES


def test_names_of_columns_are_not_those_of_a_plate():
    """As many schools as columns."""

    def schools(x, y=None):
        with pyro.plate("schools", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ theta, 1.0), obs=y)

    guide = AutoNormal(schools)
    guide(X, Y)
    result = bmr.reduce(guide, FRAME, Y, select=bmr.top_k(4))
    assert bmr.plot_element(result, "theta", (2,)).get_title(loc="left").startswith("theta[2]: ")
    for data in (
        result.to_arviz(num_samples=3),
        bmr.to_arviz(schools, guide, FRAME, Y, num_samples=3),
    ):
        assert data.posterior["schools"].values.tolist() == list(range(4))
        assert data.constant_data["x_dim_1"].values.tolist() == NAMES


def test_columns_of_one_name_the_first_of_which_are_words():
    frame = pd.DataFrame([["a", 1.0], ["b", 2.0]], columns=["x", "x"])
    guide = AutoNormal(network)
    with pytest.raises(ValueError, match="with columns that are no numbers, {'x': .*Expected"):
        bmr.fit(network, guide, frame, torch.zeros(2), num_epochs=1, progress=False)
