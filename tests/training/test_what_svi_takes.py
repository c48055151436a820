"""`fit` trains what `pyro.infer.SVI` trains, or says by name what it does not."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.nn import PyroModule

import pyro_bmr as bmr
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.training import fitting

ROWS = 30
X = torch.linspace(-1, 1, 3 * ROWS).reshape(ROWS, 3).sin()
Y = X @ torch.tensor([1.0, -2.0, 0.0]) + 0.3 * torch.linspace(-40, 40, ROWS).sin()
QUICK = {"num_epochs": 2, "compile": False, "progress": False}


def weights():
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def model(x, y=None):
    w = weights()
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def start_at(program, family=AutoNormal, **values):
    values = {"w": torch.tensor([1.0, -2.0, 0.0]), **values}
    return family(program, init_loc_fn=init_to_value(values=values), init_scale=0.05)


def flat(support, *event, batch=()):
    return dist.ImproperUniform(support, batch, event)


def level(x, y=None):
    shift = pyro.sample("flat", flat(constraints.real))
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + shift, 0.3), obs=y)


def noise(x, y=None):
    scale = pyro.sample("flat", flat(constraints.positive))
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def vector(x, y=None):
    pair = pyro.sample("flat", flat(constraints.real_vector, 2))
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + x[:, :2] @ pair, 0.3), obs=y)


def in_a_plate(x, y=None):
    with pyro.plate("levels", 2):
        levels = pyro.sample("flat", flat(constraints.real))
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + levels.sum(), 0.3), obs=y)


class Undrawable(dist.Normal):
    """A proper prior without draws."""

    def rsample(self, sample_shape=()):
        raise NotImplementedError

    sample = rsample


def undrawable(x, y=None):
    shift = pyro.sample("flat", Undrawable(0.0, 1.0))
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + shift, 0.3), obs=y)


@pytest.mark.parametrize(
    ("program", "value"),
    [
        (level, torch.tensor(0.1)),
        (noise, torch.tensor(0.4)),
        (vector, torch.tensor([0.1, 0.2])),
        (in_a_plate, torch.tensor([0.1, 0.2])),
        (undrawable, torch.tensor(0.1)),
    ],
)
def test_a_prior_without_draws_is_not_drawn_from(program, value):
    guide = start_at(program, flat=value)
    for batch_size in (None, 8):
        losses = bmr.fit(program, guide, X, Y, batch_size=batch_size, **QUICK)
        assert all(map(math.isfinite, losses))


@pytest.mark.rare
@pytest.mark.parametrize(
    ("program", "family"), [(level, AutoNormal), (noise, AutoMultivariateNormal)]
)
def test_no_verb_draws_from_a_flat_prior(program, family):
    guide = start_at(program, family, flat=torch.tensor(0.4))
    pruned = bmr.prune(program, guide, X, Y, batch_size=8, max_rounds=1, **QUICK)
    assert math.isfinite(pruned.rounds[0].free_energy)
    assert math.isfinite(bmr.free_energy(program, guide, X, Y, num_samples=3)[0])
    result = bmr.reduce(guide, X, Y)
    assert "w" in result.masks
    assert math.isfinite(result.audit(X, Y, num_samples=5, progress=False).total.realised)
    data = bmr.to_arviz(program, guide, X, Y, num_samples=3, prior=False)
    assert data.posterior["flat"].shape == (1, 3)


def test_flat_priors_lead_to_least_squares():
    def all_flat(x, y):
        w = pyro.sample("w", flat(constraints.real_vector, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + torch.linspace(-50, 50, 60).sin()
    guide = start_at(all_flat, w=torch.zeros(3))
    options = QUICK | {"num_epochs": 60, "batch_size": 20}
    bmr.fit(all_flat, guide, x, y, lr=lambda done: 0.1 * (1 - done), seed=0, **options)
    expected = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(guide.median()["w"], expected, atol=0.1, rtol=0)


def test_posteriors_that_know_no_model_are_read_without_draws_of_a_flat_prior():
    def guide(x, y):
        w = pyro.param("mean", torch.tensor([1.0, -2.0, 0.0]))
        pyro.sample("w", dist.Normal(w, 0.05).to_event(1))
        pyro.sample("flat", dist.LogNormal(pyro.param("level", torch.tensor(-1.0)), 0.1))

    guide(X, Y)
    assert not bmr.reduce(guide, X, Y, model=noise).masks["w"][2]
    draws = {"w": torch.tensor([1.0, -2.0, 0.0]) + 0.05 * torch.randn(500, 3)}
    draws["flat"] = (0.1 * torch.randn(500) - 1).exp()
    with pytest.warns(UserWarning, match="moment matching"):
        assert not bmr.reduce(draws, X, Y, model=noise).masks["w"][2]


class Holder(PyroModule):
    """A model that holds its data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("y", Y)

    def forward(self, x):
        return model(x, self.y)


