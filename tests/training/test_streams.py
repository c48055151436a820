"""Data that need not fit into memory, and what a callback is told."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import common_draws, streamed_draws
from pyro_bmr.programs.streams import read_rows

torch.manual_seed(0)
X = torch.randn(23, 3)
Y = 2 * X[:, 0] + 0.3 * torch.randn(23)
QUIET = {"compile": False, "progress": False}


def model(x, y=None, *, scale=0.3):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    # A term that no batch changes counts once.
    pyro.sample("known", dist.Normal(w.sum(), 1.0), obs=torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


class Rows(Dataset):
    """As files give them: arrays of another dtype, and Python's own numbers."""

    def __init__(self, named=False):
        self.named = named

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        x, y = X[i].double().numpy(), float(Y[i])
        return {"x": x, "y": y} if self.named else (x, y)


def trained(loc=(2.0, 0.0, 0.0)):
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": torch.tensor(loc)}))
    guide(X, Y)
    return guide


LOADERS = {
    "a loader": lambda: DataLoader(Rows(), batch_size=5, shuffle=True),
    "of mappings": lambda: DataLoader(Rows(named=True), batch_size=5),
    "of tensors": lambda: DataLoader(TensorDataset(X, Y), batch_size=5, drop_last=True),
    "with workers": lambda: DataLoader(Rows(), batch_size=8, num_workers=1),
    "one batch": lambda: DataLoader(Rows(), batch_size=23),
    "single rows": lambda: DataLoader(Rows(), batch_size=1),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_batches_stand_for_all_rows(make):
    """Whatever the size of the last one; to the last digits, at common random numbers."""
    guide = trained()
    stream = read_rows(model, guide, (make(),), None).stream
    assert stream.batches.size == 23
    assert [len(batch[0]) for batch in stream.epoch()][0] == stream.batches.batch_size
    assert {t.dtype for t in next(iter(stream.epoch()))} == {torch.float32}
    streamed = torch.stack(streamed_draws(model, guide, stream, 4))
    whole = torch.stack(common_draws(model, guide, (X, Y), {}, 4))
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("data", [Rows(), TensorDataset(X, Y)], ids=["rows", "tensors"])
def test_a_dataset(data, batch_size):
    guide = trained()
    losses = bmr.fit(model, guide, data, num_epochs=3, batch_size=batch_size, **QUIET)
    assert len(losses) == 3
    result, expected = bmr.reduce(guide, data), bmr.reduce(guide, X, Y)
    assert torch.equal(result.masks["w"], expected.masks["w"])
    assert result.realised == pytest.approx(expected.realised, abs=2.0)


def test_a_loader_trains_as_the_data_do():
    def fit(*data, **told):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        bmr.fit(model, guide, *data, **told, num_epochs=40, lr=0.1, seed=1, **QUIET)
        return guide.median()["w"]

    for told in ({}, {"kwargs": {"scale": 0.9}}):
        loader = DataLoader(Rows(named=True), batch_size=12, shuffle=True)
        torch.testing.assert_close(
            fit(loader, **told), fit(X, Y, batch_size=12, **told), atol=0.25, rtol=0
        )


def test_compiled_steps_of_a_loader():
    def fit(compile):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        loader = DataLoader(Rows(), batch_size=10)
        options = {"num_epochs": 334, "lr": 0.02, "seed": 1, "progress": False}
        bmr.fit(model, guide, loader, compile=compile, **options)
        return guide.median()["w"]

    torch.testing.assert_close(fit(True), fit(False), atol=0.15, rtol=0)


def test_rows_that_a_sampler_chooses():
    loader = DataLoader(Rows(), batch_size=4, sampler=SubsetRandomSampler(range(3, 20)))
    guide = trained()
    stream = read_rows(model, guide, (loader,), None).stream
    assert stream.batches.size == 17
    streamed = torch.stack(streamed_draws(model, guide, stream, 4))
    whole = torch.stack(common_draws(model, guide, (X[3:20], Y[3:20]), {}, 4))
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-4)


