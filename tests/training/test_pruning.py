"""`prune`: rounds, what is kept, checkpoints, and kills."""

import itertools
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixtures import ROWS_APART, X, Y
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.demo import Regression
from pyro_bmr.training import free_energies, keeping, pruning
from pyro_bmr.training.fitting import fit, run_training

OPTIONS = {
    "num_epochs": 40,
    "batch_size": 20,
    "lr": 0.02,
    "estimator": "local",
    "compile": False,
    "num_samples": 20,
}


@pytest.fixture
def data():
    x = torch.randn(60, 4)
    return x, x[:, 0] - 2 * x[:, 1].relu() + 0.1 * torch.randn(60)


def make(family=AutoNormal, inputs=4):
    pyro.clear_param_store()
    model = Regression(inputs, hidden=5)
    return model, family(model)


def test_rounds_of_a_network(data):
    model, guide = make()
    result = bmr.prune(model, guide, *data, **OPTIONS, max_rounds=3, seed=0)
    first, *others = result.rounds
    assert (first.index, first.sparsity, first.predicted) == (0, 0.0, 0.0)
    assert others
    assert all(a.sparsity <= b.sparsity for a, b in zip(result.rounds, others, strict=False))
    assert first.sparsity < others[0].sparsity
    assert all(r.predicted < 0 < r.realised_error or r.realised == 0 for r in others)
    assert [r for r in result.rounds if r.kept] == [result.kept_round]
    assert result.kept_round.free_energy == min(r.free_energy for r in result.rounds)
    assert result.sparsity == result.kept_round.sparsity > 0.3
    kept = result.rounds[: result.kept_round.index + 1]
    assert result.delta_f == pytest.approx(sum(r.predicted for r in kept))
    draws = Predictive(result.model, guide=result.guide, num_samples=5)(data[0])
    assert draws["mean"].squeeze().shape == (5, 60)
    mean, error = bmr.free_energy(result.model, result.guide, *data, num_samples=300)
    assert (
        abs(mean - result.kept_round.free_energy)
        < 4 * (error**2 + others[-1].free_energy_error ** 2) ** 0.5
    )
    assert "after round" in str(result) and "ΔF realised" in str(result)
    assert "<table" in result._repr_html_()
    assert list(result.round_summary().index) == [r.index for r in result.rounds]


def test_the_realised_change_is_that_of_masking(data, monkeypatch):
    """Against Trace_ELBO, by the reduction that the first round makes."""
    model, guide = make()
    seen = []

    def spying(first, second, *args, **kwargs):
        if seen:
            before = bmr.free_energy(model, guide, *data, estimator=Trace_ELBO(), num_samples=400)
            after = bmr.free_energy(first, second, *data, estimator=Trace_ELBO(), num_samples=400)
            seen.append((after[0] - before[0], (after[1] ** 2 + before[1] ** 2) ** 0.5))
        else:
            seen.append(None)
        return run_training(first, second, *args, **kwargs)

    monkeypatch.setattr(pruning, "run_training", spying)
    result = bmr.prune(model, guide, *data, **OPTIONS, max_rounds=1, seed=0)
    expected, error = seen[1]
    this = result.rounds[1]
    assert abs(this.realised - expected) < 4 * (error**2 + this.realised_error**2) ** 0.5


def test_options_of_the_loop_and_of_reduce(data):
    model, guide = make()
    options = OPTIONS | {"num_epochs": 20}
    result = bmr.prune(
        model,
        guide,
        *data,
        **options,
        algorithm="paper",
        max_rounds=2,
        refit_epochs=1,
        sites=["fc1.weight"],
        select=bmr.baselines.snr(0.5),
    )
    assert result.kept_round == result.rounds[-1]
    assert set(result.masks) == {"fc1.weight"}
    with pytest.raises(ValueError, match="algorithm='first'"):
        bmr.prune(model, guide, *data, **options, algorithm="first")
    with pytest.raises(ValueError, match="num_samples=1"):
        bmr.prune(model, guide, *data, **options | {"num_samples": 1})
    with pytest.raises(TypeError, match=r"prune got the unknown options \['offset'\]. .*kwargs="):
        bmr.prune(model, guide, *data, **options, offset=1.0)


