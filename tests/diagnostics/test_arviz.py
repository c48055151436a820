"""What ArviZ makes of the draws, in its old format and in its new one."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from exact_regression import ExactRegression
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.diagnostics.draws import draw
from pyro_bmr.programs import batched_draws

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

NEW = int(version("arviz").partition(".")[0]) >= 1
mpl.use("Agg")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*Pareto:UserWarning",
    "ignore:Consolidated",
)

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] + 0.5 * torch.randn(20, generator=torch.Generator().manual_seed(1))
SAMPLED = ["posterior", "unconstrained_posterior", "prior", "posterior_predictive"]
GROUPS = {*SAMPLED, "log_likelihood", "observed_data", "constant_data"}


def write_and_read(data, path):
    """To a file and back; ArviZ 0.23 leaves Zarr from version 3 on to xarray."""
    if path.suffix == ".nc":
        data.to_netcdf(str(path))
        return az.from_netcdf(str(path))
    (data if NEW else data.to_datatree()).to_zarr(str(path))
    return xr.open_datatree(str(path), engine="zarr")


def plot(name, data):
    """Draw a figure under the name that it has in this version."""
    weights = {"var_names": ["net.weight"]}
    if NEW:
        new = {
            "forest": lambda: az.plot_forest(data, **weights),
            "ridge": lambda: az.plot_ridge(data, **weights),
            "prior": lambda: az.plot_prior_posterior(data, var_names=["scale"]),
            "predictive": lambda: az.plot_ppc_dist(data),
        }
        return new[name]()
    old = {
        "forest": lambda: az.plot_forest(data, **weights),
        # It has no density for a point mass, which a pruned element is.
        "ridge": lambda: az.plot_forest(
            data, kind="ridgeplot", coords={"net.weight_dim_0": [0]}, **weights
        ),
        "prior": lambda: az.plot_dist_comparison(data, var_names=["scale"]),
        "predictive": lambda: az.plot_ppc(data, num_pp_samples=20),
    }
    return old[name]()


def regression(x, y=None, *, offset=0.0):
    weight = pyro.sample("net.weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("size", weight.square().sum())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + offset, scale), obs=y)


def made(model, *args, family=AutoNormal, **options):
    guide = family(model, init_scale=0.2, **options)
    guide(*args)
    return guide


@pytest.fixture
def guide():
    start = init_to_value(values={"net.weight": torch.tensor([1.0, 0.1, 0.0])})
    return made(regression, X, Y, init_loc_fn=start)


@pytest.fixture
def result(guide):
    return bmr.reduce(guide, sites=["net.weight"], select=bmr.top_k(1))


@pytest.fixture
def data(result):
    return result.to_arviz(X, Y, num_samples=200)


def test_groups_shapes_and_dims(guide, result, data):
    """One chain of draws, dims of plates, full and reduced alike."""
    assert isinstance(data, xr.DataTree if NEW else az.InferenceData)
    full = bmr.to_arviz(regression, guide, X, Y, num_samples=200)
    for one, groups in [(full, GROUPS), (data, GROUPS | {"bmr"})]:
        found = set(one.children) if NEW else set(one.groups())
        assert found == groups
        for group in [*SAMPLED, "log_likelihood"]:
            for array in one[group].data_vars.values():
                assert array.dims[:2] == ("chain", "draw")
                assert array.shape[:2] == (1, 200)
        assert one["log_likelihood"]["y"].dims == ("chain", "draw", "data")
        assert one["posterior_predictive"]["y"].shape == (1, 200, 20)
        assert one["posterior"]["net.weight"].dims[2:] == ("net.weight_dim_0",)
        assert set(one["posterior"].data_vars) == {"net.weight", "scale", "size"}
        assert one["constant_data"]["x"].dims == ("data", "x_dim_1")
        assert one["observed_data"]["y"].values.tolist() == Y.tolist()
        assert one["posterior"].attrs["creation_library"] == "pyro_bmr"
    real, free = (data[g]["scale"].values for g in ("posterior", "unconstrained_posterior"))
    np.testing.assert_allclose(np.log(real), free, rtol=1e-4, atol=1e-6)
    shared = (data[g]["net.weight"].values for g in ("posterior", "unconstrained_posterior"))
    assert np.shares_memory(*shared)
    without = result.to_arviz(X, Y, num_samples=2, prior=False)
    assert not hasattr(without, "prior")
    assert "realised" not in data["bmr"].attrs
    measured = bmr.reduce(guide, X, Y, sites=["net.weight"])
    totals = measured.to_arviz(X, Y, num_samples=2, prior=False)["bmr"].attrs
    for name in ("delta_f", "sparsity", "realised", "realised_error"):
        assert totals[name] == getattr(measured, name)


def test_pruned_elements_are_zero_in_every_draw(guide, result, data):
    mask = result.masks["net.weight"].numpy()
    for group in ("posterior", "prior"):
        values = data[group]["net.weight"].values[0]
        assert (values[:, ~mask] == 0).all()
        assert (values[:, mask] != 0).all()
    known = data["bmr"]
    assert known["net.weight_mask"].values.tolist() == mask.tolist() == [True, False, False]
    delta_f = result.scores["net.weight"].numpy()
    np.testing.assert_array_equal(known["net.weight_delta_f"].values, delta_f)
    presence = bmr.presence(guide, sites=["net.weight"]).probability["net.weight"]
    np.testing.assert_allclose(known["net.weight_inclusion_probability"], presence, rtol=1e-4)
    twice = bmr.reduce(result.guide, X, Y, sites=["net.weight"]).to_arviz(num_samples=2)
    assert (twice["bmr"]["net.weight_inclusion_probability"].values[~mask] == 0).all()
    shrunk = bmr.reduce(guide, sites=["net.weight"], reduced_prior=bmr.Gaussian(0.0, 0.1))
    known = shrunk.to_arviz(X, Y, num_samples=2)["bmr"]
    assert known["net.weight_mask"].values.all()
    kept = known["net.weight_keeps_prior"].values
    assert kept.tolist() == shrunk.masks["net.weight"].tolist()


def test_log_likelihood_and_draws(data):
    """Against scipy at each draw, and against the moments of what was drawn from."""
    posterior = data["posterior"]
    weight, scale = posterior["net.weight"].values[0], posterior["scale"].values[0]
    mean = weight @ X.numpy().T
    expected = stats.norm(mean, scale[:, None]).logpdf(Y.numpy())
    found = data["log_likelihood"]["y"].values[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    residual = (data["posterior_predictive"]["y"].values[0] - mean) / scale[:, None]
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(posterior["size"].values[0], (weight**2).sum(-1), rtol=1e-5)
    assert stats.kstest(data["prior"]["scale"].values[0], "lognorm", args=(1.0,)).pvalue > 1e-3


def test_seed_and_side_effects(guide, result):
    state = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    random = torch.get_rng_state()
    first, again, other = (
        result.to_arviz(X, Y, num_samples=50, seed=seed)["posterior_predictive"]["y"].values
        for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), random)
    now = dict(pyro.get_param_store().items())
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files(data, tmp_path, suffix):
    """Names with dots and masks come back."""
    back = write_and_read(data, tmp_path / f"draws{suffix}")
    for group in GROUPS | {"bmr"}:
        for name, array in data[group].data_vars.items():
            xr.testing.assert_equal(array, back[group][name].load())
            assert back[group][name].dtype == array.dtype


def test_arviz_takes_it(guide, data):
    full = bmr.to_arviz(regression, guide, X, Y, num_samples=200)
    assert np.isfinite(az.loo(data).elpd if NEW else az.loo(data).elpd_loo)
    assert set(az.compare({"full": full, "reduced": data}).index) == {"full", "reduced"}
    table = az.summary(data, kind="stats")
    assert float(table.loc["net.weight[1]", "mean"]) == 0
    assert len(table) == 5


@pytest.mark.parametrize("name", ["forest", "ridge", "prior", "predictive"])
def test_plots(data, name):
    plot(name, data)
    mpl.pyplot.close("all")


class Regression(ExactRegression):
    def model(self):
        weight = pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("data", len(self.y)):
            pyro.sample("y", dist.Normal(self.x @ weight, self.noise), obs=self.y)


def test_loo_of_exact_regression():
    """Against the predictive densities of each datum given all others, in closed form."""
    x, y = X.double(), Y.double()
    prior = torch.zeros(3).double(), torch.ones(3).double()
    problem = Regression(x, y, 0.5, *prior)
    data = bmr.to_arviz(problem.model, problem.dense(), num_samples=4000)
    exact = []
    for i in range(len(y)):
        others = torch.arange(len(y)) != i
        loc, covariance = Regression(x[others], y[others], 0.5, *prior).posterior()
        variance = 0.25 + x[i] @ covariance @ x[i]
        exact.append(stats.norm(float(x[i] @ loc), float(variance) ** 0.5).logpdf(float(y[i])))
    loo = az.loo(data, pointwise=True)
    pointwise = loo.elpd_i if NEW else loo.loo_i
    np.testing.assert_allclose(pointwise.values, exact, atol=0.1)
    assert abs(float(pointwise.sum()) - sum(exact)) < 0.15


def test_bayes_factor_is_delta_f():
    """The Savage-Dickey ratio by kernel densities of draws, as ArviZ has it."""

    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    start = init_to_value(values={"w": torch.tensor(0.4)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.4)
    guide()
    data = bmr.to_arviz(model, guide, num_samples=20000)
    found = az.bayes_factor(data, "w")
    ratio = float(found["w"].sel(bf_type="BF10") if NEW else found["BF10"])
    # BF10 is the prior density at 0 over that of the posterior: exp ΔF of the spike.
    assert np.log(ratio) == pytest.approx(float(bmr.reduce(guide).scores["w"]), abs=0.1)


def many(x, y, counts, mask):
    probability = pyro.sample("probability", dist.Dirichlet(torch.ones(3)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("output", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        with poutine.mask(mask=mask), poutine.scale(scale=3.0):
            pyro.sample("count", dist.Poisson(rate), obs=counts)
    with pyro.plate("rows", len(x)):
        pyro.sample("class", dist.Categorical(probability), obs=y)
        pyro.sample("pair", dist.Normal(x[:, :2], rate[..., None]).to_event(1), obs=x[:, :2])
    pyro.factor("penalty", -rate)


def test_several_outputs():
    """Classes, counts under a mask, events; the mask's data have no weight, the scale has none."""
    counts, mask = torch.arange(40.0).reshape(2, 20) % 3, torch.arange(20) > 4
    args = X, torch.arange(20) % 3, counts, mask
    data = bmr.to_arviz(many, made(many, *args), *args, num_samples=30, prior=False)
    likelihood = data["log_likelihood"]
    assert likelihood["count"].dims[2:] == ("output", "data")
    assert likelihood["pair"].dims[2:] == ("rows",)
    assert data["posterior_predictive"]["pair"].dims[2:] == ("rows", "pair_dim_1")
    assert set(data["constant_data"].data_vars) == {"x", "mask"}
    assert "penalty" not in likelihood
    posterior = {name: one.values[0] for name, one in data["posterior"].data_vars.items()}
    rate = posterior["rate"][:, None, None]
    expected = stats.poisson(rate).logpmf(counts.numpy()) * mask.numpy()
    np.testing.assert_allclose(likelihood["count"].values[0], expected, rtol=1e-4, atol=1e-5)
    chosen = np.log(posterior["probability"])[:, args[1]]
    np.testing.assert_allclose(likelihood["class"].values[0], chosen, rtol=1e-4, atol=1e-5)
    free = data["unconstrained_posterior"]["probability"]
    assert free.dims[2:] == ("probability_unconstrained_dim_0",)
    assert data["posterior_predictive"]["class"].dtype == np.int64
    observed = draw(many, made(many, *args), args, num_samples=3).observed
    assert observed["class"].probabilities.shape == (3, 20, 3)
    assert observed["class"].mean is None
    assert observed["pair"].mean.shape == (3, 20, 2)


