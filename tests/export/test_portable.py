"""What results do by themselves: modules, ONNX, files and reports, also without arguments."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmr as bmr

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
OFFSET = torch.arange(6.0)


@pytest.fixture
def model():
    net = bmr.bayesianize(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)))

    def network(x, y=None, *, offset):
        mean = net(x)[:, 0] + offset
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return network


@pytest.fixture
def result(model):
    guide = AutoNormal(model)
    guide(X, X[:, 0], offset=OFFSET)
    return bmr.reduce(guide, select=bmr.baselines.random(0.4, seed=1))


def test_module(result):
    """With the arguments that it was made with, or others."""
    expected = bmr.to_module(result.model, result.guide, X, kwargs={"offset": OFFSET})
    for arguments, others in [((), {}), ((X[:2],), {"offset": OFFSET[:2]})]:
        module = result.to_module(*arguments, kwargs=others)
        assert torch.equal(module(X, OFFSET), expected(X, OFFSET))
    draws = result.to_module(num_samples=3, seed=4)
    torch.manual_seed(4)
    values = [result.guide(X, offset=OFFSET) for _ in range(3)]
    for name, tensor in draws.named_parameters():
        assert torch.equal(tensor, torch.stack([value[name] for value in values]))
    assert torch.equal(result.to_module(output="scale")(X[:4], OFFSET[:4]), torch.ones(4))


def test_report(result):
    """The same network masked and compacted, at the batch that is given."""
    costs = result.report(X[:4], num_samples=2, kwargs={"offset": OFFSET[:4]})
    masked, compacted = costs.rows
    assert [masked.name, compacted.name] == ["masked", "compacted"]
    assert (costs.batch, costs.num_samples) == (4, 2)
    assert masked.parameters == 26 >= compacted.parameters
    assert masked.nonzero == sum(int(mask.sum()) for mask in result.model.masks.by_site().values())
    assert masked.flops == 2 * 4 * (3 * 5 + 5)


def test_files(result, model, tmp_path):
    """Under a name or a path, in folders that are made, and nothing else is written."""
    path = tmp_path / "deep" / "result"
    result.save(str(path))
    result.export_onnx(str(tmp_path / "network.onnx"))
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["network.onnx"]
    loaded = bmr.load(path, model, X, kwargs={"offset": OFFSET})
    assert torch.equal(loaded.to_module()(X, OFFSET), result.to_module()(X, OFFSET))


def test_without_arguments(result, model, tmp_path):
    """A result that was loaded alone has no example, and says so."""
    result.save(tmp_path / "a")
    result.compact().save(tmp_path / "c")
    loaded, small = (bmr.load(tmp_path / name, model) for name in ("a", "c"))
    for verb, use in (
        ("to_module", loaded.to_module),
        ("export_onnx", lambda: loaded.export_onnx(tmp_path / "b")),
        ("report", loaded.report),
        ("to_arviz", loaded.to_arviz),
        ("to_module", small.to_module),
        ("export_onnx", lambda: small.export_onnx(tmp_path / "b")),
    ):
        with pytest.raises(TypeError, match=rf"got 0 arguments .*'x'.*{verb}\(x\).*load"):
            use()
    with pytest.raises(TypeError, match="'offset'"):
        loaded.to_module(X)
    assert not (tmp_path / "b").exists()
    module = loaded.to_module(X, kwargs={"offset": OFFSET})
    assert torch.equal(module(X, OFFSET), result.to_module()(X, OFFSET))
    assert loaded.compact(X, kwargs={"offset": OFFSET}).to_module()(X[:1], OFFSET[:1]).shape == (1,)