def test_goes_on_from_a_reduction(data, tmp_path):
    model, guide = make()
    options = OPTIONS | {"max_rounds": 2, "num_epochs": 30, "algorithm": "paper", "seed": 0}
    first = bmr.prune(model, guide, *data, **options, select=bmr.baselines.snr(0.3))
    pair = first.model, first.guide
    second = bmr.prune(*pair, *data, **options, checkpoint=tmp_path / "run.pt")
    assert second.rounds[0].sparsity == pytest.approx(first.sparsity)
    assert second.sparsity > first.sparsity
    again = bmr.prune(*pair, *data, **options, checkpoint=tmp_path / "run.pt", progress=False)
    assert again.rounds == second.rounds


@pytest.mark.rare
def test_a_finished_run_is_not_trained_again(data, tmp_path, monkeypatch):
    options = OPTIONS | {"max_rounds": 1, "num_epochs": 30, "checkpoint": tmp_path / "run.pt"}
    rate = {"lr": lambda done: 0.02 * (1 - done)}
    done = bmr.prune(*make(), *data, **options | rate)
    monkeypatch.setattr(pruning, "run_training", None)
    again = bmr.prune(*make(), *data, **options | rate)
    assert len(done.rounds) == 2 and again.rounds == done.rounds
    with pytest.raises(ValueError, match="another run: lr was .*0.02, .* and is .*0.01, "):
        bmr.prune(*make(), *data, **options | {"lr": lambda done: 0.01 * (1 - done)})


@pytest.mark.rare
@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_a_resumed_run_knows_what_its_last_reduction_decided(data, tmp_path, family):
    """Audit and figures ask for the posterior before it."""
    options = OPTIONS | {"max_rounds": 2, "num_epochs": 30, "algorithm": "paper", "seed": 0}
    options |= {"checkpoint": tmp_path / "run.pt", "sites": {"fc1.weight", "fc2.weight"}}
    whole = bmr.prune(*make(family), *data, **options)
    options["sites"] = ["fc2.weight", "fc1.weight"]
    resumed = bmr.prune(*make(family), *data, **options)
    assert resumed.rounds == whole.rounds
    assert resumed.decision.predicted == whole.decision.predicted
    first, second = (
        one.audit(*data, num_samples=5, progress=False).summary() for one in (whole, resumed)
    )
    assert first.equals(second)
    assert whole.delta_f == resumed.delta_f < whole.decision.predicted["fc1.weight"]


@pytest.mark.rare
def test_layers_of_one_name_add_up(data):
    """Two groupings over one site, each with a layer of its name."""

    def rows(name, shape):
        return (
            torch.arange(shape[0])[:, None] if name == "fc1.weight" else -torch.ones(shape).long()
        )

    def columns(name, shape):
        return torch.arange(shape[1]) if name == "fc1.weight" else -torch.ones(shape).long()

    options = OPTIONS | {"max_rounds": 2, "num_epochs": 30, "algorithm": "paper", "seed": 0}
    result = bmr.prune(*make(), *data, **options, groups=[rows, columns])
    assert [layer.name for layer in result.layers] == ["fc1.weight"] * 2
    assert result.naive_delta_f is None
    assert sum(layer.delta_f for layer in result.layers) == pytest.approx(result.delta_f)


def keep_all(scores):
    return dict(scores.kept)


def test_the_algorithm_of_the_paper_stops_when_nothing_goes(data):
    model, guide = make()
    options = OPTIONS | {"num_epochs": 5, "algorithm": "paper"}
    result = bmr.prune(model, guide, *data, **options, select=keep_all)
    assert len(result.rounds) == 1
    assert result.sparsity == 0.0