def without_a_plate(x):
    pyro.sample("y", dist.Normal(x @ weights(), 0.3).to_event(1), obs=Y)


@pytest.mark.parametrize("batch_size", [1, 8, ROWS - 1])
@pytest.mark.parametrize(
    "program",
    [
        pyro.condition(model, data={"y": Y}),
        poutine.condition(model, {"y": Y}),
        functools.partial(model, y=Y),
        lambda x: model(x, Y),
        without_a_plate,
        Holder(),
    ],
)
def test_data_that_no_batch_cuts_are_named(program, batch_size):
    guide = AutoNormal(program)
    with pytest.raises(ValueError, match=r"site 'y'.*data do not come as an argument.*Expected"):
        bmr.fit(program, guide, X, batch_size=batch_size, **QUICK)
    assert len(bmr.fit(program, guide, X, **QUICK)) == 2


def test_inputs_that_no_batch_cuts_are_named():
    def inside(y):
        pyro.sample("y", dist.Normal(X @ weights(), 0.3).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"site 'y'.*its distribution does not come as an arg"):
        bmr.fit(inside, AutoNormal(inside), Y, batch_size=8, **QUICK)

    def with_a_plate(y):
        w = weights()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(X @ w, 0.3), obs=y)

    def as_a_factor(x):
        pyro.factor("y", dist.Normal(x @ weights(), 0.3).log_prob(Y).sum())

    for program, data in ((with_a_plate, Y), (as_a_factor, X)):
        with pytest.raises(ValueError, match=r"runs on 30 rows, but not on 8.*Expected"):
            bmr.fit(program, AutoNormal(program), data, batch_size=8, **QUICK)


def test_errors_of_the_model_itself_are_left_as_they_are():
    def broken(x, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bmr.fit(broken, AutoNormal(broken), X, Y, batch_size=8, **QUICK)


def test_one_datum_for_all_rows_is_no_fault():
    def pseudo(x, y):
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)
            pyro.sample("small", dist.Normal(x @ w, 9.0), obs=torch.tensor(0.0))

    assert BatchModel(pseudo, Batches((X, Y), {}, 8)).scaled == {"y", "small"}


def test_a_plate_that_takes_one_size_only():
    def fixed(x, y):
        w = weights()
        with pyro.plate("data", size=ROWS, subsample_size=10):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    guide = start_at(fixed)
    options = QUICK | {"num_epochs": 40, "lr": 1e-8}
    losses = bmr.fit(fixed, guide, X, Y, batch_size=10, **options)
    f, error = bmr.free_energy(model, guide, X, Y, num_samples=400)
    assert abs(sum(losses) / 40 - f) < 0.1 * abs(f) + 4 * error

    def unscaled(x, y):
        w = weights()
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    with pytest.raises(ValueError, match=r"runs on 10 rows, but not on 11.*plates are as long"):
        bmr.fit(unscaled, AutoNormal(unscaled), X, Y, batch_size=10, **QUICK)


def filled(x, y):
    seen = y.isfinite()
    w = weights()
    with pyro.plate("data", len(x)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y.where(seen, torch.zeros(())))


def masked_distribution(x, y):
    seen = y.isfinite()
    w = weights()
    with pyro.plate("data", len(x)):
        density = dist.Normal(x @ w, 0.3).mask(seen)
        pyro.sample("y", density, obs=y.where(seen, torch.zeros(())))


def imputed_inputs(x, y):
    seen = y.isfinite()
    return filled(torch.where(seen[:, None], x, torch.zeros(())), y)


def with_missing(tensor, marker, rows=7):
    tensor = tensor.clone()
    tensor[:rows] = marker
    return tensor


