"""`fit`: compiled and eager, against Pyro's own SVI, and with bad input."""

import functools
import gc
import math
import re
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from often import often
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

import pyro_bmr as bmr
from conftest import DEVICES, Network
from pyro_bmr.demo import Regression
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.training import compilation, compiled_steps, fitting, options, step_functions

X = torch.linspace(-1, 1, 90).reshape(30, 3).sin()
Y = X @ torch.tensor([1.0, -2.0, 0.0]) + 0.3


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w + bias, 0.3), obs=y)


def exact_posterior():
    """Mean and F of the mean-field optimum: a linear model with known noise."""
    design = torch.cat([X, torch.ones(30, 1)], 1).double()
    precision = design.T @ design / 0.09 + torch.eye(4)
    return torch.linalg.solve(precision, design.T @ Y.double() / 0.09), precision.diagonal() ** -0.5


@pytest.fixture
def compiled(monkeypatch):
    """Compile also short runs, and fail if that does not work."""
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)


@pytest.mark.parametrize("estimator", ["global", "local", "moments"])
@pytest.mark.parametrize("compile", often([True, False], False))
def test_finds_the_exact_mean_field_posterior(estimator, compile, compiled, recwarn):
    """With batches of 8 of 30 rows: the last batch is smaller, the scale must be right."""
    guide = AutoNormal(model)
    options = {"num_epochs": 300 if compile else 100, "batch_size": 8, "compile": compile}
    rate = 0.05
    losses = bmr.fit(
        model, guide, X, Y, lr=lambda t: rate * (1 - t), estimator=estimator, **options
    )
    assert not [w for w in recwarn.list if "without compiling" in str(w.message)]
    assert len(losses) == options["num_epochs"]
    mean, scale = exact_posterior()
    found = torch.cat([guide.locs.w, guide.locs.bias[None]]).detach().double()
    assert ((found - mean).abs() < 0.5 * scale).all()
    scales = torch.cat([guide.scales.w, guide.scales.bias[None]]).detach().double()
    torch.testing.assert_close(scales, scale, rtol=0.3, atol=0)