def test_prune_of_a_loader():
    """Measured on all rows, as the data themselves are."""

    def prune(*data):
        pyro.clear_param_store()
        options = {"num_epochs": 0, "refit_epochs": 1, "num_samples": 4, "max_rounds": 1, **QUIET}
        return bmr.prune(model, trained(), *data, lr=1e-6, select=bmr.by_evidence(), **options)

    result, expected = prune(DataLoader(Rows(), batch_size=12)), prune(X, Y)
    assert result.masks["w"].tolist() == [True, False, False]
    for one, other in zip(result.rounds, expected.rounds, strict=True):
        assert one.free_energy == pytest.approx(other.free_energy, abs=1e-2)
        assert one.realised == pytest.approx(other.realised, abs=1e-2)


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Words(Rows):
    def __getitem__(self, i):
        return X[i], "word"


REFUSED = {
    "iterable": (lambda: DataLoader(Endless(), batch_size=5), TypeError, "Endless, whose rows are"),
    "iterable set": (Endless, TypeError, "Endless.*not counted.*Expected a Dataset with __len__"),
    "weighted": (
        lambda: DataLoader(Rows(), batch_size=5, sampler=WeightedRandomSampler([1.0] * 23, 23)),
        ValueError,
        "WeightedRandomSampler, whose rows may not.*Expected shuffle=True",
    ),
    "no batches": (lambda: DataLoader(Rows(), batch_size=None), ValueError, "without batches"),
    "no rows": (lambda: TensorDataset(X[:0], Y[:0]), ValueError, "TensorDataset without any rows"),
    "words": (
        lambda: DataLoader(Words(), batch_size=5),
        ValueError,
        r"batches that hold \{1: '\w+'\}.*Expected tensors",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_streamed_is_refused(kind):
    make, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        bmr.fit(model, AutoNormal(model), make(), num_epochs=1, **QUIET)


def test_what_does_not_go_with_a_loader():
    loader, guide = DataLoader(Rows(), batch_size=5), trained()
    with pytest.raises(ValueError, match="batch_size=4 beside a DataLoader.*Expected one of"):
        bmr.fit(model, guide, loader, num_epochs=1, batch_size=4, **QUIET)
    for data, kwargs in (((loader, Y), None), ((loader,), {"y": Y})):
        with pytest.raises(ValueError, match="DataLoader.*'Tensor'.*Expected a DataLoader or a D"):
            bmr.fit(model, guide, *data, kwargs=kwargs, num_epochs=1, **QUIET)
    for verb in (bmr.free_energy, bmr.to_arviz):
        with pytest.raises(
            TypeError, match="DataLoader as argument 0. Expected.*fit, prune and re"
        ):
            verb(model, guide, loader)


@pytest.mark.parametrize("compile", [True, False])
def test_a_callback_of_fit(compile):
    guide, seen = AutoNormal(model), []

    def callback(one):
        seen.append((one.epoch, one.loss, one.round, one.guide.median()["w"]))

    options = {"lr": 0.05, "callback": callback, "progress": False}
    count = 1001 if compile else 9
    losses = bmr.fit(model, guide, X, Y, num_epochs=count, compile=compile, **options)
    epochs, told, rounds, medians = zip(*seen, strict=True)
    assert epochs == tuple(range(count))
    assert list(told) == losses
    assert set(rounds) == {0}
    assert torch.equal(medians[-1], guide.median()["w"])
    assert not torch.equal(medians[0], medians[-1])


def test_a_callback_that_fails_leaves_the_guide_trained():
    guide = AutoNormal(model)

    def callback(one):
        if one.epoch == 9:
            raise StopIteration

    with pytest.raises(StopIteration):
        bmr.fit(model, guide, X, Y, num_epochs=50, lr=0.1, callback=callback, **QUIET)
    assert guide.median()["w"][0] > 0.5


def test_a_callback_of_prune():
    seen = []
    options = {"num_epochs": 3, "refit_epochs": 2, "num_samples": 4, "max_rounds": 1, **QUIET}
    result = bmr.prune(model, trained(), X, Y, callback=seen.append, **options)
    later = [one.index for one in result.rounds[1:] for _ in range(2)]
    assert [one.epoch for one in seen] == list(range(3 + len(later)))
    assert [one.round for one in seen] == [0, 0, 0, *later]
