"""Comparisons, against numbers that others compute."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, mean_squared_error
from torch.distributions import MultivariateNormal, Normal

import pyro_bmr as bmr
from pyro_bmr.diagnostics.calibration import bin_confidences, calibration_error
from pyro_bmr.diagnostics.comparison import Comparison
from pyro_bmr.diagnostics.drawn_sites import find_counted
from pyro_bmr.diagnostics.draws import Draws, Observed
from pyro_bmr.diagnostics.elpd import LeaveOneOut, leave_one_out
from pyro_bmr.diagnostics.scores import Score, score_draws


class Line(ExactRegression):
    """A model that is called with its data, and the exact posterior of its guide."""

    def __init__(self, columns=3, rows=40):
        torch.manual_seed(0)
        x = torch.randn(rows, columns).double()
        y = x[:, 0] + 0.5 * torch.randn(rows)
        super().__init__(x, y, 0.5, torch.zeros(columns).double(), torch.ones(columns).double())

    def model(self, x=None, y=None):
        w = pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        x, y = (self.x, self.y) if x is None else (x, y)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, self.noise), obs=y)

    def predictive(self, x, rows=slice(None)):
        """Mean and scale of new data, given some rows of the old ones."""
        precision = self.x[rows].mT @ self.x[rows] / self.noise**2 + torch.eye(x.shape[-1])
        covariance = precision.inverse()
        mean = x @ covariance @ self.x[rows].mT @ self.y[rows] / self.noise**2
        return Normal(mean, ((x @ covariance * x).sum(-1) + self.noise**2).sqrt())

    def evidence(self):
        covariance = self.noise**2 * torch.eye(len(self.x)) + self.x @ self.x.mT
        return MultivariateNormal(torch.zeros(len(self.x)).double(), covariance)

    def divergence(self):
        posterior = MultivariateNormal(*self.posterior())
        prior = MultivariateNormal(self.loc, torch.eye(len(self.loc)).double())
        return torch.distributions.kl_divergence(posterior, prior).item()


@pytest.fixture(scope="module")
def line():
    pyro.clear_param_store()
    line = Line()
    guide = line.dense()
    x = torch.randn(200, 3).double()
    test = x, x[:, 0] + 0.5 * torch.randn(200)
    result = bmr.reduce(guide, select=bmr.top_k(1))
    pairs = {"full": (line.model, guide), "reduced": result}
    random = torch.get_rng_state()
    comparison = bmr.compare(pairs, line.x, line.y, num_samples=1000, test=test)
    assert torch.equal(torch.get_rng_state(), random)
    return line, test, result, comparison


def test_exact_regression(line):
    line, (x, y), result, comparison = line
    full = comparison.scores["full"]
    assert full["free_energy"].value == pytest.approx(-line.evidence().log_prob(line.y).item())
    assert full["free_energy"].error < 1e-6
    complexity = full["complexity"]
    assert abs(complexity.value - line.divergence()) < 4 * complexity.error < 1
    split = complexity.value - full["accuracy"].value
    assert full["free_energy"].value == pytest.approx(split)
    held = [
        line.predictive(line.x[i : i + 1], torch.arange(40) != i).log_prob(line.y[i : i + 1])
        for i in range(40)
    ]
    loo = torch.cat(held)
    assert full["elpd_loo"].value == pytest.approx(loo.sum().item(), abs=0.1)
    assert full["elpd_loo"].error == pytest.approx(40**0.5 * loo.std().item(), rel=0.05)
    predictive = line.predictive(x)
    density = predictive.log_prob(y)
    assert full["log_likelihood"].value == pytest.approx(density.mean().item(), abs=0.01)
    assert full["log_likelihood"].error == pytest.approx(density.std().item() / 200**0.5, rel=0.05)
    root = mean_squared_error(y, predictive.mean) ** 0.5
    assert full["rmse"].value == pytest.approx(root, rel=0.01)
    # The delta method, against a bootstrap.
    square = (y - predictive.mean).square()
    again = square[torch.randint(200, (2000, 200))].mean(-1).sqrt()
    assert full["rmse"].error == pytest.approx(again.std().item(), rel=0.1)
    # A difference of free energies that is exact has no error.
    change = comparison.differences().loc["reduced"]
    assert change["free_energy"] == pytest.approx(result.delta_f)
    assert change["free_energy_error"] < 1e-6


def test_tables(line):
    comparison = line[3]
    frame = comparison.summary()
    assert list(frame.index) == ["full", "reduced"]
    assert (frame["bad_k"] == 0).all() and not frame.isna().any().any()
    assert {"rmse", "rmse_error", "elpd_loo_error"} < set(frame) and not comparison.calibration
    text = str(comparison)
    assert "predictions of test data" in text and "difference from full" in text
    assert max(map(len, text.splitlines())) <= 100
    assert comparison._repr_html_().count("<table") == 2


@pytest.mark.parametrize("classes", [2, 4])
def test_classes(classes):
    x = torch.randn(300, 3)
    y = (x @ torch.randn(3, classes) + torch.randn(300, classes)).argmax(-1)
    y = y.float() if classes == 2 else y

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, classes]).to_event(2))
        with pyro.plate("data", len(x)):
            logits = x @ w
            two = dist.Bernoulli(logits=logits[:, 1] - logits[:, 0])
            pyro.sample("y", two if classes == 2 else dist.Categorical(logits=logits), obs=y)

    value = torch.randn(3, classes)
    sure = AutoDelta(model, init_loc_fn=init_to_value(values={"w": value}))
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": value}), init_scale=1e-5)
    for one in (sure, guide):
        one(x, y)
    comparison = bmr.compare({"a": (model, guide)}, x, y, num_samples=5, loo=False)
    scores = comparison.scores["a"]
    chances = (x @ value).softmax(-1)
    labels = list(range(classes))
    if classes == 2:
        brier = brier_score_loss(y, chances[:, 1])
    else:
        # Not all versions of scikit-learn know more than two classes.
        brier = (chances - torch.eye(classes)[y]).square().sum(-1).mean().item()
    right = accuracy_score(y, chances.argmax(-1))
    expected = {"correct": right, "nll": log_loss(y, chances, labels=labels), "brier": brier}
    for name, number in expected.items():
        assert scores[name].value == pytest.approx(number, rel=1e-3)
    assert scores["correct"].error == pytest.approx((right * (1 - right) / 299) ** 0.5)
    assert scores["log_likelihood"].value == pytest.approx(-scores["nll"].value)
    assert "rmse" not in scores and "predictions of training data" in str(comparison)
    bins = comparison.calibration["a"]
    gap = (bins["accuracy"] - bins["confidence"]).abs() * bins["count"]
    assert scores["ece"].value == pytest.approx(gap.sum() / 300)
    assert bins["count"].sum() == 300 and len(bins) == 15


def test_calibration_by_hand():
    chances = torch.tensor([[0.55, 0.45], [0.95, 0.05], [1.0, 0.0], [0.08, 0.92]])
    classes = torch.tensor([1, 0, 0, 0])
    bins = bin_confidences(chances, classes, num_bins=10)
    assert bins["count"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert bins["accuracy"].tolist()[-1] == pytest.approx(2 / 3)
    assert bins["confidence"].tolist()[-1] == pytest.approx((0.95 + 1.0 + 0.92) / 3)
    error = calibration_error(chances, classes, num_bins=10)
    assert error.item() == pytest.approx((0.55 + abs(0.95 + 1.0 + 0.92 - 2)) / 4)


def test_bootstrap_of_the_calibration_error():
    """Against resamples of the whole experiment."""
    torch.manual_seed(0)
    chance = torch.rand(200, 1000) * 0.5 + 0.5
    chances = torch.stack([chance, 1 - chance], -1)
    # Too sure by a fifth, so that the error is far from 0, where it is skewed.
    classes = (torch.rand(200, 1000) > chance - 0.2).long()
    many = [calibration_error(c, y)[0] for c, y in zip(chances, classes, strict=True)]
    resampled = calibration_error(chances[0], classes[0], resamples=200)[1:]
    assert resampled.std().item() == pytest.approx(torch.stack(many).std().item(), rel=0.3)


def test_what_cannot_be_compared(line):
    line, (x, y), result, _ = line
    pairs = {"full": result, "other": result}
    options = {"num_samples": 5, "loo": False}
    with pytest.raises(TypeError, match="got a PrunedGuide as 'guide'"):
        bmr.compare({"guide": result.guide}, x, y)
    with pytest.raises(ValueError, match="got no models"):
        bmr.compare({}, x, y)
    with pytest.raises(TypeError, match="got a method. Expected a pair"):
        bmr.compare(line.model, x, y)
    with pytest.raises(TypeError, match="got 3 arguments"):
        bmr.compare(pairs, x, y, x)
    with pytest.raises(TypeError, match="test= does not fit: .* pass by position"):
        bmr.compare(pairs, test=(x, y), kwargs={"x": x, "y": y})
    with pytest.raises(TypeError, match="to_arviz got a Reduction and a Tensor. Expected a model"):
        bmr.to_arviz(result, x, y)
    with pytest.raises(ValueError, match="observes nothing .* pass the targets too"):
        bmr.compare(pairs, x, **options)
    with pytest.raises(ValueError, match="NaN or infinite"):
        bmr.compare(pairs, x, torch.where(y > 1, y, torch.nan), **options)

    def another(name, scale):
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(line.loc, line.scale).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample(name, dist.Normal(x @ w, 1.0), obs=scale * y)

        guide = AutoMultivariateNormal(model)
        guide(x, y)
        return model, guide

    with pytest.raises(ValueError, match=r"'other' observes \['z'\], and 'full' \['y'\]"):
        bmr.compare(pairs | {"other": another("z", 1.0)}, x, y, **options)
    with pytest.raises(ValueError, match="observe different values at 'y'"):
        bmr.compare(pairs | {"other": another("y", 2.0)}, x, y, **options)


@pytest.mark.parametrize("how", ["handler", "distribution", "obs_mask"])
def test_masked_data_are_not_scored(how):
    """Against the same model of what is left."""
    torch.manual_seed(0)
    x = torch.randn(30, 2)
    y, mask = x[:, 0] + 0.3 * torch.randn(30), torch.arange(30) < 20
    hidden = torch.where(mask, y, 100.0 if how == "obs_mask" else torch.nan)

    def model(x, y=None, mask=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        fn, options = dist.Normal(x @ w, 0.3, validate_args=False), {}
        if mask is not None and how == "distribution":
            fn = fn.mask(mask)
        if mask is not None and how == "obs_mask":
            options = {"obs_mask": mask}
        on = torch.tensor(True) if mask is None or how != "handler" else mask
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=on):
            pyro.sample("y", fn, obs=y, **options)

    values = {"w": torch.tensor([1.0, 0.1])}
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.01)
    guide(x[mask], y[mask])

    def score(guide, *args):
        return bmr.compare({"a": (model, guide)}, *args, num_samples=25).scores["a"]

    expected = score(guide, x[mask], y[mask])
    if how == "obs_mask":
        # Its guide holds the masked data too.
        guide = AutoNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.01)
        pyro.clear_param_store()
        guide(x, hidden, mask)
    found = score(guide, x, hidden, mask)
    tolerance = 0.02 if how == "obs_mask" else 1e-4
    for name in ("elpd_loo", "log_likelihood", "rmse"):
        assert found[name].value == pytest.approx(expected[name].value, rel=tolerance)
        assert found[name].error == pytest.approx(expected[name].error, rel=tolerance)


def test_masks_within_events():
    normal = dist.Normal(torch.zeros(3, 2), 1.0)
    mask, rows = torch.tensor([True, False]), torch.tensor([True, True, False])
    counted = find_counted(normal.mask(mask).to_event(1), rows)
    assert torch.equal(counted, rows[:, None] & mask)
    data = torch.tensor([[1.0, 9.0]]).expand(3, 2)
    site = Observed(data, torch.zeros(2, 3), torch.zeros(2, 3, 2), None, torch.zeros(()), counted)
    assert score_draws(Draws({}, {"y": site}))[0]["rmse"].value == 1


def test_scores_that_only_one_model_has():
    one, other = (Score.mean(torch.tensor([1.0, shift])) for shift in (2.0, 3.0))
    scores = {"cauchy": {"log_likelihood": one}, "normal": {"log_likelihood": other, "rmse": one}}
    comparison = Comparison(scores, "test")
    assert list(comparison.differences()) == ["log_likelihood", "log_likelihood_error"]
    assert "RMSE" in str(comparison)


def test_notes_tell_few_draws_from_bad_ones():
    terms = torch.zeros(9)
    assert LeaveOneOut(terms, 0, 0).note is None
    assert "above 0.7 for 3 of 9" in LeaveOneOut(terms, 3, 3).note
    few = LeaveOneOut(terms, 3, 0).note
    assert few.startswith("too few draws for elpd_loo at 3 of 9") and "num_samples=2200" in few
    assert "above 0.7 for 1 of 9 data; for 2 there are" in LeaveOneOut(terms, 3, 1).note
    torch.manual_seed(0)
    # Weights of Pareto k = 0.6: too much for 100 draws, but not for 4000.
    found = [leave_one_out(0.6 * torch.rand(n, 60).log()) for n in (100, 4000)]
    assert found[0].bad > found[0].high + 5 and found[1].bad == found[1].high < 20
    with pytest.raises(ValueError, match="got 24 draws for elpd_loo. Expected 25 or more"):
        leave_one_out(torch.zeros(24, 3))
