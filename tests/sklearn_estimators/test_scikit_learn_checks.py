"""Scikit-learn's own checks of an estimator; none of them is expected to fail."""

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

from pyro_bmr.sklearn import PrunedClassifier, PrunedRegressor

TYPES = [PrunedRegressor, PrunedClassifier]
LITTLE = {"hidden_layer_sizes": 5, "max_iter": 2, "max_rounds": 0, "num_samples": 2}
# As much training as the checks of scores ask for.
ENOUGH = {"hidden_layer_sizes": 5, "max_iter": 100, "learning_rate_init": 0.1, "num_samples": 20}


@pytest.mark.parametrize(
    ("estimator", "check"),
    [pair for one in TYPES for pair in estimator_checks_generator(one(**LITTLE), legacy=False)],
    ids=lambda part: getattr(getattr(part, "func", None), "__name__", type(part).__name__),
)
def test_checks_of_the_interface(estimator, check):
    check(estimator)


@pytest.mark.rare
@parametrize_with_checks([one(**ENOUGH) for one in TYPES], expected_failed_checks=lambda _: {})
def test_all_checks(estimator, check):
    check(estimator)
