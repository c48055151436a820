"""Networks that are pruned behind the interface of scikit-learn."""

import pickle
import random

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import pyro_bmr as bmr
from pyro_bmr.sklearn import PrunedClassifier, PrunedRegressor
from pyro_bmr.sklearn.regressor import _quantile

RNG = np.random.default_rng(0)
NAMES = ["age", "dose", "weight", "height"]
X = pd.DataFrame(RNG.normal([50, 1, 70, 170], [10, 0.5, 12, 9], (120, 4)), columns=NAMES)
Y = 1000 + 30 * X["dose"] - X["age"] + 4 * RNG.normal(size=120)
WORDS = np.where(X["dose"] > 1, "high", "low")
LEVELS = np.digitize(X["age"], [45, 55])
QUICK = {"max_iter": 150, "learning_rate_init": 0.05, "random_state": 0}
LITTLE = {"max_iter": 3, "max_rounds": 0, "num_samples": 2, "random_state": 0}


@pytest.fixture(scope="module")
def linear():
    return PrunedRegressor((), **QUICK).fit(X, Y)


@pytest.fixture(scope="module")
def classifier():
    return PrunedClassifier((4,), **QUICK).fit(X, WORDS)


@pytest.mark.rare
def test_inputs_that_matter_are_named(linear, classifier):
    assert list(linear.feature_names_in_) == NAMES
    assert list(linear.selected_features_) == ["age", "dose"]
    assert list(linear.support_) == [True, True, False, False]
    assert list(classifier.selected_features_) == ["dose"]
    assert linear.result_.sparsity > 0


def test_an_input_is_used_if_a_chain_of_weights_leads_to_an_output(classifier):
    """Predictions change with an input in ``support_``, and with no other."""
    rows = X.iloc[:5]
    before = classifier.predict_proba(rows)
    for name, used in zip(NAMES, classifier.support_, strict=True):
        moved = rows.assign(**{name: rows[name] + X[name].std()})
        assert (np.abs(classifier.predict_proba(moved) - before).max() > 1e-6) == used


def test_a_linear_model_agrees_with_bayesian_ridge(linear):
    """Its predictive distribution is that of conjugate regression, but for the priors."""
    ridge = BayesianRidge().fit(X, Y)
    expected, centered = ridge.predict(X), np.asarray(X) - np.asarray(X).mean(0)
    # Written out, since scikit-learn before 1.9 returns twice as large a spread.
    precision = ridge.lambda_ * np.eye(X.shape[1]) + ridge.alpha_ * centered.T @ centered
    of_mean = (centered * np.linalg.solve(precision, centered.T).T).sum(1)
    spread = np.sqrt(1 / ridge.alpha_ + of_mean)
    mean, std = linear.predict(X, return_std=True)
    assert np.abs(mean - expected).max() < 0.4 * spread.mean()
    assert std == pytest.approx(spread, rel=0.08)
    assert np.array_equal(mean, linear.predict(X))


def test_intervals(linear):
    mean, std = linear.predict(X, return_std=True)
    ends = linear.predict_interval(X)
    assert ends == pytest.approx(norm(mean[:, None], std[:, None]).ppf([0.05, 0.95]), rel=1e-3)
    inside = (ends[:, 0] < Y) & (ends[:, 1] > Y)
    assert 0.8 < inside.mean() < 0.97
    half = linear.predict_interval(X, level=0.5)
    assert ((half[:, 0] > ends[:, 0]) & (half[:, 1] < ends[:, 1])).all()
    with pytest.raises(ValueError, match="got level=2. Expected a probability between 0 and 1"):
        linear.predict_interval(X, level=2)


def test_quantiles_of_a_mixture():
    """Of as many draws as make the quantile of a sample good to a percent."""
    means, scales = np.array([[-2.0], [1.0]]), np.array([[0.5], [2.0]])
    draws = means + scales * np.random.default_rng(1).normal(size=(2, 200_000))
    for level in (0.05, 0.5, 0.95):
        assert _quantile(means, scales, level) == pytest.approx(np.quantile(draws, level), abs=0.03)


def test_classes(classifier):
    assert list(classifier.classes_) == ["high", "low"]
    assert classifier.score(X, WORDS) > 0.9
    many = PrunedClassifier((4,), **QUICK).fit(X, LEVELS)
    probability = many.predict_proba(X)
    assert probability.shape == (120, 3)
    assert probability.sum(1) == pytest.approx(1)
    assert np.array_equal(many.predict(X), probability.argmax(1))
    assert many.score(X, LEVELS) > 0.8
    with pytest.raises(ValueError, match="got one class, a. Expected rows of two classes"):
        PrunedClassifier().fit(X, ["a"] * 120)