@pytest.mark.rare
def test_what_is_left_is_trained_as_long_as_it_falls(data):
    """Nothing goes, so that all rounds only train: each that counts is lower by two errors."""
    model, guide = make()
    options = OPTIONS | {"num_epochs": 30, "max_rounds": 12}
    result = bmr.prune(model, guide, *data, **options, select=keep_all)
    *counting, last = result.rounds
    assert len(counting) > 2 and all(r.counts for r in counting)
    assert all(a.free_energy > b.free_energy for a, b in itertools.pairwise(counting))
    assert len(result.rounds) == 13 or not last.counts
    assert {r.sparsity for r in result.rounds} == {0.0}
    again = OPTIONS | {"num_epochs": 0, "refit_epochs": 2, "lr": 1e-6}
    ended = bmr.prune(result.model, result.guide, *data, **again, select=keep_all)
    assert [r.counts for r in ended.rounds] == [True, False]


@pytest.mark.rare
@pytest.mark.parametrize("family", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_other_guides(family, data):
    model, guide = make(family)
    options = OPTIONS | {"estimator": "global", "num_epochs": 100}
    result = bmr.prune(model, guide, *data, **options, max_rounds=1)
    assert len(result.rounds) == 2


def weights(result):
    return [value.tolist() for value in result.guide.state_dict().values()]


@pytest.mark.parametrize(
    "family",
    [
        AutoNormal,
        pytest.param(AutoMultivariateNormal, marks=pytest.mark.rare),
        pytest.param(lambda m: bmr.mean_field(m, gamma=["precision"]), marks=pytest.mark.rare),
    ],
    ids=["normal", "multivariate", "gamma"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(family, data, tmp_path, monkeypatch):
    options = OPTIONS | {"num_epochs": 10, "estimator": "global", "seed": 4, "max_rounds": 3}
    select = bmr.by_evidence(margin=-1.0)
    whole = bmr.prune(*make(family), *data, **options, select=select, algorithm="paper")
    assert len(whole.rounds) > 2
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_training(*args, **kwargs)

    monkeypatch.setattr(pruning, "run_training", interrupted)
    path = tmp_path / "new" / "run.pt"
    arguments = {**options, "select": select, "algorithm": "paper", "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        bmr.prune(*make(family), *data, **arguments)
    monkeypatch.setattr(pruning, "run_training", run_training)
    torch.manual_seed(99)
    resumed = bmr.prune(*make(family), *data, **arguments)
    assert resumed.rounds == whole.rounds
    assert weights(resumed) == weights(whole)
    again = bmr.prune(*make(family), *data, **arguments)
    assert again.rounds == whole.rounds
    assert weights(again) == weights(whole)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


@pytest.mark.rare
def test_learnable_layers_of_the_model_are_in_the_state(data, tmp_path):
    """The kept round's own parameters of the model come back, also from a checkpoint."""
    path = tmp_path / "run.pt"

    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = bmr.bayesianize(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 1)))

        def model(x, y):
            mean = net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

        options = OPTIONS | {"num_epochs": 10, "seed": 1, "max_rounds": 1}
        options |= {"checkpoint": path, "algorithm": "paper"}
        result = bmr.prune(model, AutoNormal(model), *data, **options)
        return net, result

    net, result = run()
    trained = net[1].weight.detach().clone()
    assert not torch.equal(trained, torch.ones(5))
    net, again = run()
    assert torch.equal(net[1].weight, trained)
    assert weights(again) == weights(result)


def test_a_checkpoint_of_an_earlier_format(data, tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"format": 2, "run": {}, "state": {}, "random": {}}, path)
    with pytest.raises(
        ValueError, match="has an earlier format. Expected 5: .* or give another path"
    ):
        bmr.prune(*make(), *data, **OPTIONS, checkpoint=path)


def test_a_checkpoint_of_another_run(data, tmp_path):
    path = tmp_path / "run.pt"
    options = OPTIONS | {"num_epochs": 3, "max_rounds": 1, "checkpoint": path}
    bmr.prune(*make(), *data, **options)
    with pytest.raises(ValueError, match="another run: num_epochs was 3 and is 4"):
        bmr.prune(*make(), *data, **options | {"num_epochs": 4})
    with pytest.raises(ValueError, match=r"another run: data was .*sites was .*'fc1.weight'"):
        bmr.prune(*make(inputs=3), data[0][:, :3], data[1], **options)
    with pytest.raises(ValueError, match="select was None and is .*TopK.*3"):
        bmr.prune(*make(), *data, **options, select=bmr.top_k(3))
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="could not be read as a checkpoint"):
        bmr.prune(*make(), *data, **options)
    assert path.read_text() == "not a checkpoint"