def test_discrete_sites_and_missing_observations():
    def model(x, y=None):
        switch = pyro.sample("switch", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(switch * x[:, 0], 1.0), obs=y)

    def guide(x, y=None):
        pyro.sample("switch", dist.Bernoulli(0.25))

    data = bmr.to_arviz(model, guide, X, num_samples=400)
    assert data["posterior"]["switch"].values.mean() == pytest.approx(0.25, abs=0.08)
    assert data["posterior_predictive"]["y"].dims[2:] == ("data",)
    assert not hasattr(data, "log_likelihood")
    assert not hasattr(data, "unconstrained_posterior")
    with pytest.warns(UserWarning, match=r"does not hold the latent sites \['switch'\]"):
        draws = draw(*_with_enumerated(model), (X, Y), num_samples=9)
    assert draws.predicted["switch"].shape == (9,)


def _with_enumerated(model):
    def outer(x, y=None):
        pyro.sample("bias", dist.Normal(0.0, 1.0))
        model(x, y)

    def guide(x, y=None):
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    return outer, guide


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_all_at_once_or_one_by_one(family, monkeypatch):
    """In chunks, or one after the other where torch.vmap cannot follow."""

    def model(x, y=None, branch=False):
        weight = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = x @ weight if not branch or weight.sum() > -100 else x.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = made(model, X, Y, family=family)
    monkeypatch.setattr(batched_draws, "_CHUNK", 200)
    with pytest.warns(UserWarning, match=r"the model runs once for each draw.*control flow"):
        slow = draw(model, guide, (X, Y, True), num_samples=100)
    fast = draw(model, guide, (X, Y), num_samples=100)
    assert torch.equal(fast.latent["w"], slow.latent["w"])
    assert len(fast.latent["w"].unique(dim=0)) == 100
    assert len(fast.observed["y"].draws.unique(dim=0)) == 100
    expected = stats.norm((fast.latent["w"] @ X.T).numpy()).logpdf(Y.numpy())
    for draws in (slow, fast):
        np.testing.assert_allclose(draws.observed["y"].log_prob, expected, rtol=1e-4, atol=1e-4)


