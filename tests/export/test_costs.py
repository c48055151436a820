"""Costs: counts that can be done by hand, and a table."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmr as bmr


def make(hidden):
    pyro.clear_param_store()
    net = bmr.bayesianize(nn.Sequential(nn.Linear(7, hidden), nn.ReLU(), nn.Linear(hidden, 3)))

    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = AutoNormal(model)
    guide(*ARGS)
    whole = bmr.reduce(guide, select=lambda scores: scores.kept)
    return whole.model, whole.guide


torch.manual_seed(0)
ARGS = torch.randn(16, 7), torch.randint(3, (16,))


@pytest.fixture(scope="module")
def costs():
    full = make(400)
    masked = bmr.reduce(full[1], select=bmr.top_k(100))
    programs = {"full": full, "masked": (masked.model, masked.guide), "compacted": make(4)}
    return bmr.measure_costs(programs, *ARGS, num_samples=10, seconds=0.2)


def test_counts(costs):
    full, masked, compacted = costs.rows
    assert full.parameters == masked.parameters == 7 * 400 + 400 + 400 * 3 + 3
    assert compacted.parameters == 7 * 4 + 4 + 4 * 3 + 3
    assert (full.nonzero, masked.nonzero) == (full.parameters, 100)
    assert full.flops == masked.flops == 2 * 16 * (7 * 400 + 400 * 3)
    assert compacted.flops * 100 == full.flops
    assert all(0 < row.forward < row.predictive * 2 < 2 for row in costs.rows)
    assert costs.batch == 16


def test_table(costs):
    table = costs.summary()
    assert list(table.index) == ["full", "masked", "compacted"]
    assert table["parameters %"]["compacted"] == pytest.approx(100 * 47 / 4403)
    assert table["non-zero %"]["masked"] == pytest.approx(100 * 100 / 4403)
    assert table["forward speed-up"]["full"] == table["predictive speed-up"]["full"] == 1
    text = str(costs)
    assert text.startswith("costs at 16 data")
    assert "4,403 (100.0%)" in text
    assert "10 draws" in text
    assert "<table" in costs._repr_html_()


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no models"):
        bmr.measure_costs({}, *ARGS)
