"""Data that need not fit into memory, and what a callback is told."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import common_draws, streamed_draws
from pyro_bmr.programs.fingerprints import fingerprint
from pyro_bmr.programs.streams import read_stream_or_data
from pyro_bmr.training import fitting, keeping
from pyro_bmr.training.generators import pack_generators

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
    "of tensors": lambda: DataLoader(TensorDataset(X, Y), 5, shuffle=True, drop_last=True),
    "with workers": lambda: DataLoader(Rows(), batch_size=8, num_workers=1),
    "one batch": lambda: DataLoader(Rows(), batch_size=23),
    "single rows": lambda: DataLoader(Rows(), batch_size=1),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_batches_stand_for_all_rows(make):
    """Whatever the size of the last one; to the last digits, at common random numbers."""
    guide = trained()
    stream = read_stream_or_data(model, guide, (make(),), None).stream
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


@pytest.mark.rare
def test_compiled_steps_of_batches_that_are_padded_to_other_widths(monkeypatch):
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)

    def of_sums(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=x.sum(-1))

    def pad(rows):
        width = 1 + int(max(row for (row,) in rows) >= 8)
        return (torch.stack([torch.full((width,), 3.0 / width) for _ in rows]),)

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, row):
            return (row,)

    guide = AutoNormal(of_sums)
    loader = DataLoader(Numbers(), batch_size=4, collate_fn=pad)
    bmr.fit(of_sums, guide, loader, num_epochs=300, lr=lambda t: 0.1 * (1 - t), progress=False)
    assert abs(guide.median()["mean"] - 3.0) < 0.1


def test_rows_that_a_sampler_chooses():
    sampler = SubsetRandomSampler(range(3, 20))
    in_batches = DataLoader(Rows(), batch_sampler=BatchSampler(sampler, 4, drop_last=True))
    guide = trained()
    for loader in (in_batches, DataLoader(Rows(), batch_size=4, sampler=sampler)):
        stream = read_stream_or_data(model, guide, (loader,), None).stream
        assert stream.batches.size == 17
        assert torch.equal(stream.batches.args[0][:4], X[3:7])
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


def test_no_generator_moves_as_an_example_is_read():
    def draw(i):
        return X[i] + torch.randn(3) + np.random.randn() + random.random(), Y[i]

    generator = torch.Generator()
    loader = DataLoader(Made(draw), batch_size=4, shuffle=True, generator=generator)
    before = fingerprint(pack_generators(set(), [generator]))
    first, second = (read_stream_or_data(model, None, (loader,), None).args for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert fingerprint(pack_generators(set(), [generator])) == before


@pytest.mark.parametrize("verb", ["fit", "prune"])
def test_a_killed_training_of_a_shuffled_loader(verb, tmp_path, monkeypatch):
    """It goes on bit for bit, wherever the generators are by then, unless rows have changed."""
    monkeypatch.setattr(keeping, "_LEAST_APART", 0.0)
    monkeypatch.setattr(keeping, "_MOST_WRITING", 1e9)
    options = {"num_epochs": 4, "lr": 0.1, **QUIET}
    if verb == "prune":
        options |= {"num_samples": 4, "max_rounds": 1, "select": bmr.by_evidence()}

    def run(seed, killed=None, data=None, size=5, **told):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            data or Rows(), size, **{"shuffle": True, "generator": generator, **told}
        )

        def kill(epoch):
            if epoch.epoch == killed:
                raise InterruptedError

        guide, path = trained((0.5, 0.5, 0.5)), tmp_path / f"run.{seed > 1}"
        options["callback"] = kill
        result = getattr(bmr, verb)(model, guide, loader, checkpoint=path, **options)
        return result if verb == "fit" else [one.free_energy for one in result.rounds]

    expected = run(1)
    for file in tmp_path.iterdir():
        file.unlink()
    for killed in (1, 5) if verb == "prune" else (1,):
        with pytest.raises(InterruptedError):
            run(1, killed)
    changed = Made(lambda i: (X[i], Y[i] + (i == 22)))
    for told in (
        {"data": changed},
        {"data": Subset(Rows(), range(22))},
        {"size": 6},
        {"shuffle": False},
    ):
        with pytest.raises(ValueError, match="of another run: data was .*Expected the same"):
            run(1, **told)
    (tmp_path / "run.False").rename(tmp_path / "run.True")
    assert run(2) == expected


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Made(Rows):
    """Rows that a function makes of their numbers."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, i):
        return self.make(i)


