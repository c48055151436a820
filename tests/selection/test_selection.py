"""Selections against their definitions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_bmr as bmr

SHAPES = {"a": (4, 5), "b": (30,)}


def model():
    for name, shape in SHAPES.items():
        pyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event())


@pytest.fixture
def guide():
    guide = AutoNormal(model)
    guide()
    for name, shape in SHAPES.items():
        setattr(guide.locs, name, torch.randn(shape))
        setattr(guide.scales, name, torch.rand(shape) + 0.05)
    return guide


CRITERIA = {
    "snr": (bmr.baselines.snr, lambda loc, scale: loc.abs() / scale),
    "spr": (bmr.baselines.spr, lambda loc, scale: loc.abs() + scale),
    "magnitude": (bmr.baselines.magnitude, lambda loc, scale: loc.abs()),
}


def flat(by_site):
    return torch.cat([by_site[name].reshape(-1) for name in SHAPES])


@pytest.mark.parametrize(("selection", "criterion"), CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.98, 1.0])
def test_baselines_drop_the_lowest_over_all_sites(guide, selection, criterion, fraction):
    result = bmr.reduce(guide, select=selection(fraction))
    values = flat({n: criterion(getattr(guide.locs, n), getattr(guide.scales, n)) for n in SHAPES})
    keep = flat(result.masks)
    assert (~keep).sum() == round(fraction * 50)
    if keep.any() and not keep.all():
        assert values[~keep].max() <= values[keep].min()
    assert result.delta_f == pytest.approx(flat(result.scores)[~keep].sum().item(), rel=1e-5)


@pytest.mark.parametrize("n", [0, 7, 50, 99])
def test_top_k_keeps_the_dearest(guide, n):
    result = bmr.reduce(guide, select=bmr.top_k(n))
    keep, scores = flat(result.masks), flat(result.scores)
    assert keep.sum() == min(n, 50)
    if 0 < n < 50:
        assert scores[~keep].max() <= scores[keep].min()


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0])
def test_by_evidence_drops_what_gains_the_margin(guide, margin):
    result = bmr.reduce(guide, select=bmr.by_evidence(margin))
    assert torch.equal(flat(result.masks), flat(result.scores) > -margin)


def test_random_is_reproducible_and_leaves_the_generators_alone(guide):
    state = torch.get_rng_state()
    results = [bmr.reduce(guide, select=bmr.baselines.random(0.5, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (flat(result.masks) for result in results)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (~first).sum() == 25


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_a_fraction_counts_what_was_pruned_before(family):
    guide = family(model)
    guide()
    first = bmr.reduce(guide, select=bmr.baselines.random(0.3))
    for select in (bmr.baselines.snr(0.5), bmr.baselines.random(0.5, seed=3), bmr.top_k(25)):
        second = bmr.reduce(first.guide, select=select)
        assert second.sparsity == 0.5
        assert not (flat(second.masks) & ~flat(first.masks)).any()


def test_a_selection_of_ones_own(guide):
    result = bmr.reduce(guide, select=lambda scores: {"a": scores.scale["a"] < 0.5})
    assert torch.equal(result.masks["a"], guide.scales.a < 0.5)
    assert result.masks["b"].all()


def test_what_a_result_shows(guide):
    result = bmr.reduce(guide)
    table = result.summary()
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == [
        "shape",
        "total",
        "kept",
        "pruned %",
        "delta_f",
        "undecided",
        "wide",
        "unscored",
        "note",
    ]
    assert table["delta_f"].sum() == pytest.approx(result.delta_f)
    assert table["kept"].sum() == flat(result.masks).sum()
    assert 1 - table["kept"].sum() / table["total"].sum() == pytest.approx(result.sparsity)
    text = str(result)
    assert f"{result.sparsity:.1%} pruned, ΔF = {result.delta_f:+.2f} nats" in text
    assert "4 × 5" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "<table" in result._repr_html_()