@pytest.mark.parametrize("marker", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("program", [filled, masked_distribution, imputed_inputs])
def test_what_the_model_masks_is_trained_as_without_these_rows(program, marker):
    x = with_missing(X, marker) if program is imputed_inputs else X
    guide, other = start_at(program), start_at(model)
    options = QUICK | {"num_epochs": 5, "seed": 0, "lr": 0.05}
    losses = bmr.fit(program, guide, x, with_missing(Y, marker), **options)
    pyro.clear_param_store()
    expected = bmr.fit(model, other, X[7:], Y[7:], **options)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    torch.testing.assert_close(guide.locs.w, other.locs.w)


@pytest.mark.parametrize("estimator", ["global", "local", "moments", Trace_ELBO()])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_what_the_model_masks_is_trained_in_batches(batch_size, estimator):
    """With batches of 3, some have no observation that counts."""
    y = with_missing(Y, math.nan)
    losses = bmr.fit(
        filled, start_at(filled), X, y, batch_size=batch_size, estimator=estimator, **QUICK
    )
    assert all(map(math.isfinite, losses))


def test_what_the_model_masks_is_compiled(monkeypatch, recwarn):
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)
    options = QUICK | {"compile": True}
    losses = bmr.fit(filled, start_at(filled), X, with_missing(Y, math.nan), **options)
    assert all(map(math.isfinite, losses))
    assert not [w for w in recwarn.list if "without compiling" in str(w.message)]


@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_of_two_names_is_moved_once(compile):
    """The first step of Adam moves what has a gradient by the learning rate."""
    guide = AutoIAFNormal(model, hidden_dim=[8])
    guide(X, Y)
    before = [p.detach().clone() for p in guide.parameters()]
    bmr.fit(model, guide, X, Y, num_epochs=1, lr=0.01, compile=compile, progress=False)
    moved = [
        float((p.detach() - q).abs().max()) for p, q in zip(guide.parameters(), before, strict=True)
    ]
    assert max(moved) == pytest.approx(0.01, rel=1e-2)


def test_an_observation_mask_of_pyro():
    def imputed(x, y):
        seen = y.isfinite()
        w = weights()
        with pyro.plate("data", len(x)):
            filled_in = y.where(seen, torch.zeros(()))
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=filled_in, obs_mask=seen)

    guide = AutoNormal(imputed)
    losses = bmr.fit(imputed, guide, X, with_missing(Y, math.nan), **QUICK)
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("marker", [math.nan, math.inf])
@pytest.mark.parametrize("batch_size", [None, 3, 8])
def test_what_no_mask_leaves_out_is_named(batch_size, marker):
    y = with_missing(Y, marker)
    guide = start_at(model)
    with pytest.raises(ValueError, match=r"got 7 NaN or inf in argument 1; .*Expected.*mask"):
        bmr.fit(model, guide, X, y, batch_size=batch_size, **QUICK)
    x = X.clone()
    x[-1, 2] = marker
    where = r"1 NaN or inf in argument 0, in columns \[2\] and 7 NaN or inf in argument 1"
    with pytest.raises((ValueError, FloatingPointError), match=where):
        bmr.fit(filled, guide, x, y, batch_size=batch_size, **QUICK)
    assert all(p.isfinite().all() for p in guide.parameters())


def test_a_gradient_that_is_nan_behind_a_mask_is_named():
    """The derivative of what `torch.where` leaves out is zero times infinity."""

    def masked_only(x, y):
        w = weights()
        with pyro.plate("data", len(x)), poutine.mask(mask=y.isfinite()):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    def left_out_too_late(x, y):
        w = weights()
        products = torch.where(x.isfinite(), x * w, torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(products.sum(-1), 0.3), obs=y)

    bad = [
        (masked_only, X, with_missing(Y, math.inf), "argument 1"),
        (left_out_too_late, with_missing(X, math.nan), Y, "argument 0"),
    ]
    for program, x, y, where in bad:
        guide = start_at(program)
        with pytest.raises(ValueError, match=rf"{where}.*finite, but its gradient for '\S*w'"):
            bmr.fit(program, guide, x, y, **QUICK | {"num_epochs": 1})
        assert all(p.isfinite().all() for p in guide.parameters())