@pytest.mark.rare
def test_agrees_with_svi_over_five_seeds(compiled):
    """The same settings by fit and by Pyro's loop end at the same F within seed noise."""
    x = torch.randn(64, 4)
    y = x[:, 0] * x[:, 1].relu() + 0.3 * torch.randn(64)
    ends = {"fit": [], "svi": []}
    for seed in range(5):
        for way, results in ends.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            network = Regression(4, hidden=8)
            guide = AutoNormal(network)
            if way == "fit":
                bmr.fit(network, guide, x, y, num_epochs=300, lr=0.02)
            else:
                svi = SVI(network, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
                for _ in range(300):
                    svi.step(x, y)
            elbo = bmr.LocalELBO()
            results.append(bmr.free_energy(network, guide, x, y, num_samples=30, estimator=elbo)[0])
    fit, svi = (torch.tensor(results) for results in ends.values())
    error = ((fit.var() + svi.var()) / 5).sqrt()
    assert abs(fit.mean() - svi.mean()) < 3 * error


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_is_that_of_eager_adam(device, compiled):
    """Sampling-free, so both runs are the same but for rounding."""
    results = []
    for compile in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        zero = torch.zeros((), device=device)

        def on_device(x, y, zero=zero):
            w = pyro.sample("w", dist.Normal(zero, 1 + zero).expand([3]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal((x @ w).tanh(), 1 + zero), obs=y)

        guide = AutoNormal(on_device)
        args = X.to(device), Y.to(device)
        options = {"estimator": "moments", "clip_norm": 5.0, "num_epochs": 40, "compile": compile}
        losses = bmr.fit(on_device, guide, *args, **options)
        results.append((losses, [p.detach().cpu() for p in guide.parameters()]))
    (first, parameters), (second, others) = results
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)
    for ours, theirs in zip(parameters, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_same_seed_same_result(compiled):
    results = []
    for _ in range(2):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        losses = bmr.fit(model, guide, X, Y, num_epochs=5, batch_size=7, seed=3)
        results.append((losses, guide.locs.w.tolist()))
    assert results[0] == results[1]
    assert len(set(results[0][0])) == 5


@pytest.mark.rare
def test_pruned_elements_stay_pruned(compiled):
    network = Regression(3, hidden=4)
    guide = AutoNormal(network)
    bmr.fit(network, guide, X, Y, num_epochs=200, lr=0.02, compile=False)
    result = bmr.reduce(guide)
    assert 0 < result.sparsity < 1
    bmr.fit(result.model, result.guide, X, Y, num_epochs=100, batch_size=10, estimator="local")
    for name, value in result.guide(X, Y).items():
        if name in result.masks:
            assert (value[~result.masks[name]] == 0).all()
    assert bmr.reduce(result.guide).sparsity >= result.sparsity


def test_user_keyword_data_and_patience():
    guide = AutoNormal(model)
    losses = bmr.fit(
        model, guide, X, kwargs={"y": Y}, num_epochs=3000, batch_size=15, lr=0.05, patience=15
    )
    assert 30 <= len(losses) < 3000


def test_other_losses_and_guides_work_without_compiling():
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(num_particles=2)):
        pyro.clear_param_store()
        guide = AutoLowRankMultivariateNormal(model, rank=1)
        losses = bmr.fit(model, guide, X, Y, num_epochs=30, lr=0.05, estimator=elbo)
        assert losses[-1] < losses[0]


def test_a_model_with_its_own_sub_sampling_plate_is_left_alone():
    def own(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.3), obs=y[rows])

    def from_outside(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 30, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    def scaled_by_hand(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=30 / len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    assert BatchModel(own, Batches((X, Y), {}, None)).scaled == frozenset()
    assert BatchModel(from_outside, Batches((X, Y), {}, 5)).scaled == frozenset()
    assert BatchModel(scaled_by_hand, Batches((X, Y), {}, 5)).scaled == frozenset()
    assert BatchModel(model, Batches((X, Y), {}, 5)).scaled == {"y"}
    guide = AutoNormal(own)
    losses = bmr.fit(own, guide, X, Y, num_epochs=60, lr=0.05)
    assert losses[-1] < losses[0]


def test_which_observed_sites_are_scaled():
    """Likelihoods are, also with weights of rows; penalties are not."""

    def many(x, y, weight):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.factor("penalty", -w.abs().sum())
        pyro.factor("sum", -((y - x @ w) ** 2).sum())
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
            pyro.sample("weighted", dist.Normal(x @ w, 0.3), obs=y)
        with pyro.plate("features", 3, subsample_size=2, dim=-2) as columns:
            with pyro.plate("rows", len(x)):
                pyro.sample("columns", dist.Normal(w[columns, None], 1.0), obs=x.T[columns])

    args = X, Y, torch.rand(30)
    assert BatchModel(many, Batches(args, {}, 5)).scaled == {"sum", "weighted", "columns"}
    assert BatchModel(many, Batches(args, {}, 30)).scaled == frozenset()

    def loops(y):
        for i, value in enumerate(y):
            pyro.sample(f"y_{i}", dist.Normal(0.0, 1.0), obs=value)

    with pytest.raises(ValueError, match=r"have other sites: \['y_5'\].*batch_size=None"):
        BatchModel(loops, Batches((Y,), {}, 5))


@pytest.mark.rare
def test_random_numbers_of_other_kinds_are_compiled_too(compiled, recwarn):
    """Dropout, sub-sampling and Gamma draws come from torch's generator in every step."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        mean = nn.functional.dropout(x, 0.1) @ w + rate
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(mean[rows], 0.3), obs=y[rows])

    guide = bmr.mean_field(model, gamma=["rate"])
    losses = bmr.fit(model, guide, X, Y, num_epochs=150, lr=0.03)
    assert not [str(w.message) for w in recwarn.list if "compil" in str(w.message)]
    assert len(set(losses)) == 150
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.rare
def test_a_model_that_changes_during_the_training_is_noticed(compiled):
    scale = [1.0]

    def annealed(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale[0]), obs=y)

    def rate(done):
        scale[0] = 1.0 - 0.5 * done
        return 0.01

    with pytest.warns(UserWarning, match="changed while it was trained"):
        bmr.fit(annealed, AutoNormal(annealed), X, Y, num_epochs=10, lr=rate)


def test_what_is_not_data_is_bound_beforehand():
    def scaled(scale, x, y):
        w = pyro.sample("w", dist.Normal(0.0, scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    bound = functools.partial(scaled, torch.ones(3))
    losses = bmr.fit(bound, AutoNormal(bound), X, Y, num_epochs=3, batch_size=10)
    assert len(losses) == 3
    with pytest.raises(ValueError, match=r"\(3,\).*\(30, 3\).*functools.partial"):
        bmr.fit(scaled, AutoNormal(scaled), torch.ones(3), X, Y, num_epochs=3, batch_size=10)


def test_a_model_that_branches_on_data_is_trained_without_compiling(compiled):
    def branching(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = x @ w
        if mean.sum() > 0:
            mean = 1.1 * mean
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    with pytest.warns(UserWarning, match="without compiling.*looks at the value of a tensor") as w:
        losses = bmr.fit(branching, AutoNormal(branching), X, Y, num_epochs=60, lr=0.05)
    assert len([x for x in w if "without compiling" in str(x.message)]) == 1
    assert losses[-1] < losses[0]


def test_a_model_that_changes_between_steps_is_noticed(compiled):
    calls = []

    def changing(x, y):
        calls.append(1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3 + 0.01 * len(calls)), obs=y)

    with pytest.warns(UserWarning, match="differs from Pyro's.*change between steps"):
        bmr.fit(changing, AutoNormal(changing), X, Y, num_epochs=3)


@pytest.mark.rare
def test_batch_normalisation_in_training_mode_is_trained_without_compiling(compiled):
    network = Network("cpu")
    args = torch.randn(20, 4), torch.randn(20)
    with pytest.warns(UserWarning, match="writes to a tensor that outlives the step"):
        bmr.fit(network, AutoNormal(network), *args, num_epochs=3)
    assert network.norm.running_mean.abs().sum() > 0
    network.eval()
    guide = AutoNormal(network)
    pyro.clear_param_store()
    bmr.fit(network, guide, *args, num_epochs=3)


def test_without_a_compiler(compiled, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "compile", no_compiler)
    with pytest.warns(UserWarning, match="without compiling.*No working C\\+\\+ compiler"):
        losses = bmr.fit(model, AutoNormal(model), X, Y, num_epochs=3)
    assert len(losses) == 3


@pytest.mark.parametrize("compile", [True, False])
def test_a_loss_that_turns_nan_leaves_the_last_finite_state(compile, compiled):
    guide = AutoNormal(model)
    guide(X, Y)

    def explode(t):
        return 0.01 if t < 0.5 else 1e38

    with pytest.raises(FloatingPointError, match=r"at step \d+; .*locs\.w.*last finite") as error:
        bmr.fit(model, guide, X, Y, num_epochs=40, batch_size=10, lr=explode, compile=compile)
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    assert 60 <= step <= 62
    assert all(p.isfinite().all() for p in guide.parameters())
    assert math.isfinite(Trace_ELBO().loss(model, guide, X, Y))
    assert guide.locs.w.abs().max() < 100


@pytest.mark.rare
def test_learnable_layers_of_the_model_are_trained_too(compiled):
    layer = nn.Linear(3, 3)

    def mixed(x, y):
        pyro.module("layer", layer)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(layer(x) @ w, 0.3), obs=y)

    before = layer.weight.detach().clone()
    losses = bmr.fit(mixed, AutoNormal(mixed), X, Y, num_epochs=100, lr=0.02)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, layer.weight)


def test_bad_data():
    guide = AutoNormal(model)
    nan = X.clone()
    nan[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 NaN or inf in argument 0, in columns \[1\]"):
        bmr.fit(model, guide, nan, Y, num_epochs=1)
    with pytest.raises(ValueError, match="1 NaN or inf in argument 'y'"):
        bmr.fit(model, guide, X, kwargs={"y": nan[:, 1]}, num_epochs=1)
    with pytest.raises(ValueError, match=r"0: \(30, 3\), 1: \(29,\)"):
        bmr.fit(model, guide, X, Y[1:], num_epochs=1, batch_size=5)
    with pytest.raises(ValueError, match="batch_size=31 for 30 rows"):
        bmr.fit(model, guide, X, Y, num_epochs=1, batch_size=31)
    with pytest.raises(ValueError, match="1 NaN or inf in argument 1"):
        bmr.fit(model, guide, X, Y.where(Y < Y.max(), torch.inf), num_epochs=1)
    for estimator in options.ESTIMATORS:
        with pytest.raises(ValueError, match='at site "y", invalid log_prob shape'):
            bmr.fit(model, AutoNormal(model), X, Y[:, None], num_epochs=1, estimator=estimator)
    with pytest.raises(TypeError, match="Expected a number, or a function of the fraction"):
        bmr.fit(model, guide, X, Y, num_epochs=1, lr="fast")
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match="observes nothing.*'w'"):
        bmr.fit(model, guide, X, num_epochs=1)

    def local(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="latent site 'z' has a row for each observation"):
        bmr.fit(local, AutoNormal(local), X, Y, num_epochs=1, batch_size=5)
    assert guide.prototype_trace is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"patience": 0}, "patience=0"),
        ({"estimator": "locale"}, "estimator='locale'.*'global', 'local', 'moments'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        bmr.fit(model, AutoNormal(model), X, Y, **{"num_epochs": 1} | options)


def test_nothing_to_train():
    def no_parameters(x, y):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("bias", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="have no parameters"):
        bmr.fit(model, no_parameters, X, Y, num_epochs=1)


def test_the_same_program_is_compiled_once(compiled, monkeypatch):
    """The second reduction has the operations of the first, with other masks."""
    count = []
    compile_one = compilation._compile
    monkeypatch.setattr(compilation, "_COMPILED", {})
    monkeypatch.setattr(
        compilation, "_compile", lambda *args: count.append(1) or compile_one(*args)
    )
    guide = AutoNormal(model)
    options = {"num_epochs": 50, "progress": False, "lr": 0.05}
    bmr.fit(model, guide, X, Y, **options)
    assert len(count) == 1
    for mask in ([True, True, False], [True, False, True]):
        kept = torch.tensor(mask)
        result = bmr.reduce(guide, X, Y, select=lambda _, kept=kept: {"w": kept})
        bmr.fit(result.model, result.guide, X, Y, **options)
        assert torch.equal(result.guide.median()["w"] != 0, kept)
    assert len(count) == 2


def test_nothing_of_a_training_is_held_beyond_its_end(compiled, monkeypatch):
    """As a cycle would, until Python happens to look for cycles."""
    made = []

    class Steps(compiled_steps.CompiledSteps):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(fitting, "CompiledSteps", Steps)
    gc.collect()
    gc.disable()
    try:
        bmr.fit(model, AutoNormal(model), X, Y, num_epochs=2, progress=False)
        (steps,) = made
        assert steps() is None
    finally:
        gc.enable()


def test_a_seed_fixes_the_result_whether_or_not_the_program_is_known(compiled, monkeypatch):
    """Compiling runs the program, which must not take random numbers from it."""

    def noisy(x, y):
        precision = pyro.sample("precision", dist.Gamma(1.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, precision.rsqrt()), obs=y)

    def losses():
        pyro.clear_param_store()
        guide = bmr.mean_field(noisy, gamma=["precision"])
        return bmr.fit(noisy, guide, X, Y, num_epochs=20, seed=0, progress=False)

    monkeypatch.setattr(compilation, "_COMPILED", {})
    assert losses() == losses()
    assert len(compilation._COMPILED) == 1


def off_by(relatively, step, values=0):
    """Let the vector of parameters come out otherwise, which is the argument of this number."""

    def run(*inputs):
        step(*inputs)
        inputs[values].add_(relatively * inputs[values].abs().max())
        return ()

    return run


@pytest.mark.parametrize(("relatively", "refused"), [(1e-4, False), (1e-2, True)])
def test_a_compiler_may_round_otherwise(relatively, refused, compiled, recwarn, monkeypatch):
    """By as much as a ReLU that opens moves a gradient, but no more."""
    monkeypatch.setattr(step_functions, "compile_step", lambda step, _: off_by(relatively, step))
    bmr.fit(model, AutoNormal(model), X, Y, num_epochs=2)
    told = "without compiling.*compiled step differs from the traced one.*rounding"
    assert refused == any(re.search(told, str(w.message)) for w in recwarn.list)


def test_a_traced_step_may_not(compiled, monkeypatch):
    monkeypatch.setattr(step_functions, "_move", off_by(1e-4, step_functions._move, values=2))
    with pytest.warns(UserWarning, match="without compiling.*traced step differs from Pyro's"):
        bmr.fit(model, AutoNormal(model), X, Y, num_epochs=2)
