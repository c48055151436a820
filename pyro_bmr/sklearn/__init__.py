"""Pruned networks with the interface of scikit-learn."""

from pyro_bmr.extras import import_extra

# Before the modules that import it: the error says how to install it.
import_extra("sklearn", "scikit-learn", "sklearn", "PrunedRegressor and PrunedClassifier")

from pyro_bmr.sklearn.classifier import PrunedClassifier  # noqa: E402
from pyro_bmr.sklearn.regressor import PrunedRegressor  # noqa: E402

__all__ = ["PrunedClassifier", "PrunedRegressor"]