def test_missing_numbers_that_only_a_later_step_meets_are_named():
    def half_masked(x, y):
        """Column 0 is masked, column 1 is not."""
        w = weights()
        seen = x[:, 0].isfinite()
        kept = torch.cat([x[:, :1].where(seen[:, None], torch.zeros(())), x[:, 1:]], 1)
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(kept @ w, 0.3), obs=y)

    x = X.clone()
    x[0, 0] = x[-1, 1] = math.nan
    guide = start_at(half_masked)
    with pytest.raises(FloatingPointError, match=r"there are 2 NaN or inf in argument 0"):
        bmr.fit(half_masked, guide, x, Y, batch_size=5, **QUICK)
    assert all(p.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("compile", [True, False])
def test_a_gradient_that_is_nan_in_any_step_leaves_a_finite_guide(compile, monkeypatch):
    """Also in the last, after which no loss is measured that would tell."""
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)

    def steep(x, y):
        pyro.factor("fit", -(x * weights()).abs().sqrt().sum() + 0 * y.sum())

    x = X.clone()
    x[10] = 0.0
    steps = set()
    for seed in range(6):
        pyro.clear_param_store()
        guide = start_at(steep)
        options = QUICK | {"num_epochs": 1, "compile": compile, "batch_size": 10, "seed": seed}
        with pytest.raises(FloatingPointError, match=r"or its gradient.*; .*locs\.w") as error:
            bmr.fit(steep, guide, x, Y, **options)
        assert all(p.isfinite().all() for p in guide.parameters())
        batches = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).split(10)
        steps.add(next(i for i, rows in enumerate(batches) if 10 in rows))
        assert "at step" in str(error.value)
    assert steps == {0, 1, 2}


def scaled(x, y, scale, prior_scale=1.0):
    with poutine.scale(scale=prior_scale):
        w = weights()
    with poutine.scale(scale=scale), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def scaled_by_a_handler(x, y):
    def likelihood(w):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    poutine.scale(likelihood, scale=3.0)(weights())


def scaled_factor(x, y):
    w = weights()
    with poutine.scale(scale=3.0):
        pyro.factor("y", dist.Normal(x @ w, 0.3).log_prob(y).sum())


@pytest.mark.parametrize(
    ("program", "batch_size"),
    [
        (functools.partial(scaled, scale=3.0), 10),
        (functools.partial(scaled, scale=torch.tensor(3.0)), 10),
        (functools.partial(scaled, scale=30 / 8), 8),
        (functools.partial(scaled, scale=3), 8),  # as rows // batch
        (functools.partial(scaled, scale=4), 8),  # as the length of a loader
        (scaled_by_a_handler, 10),
        (scaled_factor, 10),
    ],
)
def test_a_likelihood_that_the_model_has_scaled_is_told(program, batch_size):
    with pytest.warns(UserWarning, match=r"scale of \S+ at the observed site 'y'.*Expected one"):
        bmr.fit(program, AutoNormal(program), X, Y, batch_size=batch_size, **QUICK)


def by_a_plate(x, y):
    w = weights()
    with pyro.plate("data", size=ROWS, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


@pytest.mark.parametrize(
    ("program", "batch_size"),
    [
        (functools.partial(scaled, scale=2.0), 10),
        (functools.partial(scaled, scale=1 / 3), 10),
        (functools.partial(scaled, scale=1.0), ROWS - 1),
        (functools.partial(scaled, scale=3.0), None),
        (functools.partial(scaled, scale=1.0, prior_scale=3.0), 10),
        (functools.partial(scaled, scale=1.0, prior_scale=1 / 3), 10),
        (functools.partial(scaled, scale=3.0, prior_scale=3.0), 10),
        (lambda x, y: scaled(x, y, scale=ROWS / len(x)), 10),
        (lambda x, y: scaled(x, y, scale=torch.linspace(2, 4, ROWS)[: len(x)]), 10),
        (by_a_plate, 10),
        (model, 10),
    ],
)
def test_other_scales_are_let_be(program, batch_size, recwarn):
    bmr.fit(program, AutoNormal(program), X, Y, batch_size=batch_size, **QUICK)
    assert not [w for w in recwarn.list if "scale" in str(w.message)]
