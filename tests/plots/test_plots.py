"""Figures: that the numbers in them are the right ones, and that nothing else changes."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from matplotlib.colors import to_rgb
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.distributions import Normal

import pyro_bmr as bmr
from pyro_bmr.plots.theme import series_styles
from pyro_bmr.plots.unit_order import count_crossings, order_units
from pyro_bmr.selection.summaries import (
    LayerSummary,
    Round,
)
from pyro_bmr.sparsities import Sparsity

PRIOR_SCALES = {"w1": 1.0, "w2": 1.0, "b": 0.3}
SHAPES = {"w1": (5, 3), "w2": (1, 5), "b": (5,)}


def network(x=None, y=None):
    for name, shape in SHAPES.items():
        prior = dist.Normal(0.0, PRIOR_SCALES[name]).expand(shape)
        pyro.sample(name, prior.to_event(len(shape)))
    pyro.sample("precision", dist.Gamma(2.0, 2.0))


@pytest.fixture
def guide():
    generator = torch.Generator().manual_seed(3)
    values = {n: 0.7 * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    guide = AutoNormal(network, init_loc_fn=init_to_value(values=values))
    guide()
    for name, shape in SHAPES.items():
        scale = PRIOR_SCALES[name] * (0.1 + 0.8 * torch.rand(shape, generator=generator))
        setattr(guide.scales, name, scale)
    return guide


@pytest.fixture
def result(guide):
    """By the evidence of each element; what nothing reads stays."""
    return bmr.reduce(guide, select=lambda scores: {n: s > 0 for n, s in scores.delta_f.items()})


@pytest.fixture(autouse=True)
def a_good_guest():
    """No figure stays open here that was not asked for, and no setting changes."""
    before = dict(plt.rcParams)
    plt.close("all")
    yield
    assert dict(plt.rcParams) == before
    plt.close("all")


ROUNDS = (
    Round(0, 0.0, 0.0, 0.0, 0.0, 900.0, 1.0),
    Round(1, 0.7, -200.0, -190.0, 2.0, 500.0, 1.0),
    Round(2, 0.8, -3.0, 5.0, 0.5, 450.0, 1.0, kept=True),
    Round(3, 0.85, -0.3, 0.5, 0.5, 460.0, 1.0),
)
CALIBRATION = {
    name: pd.DataFrame({"confidence": [0.5, 0.7, 0.9], "accuracy": accuracy, "count": [10, 0, 30]})
    for name, accuracy in (("full", [0.4, 0.0, 0.9]), ("reduced", [0.6, 0.0, 0.8]))
}
POINTS = tuple(
    Sparsity(*row)
    for row in ((0.0, 0.0, 0.0, 0.0), (0.5, -40.0, -30.0, 1.0), (1.0, 9e5, 8e5, 10.0))
)
SPARSITIES = bmr.types.Sparsities(POINTS, Sparsity(0.8, -50.0, -45.0, 1.5), 1000.0, 2.0)


def line_model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x.reshape(-1), 0.5), obs=y)


def line_pair():
    guide = AutoNormal(line_model, init_loc_fn=init_to_value(values={"slope": torch.tensor(2.0)}))
    x = torch.linspace(-1.0, 3.0, 9)
    guide(x, x)
    guide.scales.slope = torch.tensor(0.2)
    return line_model, guide, x


ONE = {
    "delta_f": lambda result, ax: bmr.plot_delta_f(result, ax=ax),
    "sites": lambda result, ax: bmr.plots.plot_sites(result, ax=ax),
    "presence": lambda result, ax: bmr.plots.plot_presence(bmr.presence(result.guide), ax=ax),
    "criteria": lambda result, ax: bmr.plot_criteria(result, ax=ax),
    "element": lambda result, ax: bmr.plot_element(result, "b", 0, ax=ax),
    "sparsities": lambda result, ax: bmr.plot_sparsities(SPARSITIES, ax=ax),
    "reliability": lambda result, ax: bmr.plot_reliability(
        SimpleNamespace(calibration=CALIBRATION), ax=ax
    ),
}
TWO = {
    "weights": lambda result, axes: bmr.plot_weights(result, "w1", reader="w2", axes=axes),
    "network": lambda result, axes: bmr.plot_network(result, ["w1", "w2"], axes=axes),
    "rounds": lambda result, axes: bmr.plot_rounds(replace(result, rounds=ROUNDS), axes=axes),
}


@pytest.mark.parametrize("name", ONE)
def test_one_axes(result, name):
    _, ax = plt.subplots()
    assert ONE[name](result, ax) is ax
    assert len(plt.get_fignums()) == 1
    with plt.style.context("dark_background"):
        new = ONE[name](result, None)
    new.figure.draw_without_rendering()
    assert new.figure is not ax.figure and new.figure.get_layout_engine() is not None
    assert new.get_title(loc="left")


@pytest.mark.parametrize("name", TWO)
def test_two_axes(result, name):
    _, axes = plt.subplots(2)
    assert list(TWO[name](result, axes)) == list(axes)
    assert len(plt.get_fignums()) == 1
    new = TWO[name](result, None)
    new[0].figure.draw_without_rendering()
    assert len(new) == 2
    with pytest.raises(ValueError, match="axes= with 1 axes. Expected two"):
        TWO[name](result, axes[:1])


def test_delta_f_by_site(result):
    ax = bmr.plot_delta_f(result)
    expected = {site.name: site.delta_f for site in result.sites}
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert dict(zip(names, [bar.get_width() for bar in ax.patches], strict=True)) == expected
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(result.delta_f)
    assert "not reduced" in ax.texts[names.index("precision")].get_text()
    assert f"{abs(result.delta_f):.2f} nats" in ax.get_title(loc="left")


def test_delta_f_by_layer(result):
    grouped = replace(result, layers=(LayerSummary("w1", "unit", 5, 2, -3.0),))
    widths = [bar.get_width() for bar in bmr.plot_delta_f(grouped).patches]
    assert widths == [-3.0, pytest.approx(result.delta_f + 3.0)]
    assert len(bmr.plot_delta_f(grouped, by="site").patches) == len(result.sites)
    with pytest.raises(ValueError, match="no layer to draw"):
        bmr.plot_delta_f(result, by="layer")
    with pytest.raises(ValueError, match="by='unit'. Expected 'site' or 'layer'"):
        bmr.plot_delta_f(result, by="unit")


def test_delta_f_as_measured(result):
    sites = tuple(replace(site, realised=2 * site.delta_f) for site in result.sites)
    ax = bmr.plot_delta_f(replace(result, sites=sites))
    (points,) = (line for line in ax.lines if line.get_label() == "realised")
    drawn = dict(zip([t.get_text() for t in ax.get_yticklabels()], points.get_xdata(), strict=True))
    assert np.isnan(drawn.pop("precision"))
    assert drawn == {s.name: 2 * s.delta_f for s in result.sites if s.name in drawn}


def test_what_is_left_of_sites(result):
    ax = bmr.plots.plot_sites(result)
    kept = [100 * site.kept / site.total for site in result.sites]
    assert [bar.get_width() for bar in ax.patches[: len(kept)]] == pytest.approx(kept)
    table = bmr.plots.data(ax)
    assert table["pruned"].to_dict() == {s.name: s.total - s.kept for s in result.sites}
    assert table["delta_f"].sum() == pytest.approx(result.delta_f)
    grouped = replace(result, layers=(LayerSummary("w1", "unit", 5, 2, -3.0),))
    ax = bmr.plots.plot_sites(grouped)
    assert ax.patches[0].get_width() == pytest.approx(40)
    assert [text.get_text() for text in ax.texts] == ["2 of 5 units   ΔF −3.00"]


def test_presence_of_a_few_elements(guide):
    found = bmr.presence(guide, prior=0.3, sites=["b", "w2"])
    ax = bmr.plots.plot_presence(found)
    expected = torch.cat([found.probability[name].reshape(-1) for name in found.probability])
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(expected.tolist())
    assert find_line(ax, "before")[0] == pytest.approx([0.3] * 10)
    assert {t.get_text() for t in ax.get_yticklabels()} >= {"b[0]", "w2[0,4]"}
    named = bmr.plots.plot_presence(found, labels=list("abcdefghij"))
    assert [t.get_text() for t in named.get_yticklabels()] == list("abcdefghij")
    table = bmr.plots.data(ax)
    assert table["probability"].sum() == pytest.approx(found.expected_kept, rel=1e-6)
    with pytest.raises(ValueError, match="got 2 labels. Expected 10"):
        bmr.plots.plot_presence(found, labels=["a", "b"])
    with pytest.raises(TypeError, match=r"Expected what pyro_bmr.presence\(\) returned"):
        bmr.plots.plot_presence(found.probability)


def test_presence_of_many_elements():
    probability = torch.tensor([0.01] * 60 + [0.2] * 20 + [0.7] * 10 + [0.99] * 10)
    found = bmr.types.Presence({"w": probability}, {}, {"w": 0.0})
    ax = bmr.plots.plot_presence(found)
    widths = [bar.get_width() for bar in ax.patches if bar.get_y() != 0.0]
    assert widths == pytest.approx([10, 10, 20, 60])
    assert len(bmr.plots.data(ax)) == 100
    with pytest.raises(ValueError, match="got 1 labels. Expected 0"):
        bmr.plots.plot_presence(found, labels=["w"])


def test_every_figure_has_its_data(result):
    """Also on axes of one's own; what comes out is a copy."""
    for draw in (*ONE.values(), *TWO.values()):
        drawn = draw(result, None)
        table = bmr.plots.data(drawn)
        assert isinstance(table, pd.DataFrame) and len(table)
        del table[table.columns[0]]
        assert len(bmr.plots.data(drawn).columns) == len(table.columns) + 1
    models = bmr.plot_models(compared()[0])
    assert list(bmr.plots.data(models[0]).index) == ["no 0", "no 1", "no 2"]
    assert len(bmr.plots.data(models[3])) == 4
    with pytest.raises(ValueError, match="4 axes with 2 frames behind them"):
        bmr.plots.data(models)
    for wrong in (plt.subplots()[1], None, "axes", result):
        with pytest.raises(ValueError, match="Expected what a figure function"):
            bmr.plots.data(wrong)