def test_random_state_governs_everything():
    """And generators, the param store and the default dtype of others are left alone."""
    pyro.param("mine", torch.ones(2))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = PrunedRegressor(3, **LITTLE).fit(X, Y)
    mean = first.predict(X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert list(pyro.get_param_store()) == ["mine"]
    torch.manual_seed(7)
    assert np.array_equal(PrunedRegressor(3, **LITTLE).fit(X, Y).predict(X), mean)
    other = PrunedRegressor(3, **{**LITTLE, "random_state": 1}).fit(X, Y)
    assert not np.array_equal(other.predict(X), mean)
    try:
        torch.set_default_dtype(torch.float64)
        assert np.array_equal(PrunedRegressor(3, **LITTLE).fit(X, Y).predict(X), mean)
    finally:
        torch.set_default_dtype(torch.float32)
    np.random.seed(5)
    unseeded = [PrunedRegressor(3, **{**LITTLE, "random_state": None}) for _ in range(2)]
    one, two = (model.fit(X, Y).predict(X) for model in unseeded)
    assert not np.array_equal(one, two)


def test_pickles(linear, classifier):
    for model in (linear, classifier):
        again = pickle.loads(pickle.dumps(model))
        assert np.array_equal(again.predict(X), model.predict(X))
        assert str(again.result_) == str(model.result_)
        assert list(again.selected_features_) == list(model.selected_features_)


def test_inside_a_pipeline():
    pipeline = make_pipeline(PolynomialFeatures(2, include_bias=False), PrunedRegressor(**LITTLE))
    pipeline.set_output(transform="pandas")
    assert len(cross_val_score(pipeline, X, Y, cv=2)) == 2
    pipeline.fit(X, Y)
    assert pipeline[-1].n_features_in_ == 14
    assert "dose^2" in pipeline[-1].feature_names_in_


def test_names_and_intervals_behind_a_scaler():
    """Which is not needed: the last step of a pipeline takes what the steps before it return."""
    plain = make_pipeline(StandardScaler(), PrunedRegressor((), **QUICK)).fit(X, Y)
    assert list(plain[-1].selected_features_) == ["x0", "x1"]
    assert list(plain[:-1].get_feature_names_out()[plain[-1].support_]) == ["age", "dose"]
    named = make_pipeline(StandardScaler(), PrunedRegressor((), **QUICK))
    named.set_output(transform="pandas").fit(X, Y)
    assert list(named[-1].selected_features_) == ["age", "dose"]
    mean, std = named.predict(X, return_std=True)
    ends = named[-1].predict_interval(named[:-1].transform(X))
    assert ends == pytest.approx(norm(mean[:, None], std[:, None]).ppf([0.05, 0.95]), rel=1e-3)


def test_a_result_takes_standardised_tensors(linear, classifier):
    """Free energies and audits of them are those of the training."""
    x, y = linear.to_tensors(X, Y)
    assert x.mean(0).numpy() == pytest.approx(0, abs=1e-5)
    assert float(y.std(correction=0)) == pytest.approx(1)
    found = linear.result_.audit(x, y, progress=False)
    assert found.total.realised == pytest.approx(linear.result_.realised, abs=1.0)
    few = linear.to_tensors(X.iloc[:3], Y.iloc[:3])
    assert torch.equal(few[0], x[:3])
    assert torch.equal(few[1], y[:3])
    x, y = classifier.to_tensors(X, WORDS)
    assert y.tolist() == list((WORDS == "low").astype(float))
    result = classifier.result_
    again, error = bmr.free_energy(result.model, result.guide, x, y)
    assert again == pytest.approx(result.free_energy, abs=5 * error)
    many = PrunedClassifier((), **LITTLE).fit(X, LEVELS)
    assert many.to_tensors(X, LEVELS)[1].tolist() == list(LEVELS)
    for bad in (X.drop(columns="age"), X.rename(columns={"age": "years"})):
        with pytest.raises(ValueError, match="feature"):
            linear.to_tensors(bad, Y)
    with pytest.raises(ValueError, match="previously unseen labels"):
        classifier.to_tensors(X, ["middle"] * 120)
    with pytest.raises(NotFittedError):
        PrunedRegressor().to_tensors(X, Y)


def test_figures_ask_for_the_result(linear):
    with pytest.raises(TypeError, match="got a PrunedRegressor.* that is its result_"):
        bmr.plot_network(linear)


@pytest.mark.rare
def test_inside_a_search():
    search = GridSearchCV(PrunedClassifier(**LITTLE), {"hidden_layer_sizes": [(), (2, 2)]}, cv=2)
    search.fit(X, LEVELS)
    assert search.best_params_["hidden_layer_sizes"] in [(), (2, 2)]
    assert len(cross_val_score(clone(search.best_estimator_), X, LEVELS, cv=2)) == 2


def test_figures_have_the_names_of_the_columns(classifier):
    before, _ = bmr.plot_network(classifier.result_)
    assert {text.get_text() for text in before.texts} >= set(NAMES)


def test_batches_of_many_rows():
    """All rows up to 1,000; of more, batches of about the same size."""
    sizes = {
        rows: PrunedRegressor()._read_options(rows, hidden=True)["batch_size"]
        for rows in (500, 1100, 9000)
    }
    assert sizes == {500: None, 1100: 275, 9000: 258}
    assert PrunedRegressor(batch_size=32)._read_options(20, hidden=True)["batch_size"] is None
    many = pd.concat([X] * 10)
    model = PrunedRegressor((), **LITTLE).fit(many, pd.concat([Y] * 10))
    assert len(model.loss_curve_) == model.n_iter_ == 3


BAD = {
    "hidden_layer_sizes": [-1, 2.5, "word", (5, 0), None],
    "activation": ["gelu", None],
    "prior_scale": [0.0, "word"],
    "batch_size": [0, "all", None],
    "learning_rate_init": [-1.0, "word"],
    "max_iter": [0, 2.5],
    "max_rounds": [-1, None],
    "num_samples": [0, "word"],
    "verbose": ["word"],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", [PrunedRegressor, PrunedClassifier])
def test_options_that_make_no_sense(kind, name):
    for bad in BAD[name]:
        with pytest.raises((TypeError, ValueError), match=f"{name}=.* Expected"):
            kind(**{**LITTLE, name: bad}).fit(X, WORDS if kind is PrunedClassifier else Y)
