"""Steps of `fit` that are launched as one; without a GPU, a recorder stands in for its graphs."""

from contextlib import contextmanager, nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_bmr as bmr
from conftest import DEVICES
from pyro_bmr.training import compiled_steps, fitting, step_functions, vectors

ROWS = 100


def data(device="cpu"):
    x = torch.linspace(-1, 1, 3 * ROWS, device=device).reshape(ROWS, 3).sin()
    return x, x @ x.new_tensor([1.0, -2.0, 0.0]) + 0.3


def model(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + bias, 0.3), obs=y)


class Recorder(TorchDispatchMode):
    """Notes operations with their tensors, and does the same to the same tensors again."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(func), "a GPU would have to be waited for"
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        type(self).replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and not func._schema.returns[0].alias_info:
                result.copy_(again)


@pytest.fixture
def recorded(monkeypatch):
    """Pretend that the CPU has graphs."""

    @contextmanager
    def graph(recorder, **_):
        with recorder:
            yield

    class Stream:
        def wait_stream(self, other):
            pass

    fakes = {"CUDAGraph": Recorder, "Stream": Stream, "current_stream": Stream, "graph": graph}
    fakes |= {"stream": nullcontext, "device": nullcontext}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Recorder, "replays", 0)
    monkeypatch.setattr(compiled_steps, "can_capture", lambda device: True)


@pytest.fixture
def traced(monkeypatch):
    """Take traced steps for compiled ones, whose operations can be recorded."""
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)
    monkeypatch.setattr(step_functions, "compile_step", lambda step, _: step)


def train(batch_size, device="cpu", **options):
    pyro.clear_param_store()
    guide = AutoNormal(model)
    told = {"num_epochs": 20, "lr": 0.05, "seed": 0, "progress": False} | options
    losses = bmr.fit(model, guide, *data(device), batch_size=batch_size, **told)
    return losses, torch.cat([one.detach().reshape(-1) for one in guide.parameters()])


@pytest.mark.parametrize("batch_size", [5, 8, 33, None])
def test_steps_that_are_replayed_end_where_others_do(batch_size, traced, request, recwarn):
    """Also with a smaller last batch, and with steps that are left over from the replays."""
    losses, expected = train(batch_size)
    request.getfixturevalue("recorded")
    again, found = train(batch_size)
    assert losses == again and torch.equal(found, expected)
    assert Recorder.replays >= 20
    assert not [w for w in recwarn.list if "slower" in str(w.message)]


def test_what_cannot_be_replayed_is_launched_step_by_step(traced, monkeypatch):
    monkeypatch.setattr(compiled_steps, "can_capture", lambda device: True)

    def refuse():
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.warns(UserWarning, match="by itself, which is slower: operation not permitted$"):
        train(10)


def test_blocks_divide_an_epoch_evenly():
    assert [compiled_steps._divide(steps, 64) for steps in (1, 20, 64, 65, 130, 640)] == [
        *(1, 20, 64),
        *(32, 43, 64),
    ]


def test_large_parameters_are_vectors_of_their_own(traced, monkeypatch):
    losses, expected = train(10)
    monkeypatch.setattr(vectors, "_LARGE", 2)
    again, found = train(10)
    assert losses == pytest.approx(again, rel=1e-6)
    torch.testing.assert_close(found, expected)
    _, clipped = train(10, clip_norm=0.5)
    monkeypatch.setattr(vectors, "_LARGE", 1 << 20)
    torch.testing.assert_close(clipped, train(10, clip_norm=0.5)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("batch_size", [5, 8])
def test_graphs_of_a_gpu_end_where_single_launches_do(batch_size, device, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(fitting, "_COMPILE_FROM", 1)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(0) or replay(g))
    losses, found = train(batch_size, device)
    assert replays
    monkeypatch.setattr(compiled_steps, "can_capture", lambda device: False)
    again, expected = train(batch_size, device)
    assert losses == pytest.approx(again, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_precision_is_torchs_while_it_trains(precision):
    before, seen = torch.get_float32_matmul_precision(), []

    def stop(_):
        seen.append(torch.get_float32_matmul_precision())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(10, precision=precision, callback=stop)
    assert seen == [precision or before]
    assert torch.get_float32_matmul_precision() == before


def test_steps_are_checked_at_full_precision(traced, monkeypatch):
    before = torch.backends.cudnn.allow_tf32
    seen = []

    def watched(x, y):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        model(x, y)

    torch.backends.cudnn.allow_tf32 = True
    try:
        pyro.clear_param_store()
        options = {"num_epochs": 2, "batch_size": 10, "precision": "medium", "progress": False}
        bmr.fit(watched, AutoNormal(watched), *data(), **options)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert ("highest", False) in seen
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_bad_precision():
    with pytest.raises(ValueError, match="precision='half'.*'highest', 'high' or 'medium'"):
        train(10, precision="half")