def _kalman(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([2]).to_event(1))
    state, noise = (dist.Normal(0.0, torch.ones(n)).to_event(1) for n in (2, 1))
    moves = dist.Normal(0.0, scale).to_event(1)
    matrices = torch.tensor([[0.9, 0.0], [0.1, 0.8]]), torch.ones(2, 1)
    fn = dist.GaussianHMM(state, matrices[0], moves, matrices[1], noise, duration=len(x))
    pyro.sample("y", fn, obs=y)


def _ordinal(x, y=None):
    weight = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ weight, torch.tensor([-1.0, 1.0])), obs=y)


def _written_in_place(x, y=None):
    weight = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    mean = x.clone()
    mean[:, 0] = x @ weight
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean[:, 0], 1.0), obs=y)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("model", "y"),
    [
        (_kalman, Y[:, None]),
        (_ordinal, torch.arange(len(Y)) % 3),
        (_written_in_place, Y),
    ],
)
def test_what_writes_into_memory_of_all_draws_still_runs_at_once(model, y):
    guide = made(model, X, y)
    draws = draw(model, guide, (X, y), num_samples=4)
    assert len(draws.observed["y"].draws.double().flatten(1).unique(dim=0)) == 4
    for i, log_prob in enumerate(draws.observed["y"].log_prob):
        values = {name: value[i] for name, value in draws.latent.items()}
        trace = poutine.trace(poutine.condition(model, values)).get_trace(X, y)
        expected = trace.nodes["y"]["fn"].log_prob(y)
        torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_names_from_the_caller(guide):
    columns = ["a", "b", "c"]
    data = bmr.to_arviz(
        regression,
        guide,
        X,
        Y,
        num_samples=5,
        dims={"net.weight": ["column"], "x": [None, "column"]},
        coords={"column": columns, "data": range(100, 120)},
        kwargs={"offset": 1.0},
    )
    assert data["posterior"]["net.weight"].sel(column="b").shape == (1, 5)
    assert data["constant_data"]["x"].sel(column="c", data=100).item() == float(X[0, 2])
    assert data["log_likelihood"]["y"].coords["data"].values.tolist() == [*range(100, 120)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"nothing": ["a"]}}, r"got dims= for \['nothing'\]"),
        ({"dims": {"scale": ["a"]}}, "which has 0 axes"),
        ({"dims": {"x": ["a", "a"]}}, "the dimension 'a' has the size 3"),
        ({"coords": {"data": [1, 2]}}, "got 2 coords for the dimension 'data'"),
        ({"coords": {"nothing": [1]}}, r"got coords= for \['nothing'\]"),
        ({"num_samples": 0}, "got num_samples=0"),
    ],
)
def test_options_that_do_not_fit(guide, options, message):
    with pytest.raises(ValueError, match=message):
        bmr.to_arviz(regression, guide, X, Y, **({"num_samples": 2} | options))


def test_programs_that_do_not_fit(guide):
    with pytest.raises(ValueError, match="never called"):
        bmr.to_arviz(regression, AutoNormal(regression), X, Y)

    def part(x, y):
        weight = pyro.sample("net.weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(x[index] @ weight, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="5 of 20 data in the plate 'data'"):
        bmr.to_arviz(part, made(part, X, Y), X, Y)

    def local(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 'z' has the shape \(7,\).*\(20,\) in the guide"):
        bmr.to_arviz(local, made(local, X, Y), X[:7], Y[:7])
    with pytest.raises(ValueError, match=r"the guide has the sites.*of which the model has none"):
        bmr.to_arviz(local, guide, X, Y)

    def improper():
        pyro.sample("bias", dist.ImproperUniform(dist.constraints.real, (), ()))

    def proper():
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="or prior=False"):
        bmr.to_arviz(improper, proper, num_samples=2)
