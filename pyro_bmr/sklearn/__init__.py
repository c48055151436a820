"""Pruned networks with the interface of scikit-learn."""

from pyro_bmr.sklearn.classifier import PrunedClassifier
from pyro_bmr.sklearn.regressor import PrunedRegressor

__all__ = ["PrunedClassifier", "PrunedRegressor"]
