"""Scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_bmr.sklearn import PrunedClassifier, PrunedRegressor

# What is checked is the interface: little training is enough for the scores that are asked for.
LITTLE = {"hidden_layer_sizes": 5, "max_iter": 40, "learning_rate_init": 0.1, "num_samples": 20}
TYPES = [PrunedRegressor, PrunedClassifier]


@parametrize_with_checks([one(**LITTLE, max_rounds=0) for one in TYPES])
def test_trained_alone(estimator, check):
    check(estimator)


@pytest.mark.rare
@parametrize_with_checks([one(**LITTLE) for one in TYPES])
def test_pruned(estimator, check):
    check(estimator)
