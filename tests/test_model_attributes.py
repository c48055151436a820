"""The reduced model stands in for the user's: what can be read from that can be read from it."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.extend import PrunedModel

MASKS = {"w": torch.tensor([True, False, True])}
X = torch.linspace(-1, 1, 30).reshape(10, 3)


class Regression(PyroModule):
    """A model with attributes of every kind."""

    kind = "regression"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.masks = "of the user"
        self._calls = 0
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x, y=None):
        self._calls += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(self.layer(x) @ w + self.shift.sum(), 0.5), obs=y)

    def predict(self, x):
        return self.layer(x) + self.shift

    @property
    def width(self):
        return self.layer.in_features

    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


def weights():
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def check_attributes(pruned, model):
    assert (pruned.kind, pruned.width, pruned.shift) == ("regression", 3, model.shift)
    assert pruned.layer is model.layer
    assert pruned.predict(X).equal(model.predict(X))
    assert pruned._calls == model._calls
    assert isinstance(pruned.masks, nn.Module) and model.masks == "of the user"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = pruned.absent
    assert getattr(pruned, "absent", 1) == 1


def test_attributes_of_a_module():
    model = Regression()
    pruned = PrunedModel(model, MASKS)
    check_attributes(pruned, model)
    check_attributes(PrunedModel(pruned, MASKS), model)
    pruned.kind = "mine"
    assert (pruned.kind, model.kind) == ("mine", "regression")
    assert pruned(X).shape == (10,) and pruned._calls == 1


def test_attributes_of_a_function_and_of_an_object():
    def described():
        return weights()

    described.doses = [1, 2]
    pruned = PrunedModel(described, MASKS)
    assert pruned.doses is described.doses
    assert not hasattr(pruned, "__name__") and not hasattr(pruned, "__wrapped__")

    class Owner:
        rate = 0.5

        def __call__(self):
            return weights()

    assert PrunedModel(Owner(), MASKS).rate == 0.5


def test_a_module_that_holds_no_model_yet_has_no_attributes():
    bare = PrunedModel.__new__(PrunedModel)
    nn.Module.__init__(bare)
    with pytest.raises(AttributeError):
        _ = bare.kind


def test_copies_and_files(tmp_path):
    model = Regression()
    pruned = PrunedModel(model, MASKS)
    torch.save(pruned, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    copies = [copy.copy(pruned), pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned), loaded]
    for copied in copies:
        check_attributes(copied, copied.model)
        assert copied.state_dict().keys() == pruned.state_dict().keys()
        trace = pyro.poutine.trace(copied).get_trace(X)
        assert trace.nodes["w"]["value"][1] == 0
    assert copies[0].model is model and copies[2].model is not model
    by_function = pickle.loads(pickle.dumps(PrunedModel(weights, MASKS)))
    assert by_function()[1] == 0


def test_inside_of_a_pyro_module():
    class Outer(PyroModule):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = Regression()
    outer = Outer(PrunedModel(model, MASKS))
    trace = pyro.poutine.trace(outer).get_trace(X)
    assert trace.nodes["w"]["value"][1] == 0
    names = {name for name, _ in outer.named_parameters()}
    assert names == {"inner.model.layer.weight", "inner.model.layer.bias"}
    guide = AutoNormal(PrunedModel(model, MASKS))
    assert guide(X)["w"].shape == (3,)


@pytest.mark.parametrize("reduced_prior", [bmr.Spike(), bmr.Gaussian(0.0, 0.1)])
def test_attributes_of_what_reduce_returns(reduced_prior):
    model = Regression()
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": torch.zeros(3)}))
    guide(X, X[:, 0])
    result = bmr.reduce(guide, reduced_prior=reduced_prior)
    check_attributes(result.model, model)


class Forecast(ForecastingModel):
    def model(self, zero_data, covariates):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with self.time_plate:
            steps = pyro.sample("steps", dist.Normal(zero_data, 0.05).to_event(1))
        prediction = steps.cumsum(-2) + (weight * covariates).sum(-1, keepdim=True)
        self.predict(dist.Normal(0.0, torch.full((1,), 0.2)), prediction)


def test_a_forecaster_with_a_reduced_pair():
    pyro.set_rng_seed(0)
    covariates = torch.randn(24, 3)
    data = covariates[:, :1] + 0.1 * torch.randn(24, 1)
    past = data[:20], covariates[:20]
    options = {"learning_rate": 0.1, "num_steps": 40, "log_every": 0}
    forecaster = Forecaster(Forecast(), *past, **options)
    keep = {"weight": torch.tensor([True, False, False])}
    result = bmr.reduce(forecaster.guide, *past, sites=["weight"], select=lambda _: keep)
    forecaster.model, forecaster.guide = result.model, result.guide
    pyro.set_rng_seed(1)
    forecast = forecaster(data[:20], covariates, num_samples=30)
    assert forecast.shape == (30, 4, 1)
    # What is pruned has no influence, also on times that the guide has not seen.
    pyro.set_rng_seed(1)
    other = torch.cat([covariates[:, :1], torch.full((24, 2), 9.0)], -1)
    torch.testing.assert_close(forecaster(data[:20], other, num_samples=30), forecast)
    assert not forecast.std(0).eq(0).any()


class Buffers(PyroModule):
    """A model that writes to a buffer whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()).expand(3))

    def forward(self, x, y):
        self.count.fill_(self.count[0].item() + 1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_buffers_whose_elements_share_memory_are_put_back(tmp_path):
    y = X[:, 0] - X[:, 2]
    model = Buffers()
    guide = AutoNormal(model)
    bmr.fit(model, guide, X, y, num_epochs=2, progress=False, checkpoint=tmp_path / "fit")
    count = model.count.clone()
    result = bmr.reduce(guide, X, y)
    assert torch.equal(model.count, count) and count[0] > 0
    result.save(tmp_path / "result")
    model.count.zero_()
    bmr.load(tmp_path / "result", model, X, y)
    assert torch.equal(model.count, count)
    model.count.zero_()
    bmr.fit(model, guide, X, y, num_epochs=2, progress=False, checkpoint=tmp_path / "fit")
    assert torch.equal(model.count, count)
    bmr.prune(model, guide, X, y, num_epochs=1, max_rounds=1, progress=False)


@pytest.mark.parametrize("form", ["to_sparse_csr", "to_sparse_coo"])
def test_sparse_buffers(form):
    model = Buffers()
    model.register_buffer("sparse", getattr(torch.eye(3), form)())
    guide = AutoNormal(model)
    guide(X, X[:, 0])
    bmr.reduce(guide, X, X[:, 0])
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert (model.count == 1).all()
