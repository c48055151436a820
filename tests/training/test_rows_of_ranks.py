"""The losses of shards of the rows, averaged, are the loss of all rows, or a refusal says why."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.rank_checks import check_linear, check_shards
from pyro_bmr.training.feeds import Shard

ROWS = (8, 4)
ALL = sum(ROWS)
X = torch.linspace(-1, 1, 3 * ALL).reshape(ALL, 3).sin()
Y = X @ torch.tensor([1.0, -2.0, 0.0]) + 0.3 * torch.linspace(-40, 40, ALL).sin()


def weights():
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def guide(*args):
    pyro.sample("w", dist.Delta(torch.tensor([0.5, -1.0, 0.3]), event_dim=1))


def own_shards(*data, steps):
    """Each of as many steps takes as large a part of its rows."""
    for shard in zip(*(tensor.split(ROWS) for tensor in data), strict=True):
        yield Shard(Batches(shard, {}, len(shard[0]) // steps), steps, ROWS)


def mean_loss(model, feed):
    batch_model, elbo = BatchModel(model, feed.batches, feed.shards), Trace_ELBO()
    batches = [feed.batch(feed.inputs(cut)) for cut in feed.epoch()]
    return sum(elbo.loss(batch_model, guide, *batch) for batch in batches) / len(batches)


def lengths(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def several(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)
        pyro.sample("same", dist.Normal(w[0], 1.0), obs=torch.zeros(len(x)))
    pyro.factor("sum", -(x @ w).square().sum())
    pyro.factor("penalty", -w.abs().sum())
    pyro.sample("pseudo", dist.Normal(w.sum(), 1.0), obs=torch.zeros(()))


def plate(x, y):
    w = weights()
    with pyro.plate("data", ALL, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


def plate_and_lengths(x, y):
    w = weights()
    with pyro.plate("data", ALL, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)
    with pyro.plate("others", len(x)):
        pyro.sample("z", dist.Normal(x @ w, 1.0), obs=y)


def scale(x, y):
    w = weights()
    with pyro.plate("data", len(x)), poutine.scale(scale=ALL / len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", [lengths, several, plate, plate_and_lengths, scale])
def test_losses_of_unequal_shards_add_up(model, steps):
    losses = [mean_loss(model, feed) for feed in own_shards(X, Y, steps=steps)]
    assert sum(losses) / len(ROWS) == pytest.approx(Trace_ELBO().loss(model, guide, X, Y), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("how", ["plate", "scale"])
def test_a_model_that_knows_of_its_own_shard_alone(how, steps):
    def model(x, y):
        w = weights()
        if how == "plate":
            with pyro.plate("data", ROWS[0], subsample=torch.arange(len(x))):
                pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)
        else:
            with pyro.plate("data", len(x)), poutine.scale(scale=ROWS[0] / len(x)):
                pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    feed, _ = own_shards(X, Y, steps=steps)
    with pytest.raises(ValueError, match=r"scales a batch to 8 rows.*Expected the 12 rows"):
        mean_loss(model, feed)


def test_latent_rows_of_unequal_shards():
    def model(x, y):
        w = weights()
        with pyro.plate("data", ALL, subsample_size=len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ w + shift, 0.3), obs=y)

    feed, _ = own_shards(X, Y, steps=2)
    with pytest.raises(ValueError, match=r"got \[8, 4\] rows.*the latent site 'shift'"):
        mean_loss(model, feed)
    assert BatchModel(model, feed.batches, (8, 8)).own == {"y"}


def test_a_constant_scale_by_the_number_of_shards():
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x)), poutine.scale(scale=len(ROWS)):
            pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

    feed, _ = own_shards(X, Y, steps=1)
    assert BatchModel(model, feed.batches, feed.shards).doubled == {"y": 2.0}


@pytest.mark.parametrize("shards", [(), ROWS])
def test_a_plate_that_sub_samples_the_batch(shards):
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.3), obs=y[rows])

    with pytest.raises(ValueError, match=r"plate 'data' of 5 rows, those of the batch, and draws"):
        BatchModel(model, Batches((X[:8], Y[:8]), {}, 5), shards)


@pytest.mark.parametrize("shards", [(), ROWS])
def test_rows_without_data_in_a_factor(shards):
    """The first ones and the next one: a row alone does not say that it is a likelihood."""
    seen = torch.arange(ALL) >= 6

    def model(x, y, seen):
        density = dist.Normal(x @ weights(), 0.3).log_prob(y)
        pyro.factor("y", (density * seen).sum())

    assert BatchModel(model, Batches((X, Y, seen), {}, 4), shards).scaled == {"y"}


def test_a_penalty_stays_one_beside_latent_rows():
    """Which are drawn before, so that another number of them moved what came later."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        w = weights()
        pyro.factor("penalty", -w.abs().sum())
        with pyro.plate("again", len(x)):
            pyro.sample("y", dist.Normal(x @ w + k, 0.3), obs=y)

    assert BatchModel(model, Batches((X, Y), {}, 5)).scaled == {"k", "y"}