def lightness(color):
    """CIE L*, from 0 for black to 100 for white."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in to_rgb(color)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_series_differ_in_grey_and_from_the_background(style):
    with plt.style.context(style):
        styles = [one for one, _ in zip(series_styles(), range(4), strict=False)]
        background = lightness(plt.rcParams["axes.facecolor"])
    shades = sorted(lightness(one["color"]) for one in styles)
    assert min(np.diff(shades)) > 14
    assert min(abs(shade - background) for shade in shades) > 25
    for what in ("marker", "linestyle", "hatch"):
        assert len({one[what] for one in styles}) == 4


def find_line(ax, label):
    (line,) = (line for line in ax.lines if line.get_label().startswith(label))
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_criteria_of_a_site(guide, result):
    ax = bmr.plot_criteria(result, "b")
    loc, scale = (torch.tensor(part) for part in find_line(ax, "ΔF"))
    zero = torch.zeros(())
    delta_f = Normal(0.0, PRIOR_SCALES["b"]).log_prob(zero) - Normal(loc, scale).log_prob(zero)
    torch.testing.assert_close(delta_f, torch.zeros_like(delta_f), atol=1e-5, rtol=0)
    mask, mean = result.masks["b"], guide.median()["b"]
    for label, chosen in (("pruned", ~mask), ("kept", mask)):
        torch.testing.assert_close(
            torch.tensor(find_line(ax, label)[0]), mean[chosen].double(), check_dtype=True
        )
    ratio = mean.abs() / guide.scales.b
    loc, scale = find_line(ax, "SNR")
    slope = np.nanmax(np.abs(loc) / scale)
    assert int((ratio < slope).sum()) == int((~mask).sum()) > 0
    loc, scale = find_line(ax, "SPR")
    np.testing.assert_allclose(np.abs(loc) + scale, np.max(scale))
    assert int((mean.abs() + guide.scales.b < np.max(scale)).sum()) == int((~mask).sum())


def test_criteria_of_many_elements():
    """Every pruned element is in a cell, every one that is kept a point."""
    guide = AutoNormal(
        lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([400]).to_event(1)),
        init_loc_fn=init_to_value(values={"w": torch.linspace(-1.0, 1.0, 400)}),
        init_scale=0.3,
    )
    guide()
    result = bmr.reduce(guide)
    ax = bmr.plot_criteria(result)
    pruned = int((~result.masks["w"]).sum())
    assert ax.collections[0].get_array().sum() == pruned > 150
    assert len(find_line(ax, "kept")[0]) == 400 - pruned
    table = bmr.plots.data(ax)
    assert (table["kept"] == result.masks["w"].numpy()).all() and set(table["site"]) == {"w"}
    np.testing.assert_allclose(table["mean"], np.linspace(-1, 1, 400), rtol=1e-5)


def test_criteria_in_units_of_the_prior(guide, result):
    """One line separates the elements of priors that differ, which have no SPR in common."""
    ax = bmr.plot_criteria(result)
    assert "σ₀" in ax.get_xlabel()
    assert not any(line.get_label().startswith("SPR") for line in ax.lines)
    x, y = find_line(ax, "pruned")
    assert len(x) == sum(int((~mask).sum()) for mask in result.masks.values())
    assert (np.log(y) + 0.5 * (x / y) ** 2 <= 0).all()
    x, y = find_line(ax, "kept")
    assert (np.log(y) + 0.5 * (x / y) ** 2 > 0).all()


def integral(ax, label):
    x, y = find_line(ax, label)
    return np.trapezoid(y, x)


def test_an_element(guide, result):
    index = int((~result.masks["b"]).nonzero()[0])
    ax = bmr.plot_element(result, "b", index)
    assert integral(ax, "prior p") == pytest.approx(1, abs=1e-3)
    assert integral(ax, "posterior q") == pytest.approx(1, abs=1e-3)
    p, q = (find_line(ax, label)[1].item() for label in ("p(0)", "q(0)"))
    assert np.log(p) - np.log(q) == pytest.approx(float(result.scores["b"][index]), abs=1e-4)
    for label, height in (("prior p", p), ("posterior q", q)):
        x, y = find_line(ax, label)
        assert y[x == 0].item() == pytest.approx(height)
    assert "pruned" in ax.get_title(loc="left")
    kept = tuple(result.masks["w1"].nonzero()[0].tolist())
    assert "kept" in bmr.plot_element(result, "w1", kept).get_title(loc="left")


def test_an_element_of_a_prior_that_is_not_gaussian():
    guide = AutoNormal(
        lambda: pyro.sample("w", dist.Laplace(0.0, torch.tensor([1.0, 2.0])).to_event(1))
    )
    guide()
    ax = bmr.plot_element(bmr.reduce(guide), "w", 1)
    x, y = find_line(ax, "prior p")
    np.testing.assert_allclose(y, np.exp(-np.abs(x) / 2) / 4, rtol=1e-4)


def test_an_element_that_shrinks(guide):
    result = bmr.reduce(guide, sites="w1", reduced_prior=bmr.Gaussian(0.0, 0.2))
    index = tuple((~result.masks["w1"]).nonzero()[0].tolist())
    ax = bmr.plot_element(result, "w1", index)
    x, q = find_line(ax, "posterior q")
    _, prior = find_line(ax, "prior p")
    _, reduced = find_line(ax, "reduced prior")
    product = q * reduced / prior
    np.testing.assert_allclose(
        find_line(ax, "reduced posterior")[1], product / np.trapezoid(product, x), atol=1e-3
    )


def test_elements_that_are_not_there(guide, result):
    for index in (5, (1, 2), -6):
        with pytest.raises(ValueError, match=r"for the site 'b' of shape \(5,\). Expected 1 int"):
            bmr.plot_element(result, "b", index)
    with pytest.raises(ValueError, match="site 'precision' was left whole"):
        bmr.plot_element(result, "precision")
    gone = int((~result.masks["b"]).nonzero()[0])
    with pytest.raises(ValueError, match="pruned before. Expected one that was not"):
        bmr.plot_element(bmr.reduce(result.guide), "b", gone)
    assert not plt.get_fignums()


def test_weights(guide, result):
    before, after = bmr.plot_weights(result, "w1", labels=["a", "b", "c"])
    mean, mask = guide.median()["w1"], result.masks["w1"]
    order = mask.sum(1).argsort(descending=True, stable=True)
    shown = [ax.images[0].get_array() for ax in (before, after)]
    np.testing.assert_allclose(shown[0], mean[order].T, rtol=1e-6)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown[1]), ~mask[order].T.numpy())
    np.testing.assert_allclose(shown[1].compressed(), mean[order].T[mask[order].T], rtol=1e-6)
    limit = float(mean.abs().max())
    assert all(ax.images[0].get_clim() == pytest.approx((-limit, limit)) for ax in (before, after))
    assert [label.get_text() for label in after.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in after.get_xticklabels()] == [
        str(i) for i in order.tolist()
    ]
    assert "index along the first axis, sorted by weights kept" in after.get_xlabel()


def test_weights_along_one_axis_keep_its_order(guide):
    mask = torch.tensor([False, True, False, True, True])
    result = bmr.reduce(guide, select=lambda _: {"b": mask})
    before, after = bmr.plot_weights(result, "b")
    np.testing.assert_allclose(before.images[0].get_array()[0], guide.median()["b"], rtol=1e-6)
    np.testing.assert_array_equal(np.ma.getmaskarray(after.images[0].get_array())[0], ~mask)
    assert after.get_xlabel() == "index"
    assert [label.get_text() for label in after.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    _, after = bmr.plot_weights(result, "b", labels=list("abcde"))
    assert [label.get_text() for label in after.get_xticklabels()] == list("abcde")
    with pytest.raises(
        ValueError, match="got 1 labels for the site 'b' .* one per entry of its only"
    ):
        bmr.plot_weights(result, "b", labels=["a"])


def test_weights_of_many_units_say_their_indices_and_what_a_dash_is():
    guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([40, 3]).to_event(2)))
    guide()
    guide.locs.w = torch.linspace(-1, 1, 120).reshape(40, 3)
    mask = torch.ones(40, 3, dtype=torch.bool)
    mask[:20] = False
    before, after = bmr.plot_weights(bmr.reduce(guide, select=lambda _: {"w": mask}))
    after.figure.canvas.draw()
    ticks = {int(at): after.xaxis.get_major_formatter()(at) for at in (0, 19, 20, 39)}
    assert ticks == {0: "20", 19: "39", 20: "0", 39: "19"}
    assert after.figure.axes[-1].get_ylabel() == "posterior mean; a white dash: negative"
    guide.locs.w = torch.linspace(0, 1, 120).reshape(40, 3)
    before, _ = bmr.plot_weights(bmr.reduce(guide))
    assert before.figure.axes[-1].get_ylabel() == "posterior mean"


def test_weights_that_nothing_reads(guide):
    masks = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    masks["w2"][0, [1, 3]] = False
    result = bmr.reduce(guide, select=lambda scores: masks)
    before, _ = bmr.plot_weights(result, "w1", reader="w2")
    assert before.lines[0].get_xdata()[0] == 2.5
    np.testing.assert_allclose(
        before.images[0].get_array()[:, 3:], guide.median()["w1"][[1, 3]].T, rtol=1e-6
    )
    with pytest.raises(ValueError, match="second axis has the 5 units"):
        bmr.plot_weights(result, "w1", reader="b")
    with pytest.raises(ValueError, match="got 2 labels for the site 'w1'"):
        bmr.plot_weights(result, "w1", labels=["a", "b"])


def test_weights_of_other_shapes(result):
    assert bmr.plot_weights(result, "b")[1].images[0].get_array().shape == (1, 5)
    guide = AutoNormal(
        lambda: pyro.sample("conv", dist.Normal(0.0, 1.0).expand([4, 3, 2, 2]).to_event(4))
    )
    guide()
    for ax in bmr.plot_weights(bmr.reduce(guide)):
        assert ax.images[0].get_array().shape == (4, 12)


def test_a_network(result):
    before, after = bmr.plot_network(result, ["w1", "w2"], labels=["a", "b", "c"])
    read = result.masks["w2"].any(0)
    for ax, lines in (
        (before, [15, 5]),
        (after, [int(result.masks["w1"][read].sum()), int(result.masks["w2"].sum())]),
    ):
        assert [len(edges.get_segments()) for edges in ax.collections[:2]] == lines
    table = bmr.plots.data(after)
    assert len(table) == 20
    assert table.groupby("site").kept.sum().to_dict() == {
        name: int(result.masks[name].sum()) for name in ("w1", "w2")
    }
    with pytest.raises(ValueError, match="the outputs of one the inputs of the next"):
        bmr.plot_network(result, ["w2", "w1"])
    with pytest.raises(ValueError, match="got 2 labels. Expected 3"):
        bmr.plot_network(result, ["w1", "w2"], labels=["a", "b"])


def chain(shapes, masks):
    """A reduction of a chain of layers by given masks."""

    def model():
        for name, shape in shapes.items():
            pyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(2))

    guide = AutoNormal(model)
    guide()
    return bmr.reduce(guide, select=lambda scores: masks)


def ends_of_lines(ax):
    return {tuple(point) for part in ax.collections[:2] for s in part.get_segments() for point in s}


def test_only_units_that_live_are_drawn():
    """No line ends beside a unit; neither what nothing reads nor an input of only that is there."""
    masks = {"w1": torch.tensor([[True, False], [True, True]]), "w2": torch.tensor([[True, False]])}
    _, after = bmr.plot_network(
        chain({"w1": (2, 2), "w2": (1, 2)}, masks), labels=["read", "unread"]
    )
    dots = {tuple(point) for part in after.collections[2:] for point in part.get_offsets()}
    assert len(dots) == 3 and ends_of_lines(after) == dots
    assert [len(part.get_segments()) for part in after.collections[:2]] == [1, 1]
    texts = [text.get_text() for text in after.texts]
    assert texts == ["read", "1 of 2 inputs\nnot unread", "1 of 2 units", "1 output"]


def test_of_a_large_layer_the_largest_units_are_drawn():
    masks = {n: torch.ones(s, dtype=torch.bool) for n, s in (("w1", (50, 3)), ("w2", (1, 50)))}
    before, after = bmr.plot_network(chain({"w1": (50, 3), "w2": (1, 50)}, masks))
    for ax in (before, after):
        assert [len(part.get_segments()) for part in ax.collections[:2]] == [60, 20]
        assert ax.texts[1].get_text() == "50 units\n+ 30 not drawn"


def count_crossings_by_pairs(mask, order):
    """By looking at every pair of lines."""
    place = [{unit: i for i, unit in enumerate(one)} for one in order]
    lines = [(place[1][out], place[0][source]) for out, source in zip(*mask.nonzero(), strict=True)]
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in itertools.combinations(lines, 2))


def test_units_are_ordered_so_that_lines_cross_little():
    generator = np.random.default_rng(0)
    fewer = []
    for _ in range(20):
        masks = [generator.random((6, 8)) < 0.3, generator.random((3, 6)) < 0.5]
        natural = [np.arange(8), np.arange(6), np.arange(3)]
        order = order_units(masks)
        for place in (0, 1):
            expected = count_crossings_by_pairs(masks[place], order[place : place + 2])
            assert count_crossings([masks[place]], order[place : place + 2]) == expected
        before, after = (count_crossings(masks, one) for one in (natural, order))
        assert all(sorted(one) == list(range(len(one))) for one in order) and after <= before
        fewer.append(after / max(before, 1))
    assert np.mean(fewer) < 0.4
    # A tree can be drawn without a crossing.
    tree = np.zeros((4, 12), dtype=bool)
    tree[generator.permutation(np.arange(12) % 4), np.arange(12)] = True
    assert count_crossings([tree], order_units([tree])) == 0


def test_sparsities_in_a_figure():
    ax = bmr.plot_sparsities(SPARSITIES)
    rows = sorted([*POINTS, SPARSITIES.stop], key=lambda row: row.sparsity)
    x, y = find_line(ax, "predicted")
    assert x.tolist() == [100 * row.sparsity for row in rows]
    assert y.tolist() == [row.predicted for row in rows]
    (bars,) = ax.containers
    assert bars.lines[0].get_ydata().tolist() == [row.realised for row in rows]
    x, y = find_line(ax, "where the evidence stops")
    assert (x.item(), y.item()) == (80.0, -50.0)
    # What pruning gains fills a good part of the axis.
    low, high = ax.transData.transform([(0, -50.0), (0, 0.0)])[:, 1]
    assert high - low > 0.15 * ax.bbox.height
    with pytest.raises(ValueError, match="without points"):
        bmr.plot_sparsities(replace(SPARSITIES, points=()))


@pytest.mark.parametrize("size", [1e-6, 1e9])
def test_sparsities_of_any_size(size):
    points = tuple(Sparsity(s, size * d, size * d, 0.0) for s, d in ((0.0, 0.0), (1.0, 3.0)))
    for stop in (0.0, -1.0, -1e-9):
        at = Sparsity(0.5, stop * size, stop * size, 0.0)
        low, high = bmr.plot_sparsities(bmr.types.Sparsities(points, at, 1.0, 0.1)).get_ylim()
        assert low <= min(0.0, stop * size) < 3 * size <= high


class Line(ExactRegression):
    def model(self):
        w = pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("data", len(self.x)):
            pyro.sample("y", dist.Normal(self.x @ w, self.noise), obs=self.y)


def test_sparsities_of_an_exact_posterior():
    """There ΔF is that of the evidence, and every single draw of F is exact."""
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(40, 6)
        y = x @ torch.tensor([1.0, 0.5, 0.05, 0.0, 0.0, 0.0]) + 0.3 * torch.randn(40)
        guide = Line(x, y, 0.3, torch.zeros(6), torch.ones(6)).dense()
        state = torch.get_rng_state()
        found = bmr.measure_sparsities(guide, num_points=5, num_samples=2)
        assert torch.equal(torch.get_rng_state(), state)
        result = bmr.reduce(guide)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.stop.sparsity, found.stop.predicted) == (result.sparsity, result.delta_f)
    table = found.summary()
    assert table.sparsity.is_monotonic_increasing and table.sparsity.iloc[-1] == 1.0
    assert table.stop.sum() == 1 and 0 < found.stop.sparsity < 1
    np.testing.assert_allclose(table.realised, table.predicted, rtol=1e-6, atol=1e-6)
    assert table.predicted.min() == pytest.approx(found.stop.predicted)
    with pytest.raises(ValueError, match="num_points=1. Expected 2 or more"):
        bmr.measure_sparsities(guide, num_points=1)


def test_rounds(result):
    energies, changes = bmr.plot_rounds(replace(result, rounds=ROUNDS))
    assert energies.containers[0].lines[0].get_ydata().tolist() == [450.0, 50.0, 0.0, 10.0]
    x, y = find_line(energies, "kept")
    assert (x.item(), y.item()) == (2, 0.0)
    assert "F = 450.0 nats" in energies.get_legend_handles_labels()[1][0]
    assert bmr.plots.data(changes).free_energy.tolist() == [900.0, 500.0, 450.0, 460.0]
    assert find_line(changes, "predicted")[1].tolist() == [-200.0, -3.0, -0.3]
    assert changes.containers[0].lines[0].get_ydata().tolist() == [-190.0, 5.0, 0.5]
    bmr.plot_rounds(replace(result, rounds=ROUNDS[2:3]))[0].figure.draw_without_rendering()
    with pytest.raises(TypeError, match="Expected what pyro_bmr.prune"):
        bmr.plot_rounds(ROUNDS)
    with pytest.raises(ValueError, match="without rounds"):
        bmr.plot_rounds(result)


def test_predictions():
    model, guide, x = line_pair()
    full = (model, guide)
    shuffled = x[torch.randperm(len(x))]
    ax = bmr.plot_predictions({"full": full}, shuffled, num_samples=4000, data=(x, 2 * x))
    np.testing.assert_array_equal(find_line(ax, "full")[0], x)
    np.testing.assert_allclose(find_line(ax, "full")[1], 2 * x, atol=0.05)
    # 90 % of the mean, and 90 % of the data.
    band = ax.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 3.0][:, 1]
    np.testing.assert_allclose([at_end.min(), at_end.max()], [6 - 0.987, 6 + 0.987], atol=0.1)
    edges = [line.get_ydata()[-1] for line in ax.lines if line.get_linewidth() < 1]
    spread = 1.645 * (0.25 + 0.36) ** 0.5
    np.testing.assert_allclose(edges, [6 - spread, 6 + spread], atol=0.15)
    result = bmr.reduce(guide, x, x)
    with_targets = bmr.plot_predictions({"full": full, "reduced": result}, x, x, num_samples=20)
    assert with_targets.get_legend_handles_labels()[1] == ["full", "reduced"]
    rows = bmr.plot_predictions({"full": full}, torch.stack([x, x], -1)[:, :1], num_samples=20)
    assert rows.get_xlabel() == "input"


def test_predictions_that_cannot_be_drawn():
    model, guide, x = line_pair()
    pairs = {"full": (model, guide)}
    with pytest.raises(ValueError, match="got no models"):
        bmr.plot_predictions({}, x)
    with pytest.raises(TypeError, match="got a tuple. Expected a pair"):
        bmr.plot_predictions((None, None), x)
    with pytest.raises(TypeError, match="got an int as 'full'. Expected a pair"):
        bmr.plot_predictions({"full": 3}, x)
    with pytest.raises(ValueError, match=r"site='z' for the model 'full'. Expected one of \['y'\]"):
        bmr.plot_predictions(pairs, x, site="z")
    with pytest.raises(ValueError, match="along= with 2 numbers. Expected 9"):
        bmr.plot_predictions(pairs, x, along=[1.0, 2.0])

    def classes(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        logits = torch.stack([slope * x, 0 * x], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    with pytest.raises(ValueError, match="no finite mean.*plot_reliability"):
        bmr.plot_predictions({"full": (classes, guide)}, x)
    assert not plt.get_fignums()


def test_reliability():
    ax = bmr.plot_reliability(SimpleNamespace(calibration=CALIBRATION))
    points = [part for part in ax.collections if len(part.get_offsets()) == 2]
    np.testing.assert_allclose(points[0].get_offsets(), [[0.5, 0.4], [0.9, 0.9]])
    areas = points[0].get_sizes() - 12
    assert areas[1] == pytest.approx(3 * areas[0])
    assert ax.get_legend_handles_labels()[1][0] == "full: ECE 2.5%\nof 40 predictions"
    # The scale beside it has areas by the same rule.
    shown = {
        part.get_label(): part.get_sizes().item()
        for part in ax.collections
        if part.get_label().isdigit()
    }
    assert {int(count): area for count, area in shown.items()} == {
        int(count): pytest.approx(12 + areas[1] * int(count) / 30) for count in shown
    }
    assert bmr.plots.data(ax)["count"].tolist() == [10, 30, 10, 30]
    with pytest.raises(TypeError, match="without calibration"):
        bmr.plot_reliability(CALIBRATION)
    for calibration in ({}, {"full": CALIBRATION["full"][:0]}):
        with pytest.raises(ValueError, match="no predictions to draw"):
            bmr.plot_reliability(SimpleNamespace(calibration=calibration))
    with pytest.raises(ValueError, match=r"has no column \['count'\]"):
        table = CALIBRATION["full"].drop(columns="count")
        bmr.plot_reliability(SimpleNamespace(calibration={"full": table}))


NEED_THE_POSTERIOR = {
    "criteria": bmr.plot_criteria,
    "weights": bmr.plot_weights,
    "network": lambda result: bmr.plot_network(result, ["w1", "w2"]),
    "element": lambda result: bmr.plot_element(result, "b", 0),
}


@pytest.mark.parametrize("name", NEED_THE_POSTERIOR)
def test_results_that_do_not_know_the_posterior(guide, result, name):
    draw = NEED_THE_POSTERIOR[name]
    with pytest.raises(ValueError, match="as one from a file.*reduce the full guide again"):
        draw(replace(result, decision=None))
    with pytest.raises(TypeError, match=r"got a tuple. Expected a Reduction. Pass what pyro_bmr"):
        draw((result.model, result.guide))
    with torch.no_grad():
        guide.locs.b += 1.0
    with pytest.raises(ValueError, match="trained on since"):
        draw(result)
    assert not plt.get_fignums()


def test_sites_that_are_not_there(guide, result):
    expected = r"site='nope'. Expected one of \['b', 'precision', 'w1', 'w2'\]"
    for draw in (bmr.plot_criteria, bmr.plot_weights, bmr.plot_element):
        with pytest.raises(ValueError, match=expected):
            draw(result, "nope")
    with pytest.raises(ValueError, match="'precision' was not reduced to spikes"):
        bmr.plot_criteria(result, "precision")
    everything = bmr.reduce(guide, select=bmr.top_k(0))
    with pytest.raises(ValueError, match="every element was pruned before"):
        bmr.plot_criteria(bmr.reduce(everything.guide))
    bmr.plot_weights(bmr.reduce(everything.guide), "w1")[0].figure.draw_without_rendering()


def compared(count=3, size=4, **given):
    """A posterior of independent elements, and models that lack the first ones."""
    names = [f"A({i},{i % 3})" for i in range(size)]
    mean = torch.linspace(-1.0, 1.0, size)
    q = bmr.Posterior(mean, scale=0.3, prior_scale=1.0, names=names)
    models = {f"no {i}": dict.fromkeys(names[:i], False) for i in range(count)}
    return bmr.compare_models(q, models, **given), mean.numpy()


def test_named_models():
    found, mean = compared(families={"some": ["no 1", "no 2"], "none": ["no 0"]})
    evidence, probability, moments, presence = bmr.plot_models(found)
    evidence.figure.draw_without_rendering()
    ends = [bar.get_x() + bar.get_width() for bar in evidence.patches]
    np.testing.assert_allclose(ends, -found.delta_f.numpy(), atol=1e-12)
    assert [t.get_text() for t in evidence.get_yticklabels()] == ["no 0", "no 1", "no 2"]
    widths = [bar.get_width() for bar in probability.patches]
    np.testing.assert_allclose(widths, found.probability)
    best = found.best_family["family"]
    assert f"best of family: {best} 0.9" in probability.get_xlabel()
    full = moments.containers[0]
    np.testing.assert_allclose(full.lines[0].get_xdata().astype(float), mean, rtol=1e-6)
    np.testing.assert_allclose(
        [segment[:, 0] for segment in full.lines[2][0].get_segments()],
        mean[:, None] + 1.644854 * 0.3 * np.array([-1, 1]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        find_line(moments, "average over models")[0], found.parameters()["mean"]
    )
    low, high = found.flatten(found.interval()).numpy()
    segments = moments.collections[-1].get_segments()
    np.testing.assert_allclose([s[:, 0] for s in segments], np.stack([low, high], 1))
    widths = [bar.get_width() for bar in presence.patches]
    np.testing.assert_allclose(widths, found.parameters()["presence"])
    one = bmr.plot_models(found, "no 1", mass=0.5)
    assert find_line(one[2], "no 1")[0][0] == 0.0
    np.testing.assert_allclose([bar.get_width() for bar in one[3].patches], [0, 1, 1, 1])
    _, axes = plt.subplots(2, 2)
    assert list(bmr.plot_models(found, axes=axes)) == list(axes.reshape(-1))
    with pytest.raises(ValueError, match="axes= with 2 axes. Expected four"):
        bmr.plot_models(found, axes=axes[0])
    with pytest.raises(ValueError, match="got 'no 9' in model. Expected a model"):
        bmr.plot_models(found, "no 9")
    with pytest.raises(TypeError, match="Expected what pyro_bmr.compare_models"):
        bmr.plot_models({"no 1": 0.5})


def test_a_model_that_is_impossible():
    ones = np.ones((2, 2))
    apart = bmr.Posterior([0.0, 1.0], 0.1 * ones, prior_mean=[0, 1], prior_covariance=ones)
    found = bmr.compare_models(apart, {"none": {"*": False}, "one": [False, True]})
    texts = [text.get_text() for text in bmr.plot_models(found)[0].texts]
    assert texts == ["◂ −∞", f"{-float(found.delta_f[1]):+.2f}"]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 43), (100, 120)])
def test_few_and_many_named_models(count, size):
    found, _ = compared(count, size)
    with plt.style.context("dark_background"):
        evidence, _, moments, _ = bmr.plot_models(found)
        evidence.figure.draw_without_rendering()
    rows, names = (len(ax.get_yticks()) for ax in (evidence, moments))
    assert (rows, names) == (min(count, 30), min(size, 60))
    if count == 100:
        assert evidence.get_title("left") == "log evidence, best 30 of 100 models"
        assert evidence.get_yticklabels()[0].get_text() == found.best
        assert moments.get_title("left") == "elements: 60 of 120"
    # No text runs into that of the row below.
    boxes = [t.get_window_extent() for t in moments.get_yticklabels() if t.get_text()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in zip(boxes, boxes[1:], strict=False))