TWO_WRITERS = ["--verb", "fit", "--writers", "2", "--interrupt"]


@pytest.mark.rare
@pytest.mark.parametrize("how", [[], TWO_WRITERS])
def test_killed_and_resumed(how):
    """Twice; `benchmarks/kill_and_resume.py` does it as often as one likes."""
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "--kills", "2", "--epochs", "10", *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the results are the same" in done.stdout


@pytest.mark.rare
@pytest.mark.parametrize("estimator", ["global", TraceEnum_ELBO(max_plate_nesting=1)])
def test_discrete_sites_are_summed_out_in_training_and_in_measuring(estimator):
    pair = ROWS_APART["outliers"]
    guide = pair.guide(X, Y)
    options = OPTIONS | {"batch_size": None, "estimator": estimator, "progress": False}
    result = bmr.prune(pair.summed, guide, X, Y, **options)
    start, *rounds = result.rounds
    assert rounds
    assert result.free_energy == result.kept_round.free_energy < start.free_energy
    written_out = bmr.reduce(guide, X, Y, model=pair.written_out, select=lambda _: result.masks)
    mean, error = bmr.free_energy(written_out.model, result.guide, X, Y, num_samples=400)
    its_error = result.kept_round.free_energy_error
    assert abs(mean - result.free_energy) < 4 * (error**2 + its_error**2) ** 0.5


def test_a_reduction_that_was_not_trained_has_no_free_energy(data):
    model, guide = make()
    fit(model, guide, *data, num_epochs=2, progress=False)
    assert bmr.reduce(guide, *data).free_energy is None


def noisy(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def with_a_point():
    guide = AutoGuideList(noisy)
    guide.append(AutoDelta(poutine.block(noisy, expose=["scale"])))
    guide.append(AutoNormal(poutine.block(noisy, expose=["w"])))
    return guide


def written(x, y=None):
    scale = pyro.param("point", torch.ones(()), constraint=dist.constraints.positive)
    pyro.sample("scale", dist.Delta(scale))
    width = pyro.param("width", torch.full((4,), 0.1), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(4)), width).to_event(1))


@pytest.mark.parametrize("make_guide", [with_a_point, lambda: written])
def test_what_is_run_belongs_to_the_round(make_guide, data, tmp_path, monkeypatch):
    """A round that is refused leaves nothing of itself, and a checkpoint has all of its own."""
    path = tmp_path / "run.pt"
    options = {"num_epochs": 100, "refit_epochs": 60, "lr": 0.05, "compile": False, "seed": 0}
    options |= {"select": bmr.top_k(1), "max_rounds": 1, "num_samples": 30, "progress": False}

    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return bmr.prune(noisy, make_guide(), *data, **options, checkpoint=path)

    result = run()
    refused = [one for one in result.rounds if not one.counts]
    assert refused and result.sparsity == 0
    mean, error = bmr.free_energy(result.model, result.guide, *data, num_samples=200)
    assert abs(mean - result.free_energy) < 4 * (error + result.kept_round.free_energy_error)
    point = result.guide(*data)["scale"].item()

    def stop(*_):
        raise InterruptedError

    path.unlink()
    monkeypatch.setattr(pruning.Program, "go_on", stop)
    with pytest.raises(InterruptedError):
        run()
    monkeypatch.undo()
    resumed = run()
    assert resumed.rounds == result.rounds
    assert resumed.guide(*data)["scale"].item() == point


# How often the learning rate was asked for, and when it interrupts the training.
RATES = [0, -1]


def rate(done):
    RATES[0] += 1
    if RATES[0] == RATES[1]:
        raise KeyboardInterrupt
    return 0.05 * (1 - done)