@pytest.mark.parametrize("shards", [(), ROWS])
def test_a_prior_of_the_rows(shards):
    def with_prior(prior):
        def model(x, y):
            level = pyro.sample("level", prior(y))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(level, 0.3), obs=y)

        return model

    batches = Batches((X, Y), {}, 5)
    for prior in (
        lambda y: dist.Normal(y.mean(), 1.0),
        lambda y: dist.Normal(0.0, len(y) ** 0.5),
        lambda y: dist.Uniform(y.min(), y.max()),
    ):
        with pytest.raises(ValueError, match=r"prior of the latent site 'level' depends on the ro"):
            BatchModel(with_prior(prior), batches, shards)
    mean = Y.mean()
    assert BatchModel(with_prior(lambda y: dist.Normal(mean, 1.0)), batches, shards).scaled == {"y"}


def test_a_prior_that_changes_from_run_to_run():
    runs = iter(range(100))

    def model(x, y):
        level = pyro.sample("level", dist.Normal(0.0, 1.0 + next(runs)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(level, 0.3), obs=y)

    assert BatchModel(model, Batches((X, Y), {}, 5)).scaled == {"y"}


class Alike:
    """Ranks that find the same, but for the sites that another one scales too."""

    size = 2

    def __init__(self, scaled=()):
        self.scaled = scaled

    def gather(self, value):
        return [value, value | {*self.scaled} if isinstance(value, frozenset) else value]

    def give(self, value):
        return value

    def together(self):
        return nullcontext()


def check(model, *data, steps=2, ranks=None):
    for feed in own_shards(*data, steps=steps):
        batch_model = BatchModel(model, feed.batches, feed.shards)
        check_shards(batch_model, ranks or Alike())
    return batch_model


def weighted(x, y):
    with pyro.plate("data", len(x)), poutine.scale(scale=y.abs()):
        pyro.sample("y", dist.Normal(0.0, 0.3), obs=y)


def dropout(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(nn.functional.dropout(x, 0.3) @ w, 0.3), obs=y)


def masked(x, y):
    w = weights()
    with pyro.plate("data", len(x)), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", [lengths, several, plate, scale, weighted, dropout, masked])
def test_sums_of_rows_pass(model, steps):
    check(model, X, Y, steps=steps)


def centering(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x - x.mean(0)) @ w, 0.3), obs=y)


def mean_of_rows(x, y):
    pyro.factor("y", dist.Normal(x @ weights(), 0.3).log_prob(y).mean())


def process(x, y):
    covariance = x @ x.T + torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(x @ weights(), covariance), obs=y)


def first_row(x, y):
    lengths(x, y)
    pyro.sample("first", dist.Normal(0.0, 1.0), obs=y[0])


def normalized(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(nn.BatchNorm1d(3)(x) @ w, 0.3), obs=y)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", [centering, mean_of_rows, process, first_row, normalized])
def test_rows_that_depend_on_rows_of_others_are_refused(model, steps):
    with pytest.raises(ValueError, match=r"the log density of \d rows is .* of their halves"):
        check(model, X, Y, steps=steps)


def test_a_likelihood_of_which_one_shard_has_nothing():
    """All of its rows add nothing, so it takes the term for a penalty, and the others know more."""

    def model(x, y):
        w = weights()
        pyro.factor("rare", (y * (x @ w)).sum())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    rare = torch.zeros(ALL)
    assert check(model, X, rare).scaled == {"x"}
    assert check(model, X, rare, ranks=Alike({"rare"})).scaled == {"x", "rare"}


def test_losses_that_do_not_add_up():
    check_linear(Trace_ELBO(num_particles=3))
    with pytest.raises(TypeError, match="got estimator=RenyiELBO and a mesh"):
        check_linear(RenyiELBO(num_particles=3))