def made(make, **options):
    return lambda: DataLoader(Made(make), **{"batch_size": 8, **options})


def sampled(sampler, kind=BatchSampler):
    return lambda: DataLoader(Rows(), batch_sampler=kind(sampler, 5, drop_last=False))


class OfEqualLabels(BatchSampler):
    pass


class Twice(DataLoader):
    def __iter__(self):
        yield from [*super().__iter__()] * 2


WEIGHTED = WeightedRandomSampler([1.0] * 23, 23)

REFUSED = {
    "iterable": (lambda: DataLoader(Endless(), batch_size=5), TypeError, "Endless, whose rows are"),
    "iterable set": (Endless, TypeError, "Endless.*not counted.*Expected a Dataset with __len__"),
    "weighted": (
        lambda: DataLoader(Rows(), batch_size=5, sampler=WEIGHTED),
        ValueError,
        "WeightedRandomSampler, whose rows may not.*Expected shuffle=True",
    ),
    "no batches": (lambda: DataLoader(Rows(), batch_size=None), ValueError, "without batches"),
    "no rows": (lambda: TensorDataset(X[:0], Y[:0]), ValueError, "TensorDataset without any rows"),
    "words": (
        made(lambda i: (X[i], "word")),
        ValueError,
        r"batches that hold \{1: '\w+'\}.*Expected tensors",
    ),
    "only words": (made(lambda _: "word"), ValueError, "batches that hold .*Expected tensors"),
    "a mapping in a tuple": (
        made(lambda i: (X[i], {"y": Y[i]})),
        ValueError,
        r"batches that hold \{1: 'dict'\}.*Expected tensors",
    ),
    "other kinds": (
        made(lambda i: (X[i], 0 if i < 16 else 0.9)),
        ValueError,
        r"got a batch of \{0: 'float', 1: 'int'\}.* before one of .*'float'\}.*float\(y\)",
    ),
    "other numbers of columns": (
        made(lambda i: (X[i], Y[i])[: 1 + (i < 12)]),
        ValueError,
        "rows of a Made that make no batch .*Expected.*as many",
    ),
    "other numbers in batches": (
        made(
            lambda i: (X[i], Y[i]),
            collate_fn=lambda rows: default_collate(rows)[: 1 + (len(rows) != 7)],
        ),
        ValueError,
        r"got a batch of \{0: 'float'\}.* before one of .*1: 'float'\}. Expected the same",
    ),
    "other names": (
        made(lambda i: {"x": X[i], "y" if i < 12 else "z": Y[i]}),
        ValueError,
        r"make no batch \(KeyError.*Expected",
    ),
    "other numbers of rows": (
        made(lambda i: (X[i], Y[i]), collate_fn=lambda rows: (X[: len(rows)], Y[:2])),
        ValueError,
        r"shapes \{0: \(16, 3\), 1: \(2,\)\}.*Expected one row",
    ),
    "weighted batches": (
        sampled(WEIGHTED),
        ValueError,
        "WeightedRandomSampler, whose rows may not.*Expected shuffle=True",
    ),
    "batches of one's own": (
        sampled(RandomSampler(X), OfEqualLabels),
        ValueError,
        "OfEqualLabels, whose rows may not.*Expected batch_size=.*SVI.step",
    ),
    "rows at the end": (
        lambda: DataLoader(Rows(), batch_size=5, drop_last=True),
        ValueError,
        "never read. Expected shuffle=True, or drop_last=False",
    ),
    "no batch": (
        lambda: DataLoader(Rows(), batch_size=24, shuffle=True, drop_last=True),
        ValueError,
        "23 rows that makes no batch of 24. Expected one row or more, and drop_last=False",
    ),
    "of another length": (
        lambda: Twice(Rows(), batch_size=5),
        ValueError,
        r"more batches in an epoch, and 5 by len\(loader\). Expected",
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