def prune_function(data, path=None):
    """Prune a guide that is a function, whose parameters are in the param store."""
    zero, one = torch.zeros((), device=data[0].device), torch.ones((), device=data[0].device)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(zero, one).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, one), obs=y)

    def guide(x, y=None):
        loc = pyro.param("loc", zero.expand(4).clone())
        scale = pyro.param("scale", one.expand(4).clone(), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    options = {"num_epochs": 4, "seed": 2, "max_rounds": 3, "num_samples": 5, "lr": rate}
    quiet = {"compile": False, "progress": False, "checkpoint": path}
    return bmr.prune(model, guide, *data, **options, **quiet)


def test_interrupted_in_a_training(data, tmp_path, monkeypatch, device):
    monkeypatch.setattr(keeping, "_LEAST_APART", 0.0)
    monkeypatch.setattr(keeping, "_MOST_WRITING", torch.inf)
    data = [tensor.to(device) for tensor in data]
    whole = prune_function(data)
    for calls in (2, 6):
        RATES[:] = 0, calls
        with pytest.raises(KeyboardInterrupt):
            prune_function(data, tmp_path / "run.pt")
    RATES[:] = 0, -1
    resumed = prune_function(data, tmp_path / "run.pt")
    assert resumed.rounds == whole.rounds and weights(resumed) == weights(whole)


def test_refused_rounds_are_in_the_file(data, tmp_path, monkeypatch):
    """No training is done again that ended before the interruption."""
    whole = prune_function(data)
    assert not all(one.counts for one in whole.rounds)
    trained = []

    def interrupted(*args, **kwargs):
        trained.append(1)
        if len(trained) == len(whole.rounds):
            raise KeyboardInterrupt
        return run_training(*args, **kwargs)

    monkeypatch.setattr(pruning, "run_training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_function(data, tmp_path / "run.pt")
    resumed = prune_function(data, tmp_path / "run.pt")
    assert len(trained) == len(whole.rounds) + 1
    monkeypatch.setattr(pruning, "run_training", None)
    for one in (resumed, prune_function(data, tmp_path / "run.pt")):
        assert one.rounds == whole.rounds and weights(one) == weights(whole)


def many_rows(num_rows=400):
    x = torch.randn(num_rows, 3)
    return x, x[:, 0] + 0.5 * torch.randn(num_rows)


def linear(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.rare
def test_many_rows_are_measured_in_parts(monkeypatch):
    """All once where that tells which F is lower, and again where it does not."""
    monkeypatch.setattr(free_energies, "ROWS", 20)
    data, measured = many_rows(), []
    settle = pruning.Program.settle

    def settled(self, last, after):
        states = settle(self, last, after)
        measured.append([len(state.draws) for state in (last, after, *states)])
        return states

    monkeypatch.setattr(pruning.Program, "settle", settled)
    options = {"num_epochs": 20, "lr": 0.02, "batch_size": 50, "compile": False, "seed": 0}
    options |= {"num_samples": 8, "select": bmr.by_evidence(), "progress": False}
    result = bmr.prune(linear, AutoNormal(linear), *data, **options, refit_epochs=1)
    assert result.masks["w"].tolist() == [True, False, False]
    mean, error = bmr.free_energy(result.model, result.guide, *data, num_samples=200)
    its_error = result.kept_round.free_energy_error
    assert abs(mean - result.free_energy) < 4 * (error**2 + its_error**2) ** 0.5
    for before, first, last, after in measured:
        # 20 batches of four parts, and up to 8 times all of them.
        assert first == 80 and before >= 80
        assert after in {80, 160, 320, 640} and last >= after
    assert max(after for *_, after in measured) > 80


def test_what_cannot_be_measured_in_parts_is_measured_whole(monkeypatch):
    monkeypatch.setattr(free_energies, "ROWS", 20)
    x, y = many_rows(170)

    def model(x, y):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        before = torch.cat([torch.zeros(1), y[:-1]])
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[0] * before + a[1] * x[:, 0], 0.5), obs=y)

    options = {"num_epochs": 20, "lr": 0.02, "compile": False, "seed": 0, "num_samples": 7}
    result = bmr.prune(model, AutoNormal(model), x, y, **options, progress=False, max_rounds=1)
    mean, error = bmr.free_energy(result.model, result.guide, x, y, num_samples=200)
    its_error = result.kept_round.free_energy_error
    assert abs(mean - result.free_energy) < 4 * (error**2 + its_error**2) ** 0.5
