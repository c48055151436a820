"""`PrunedClassifier`."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

from pyro_bmr.sklearn.estimator import PrunedNetwork
from pyro_bmr.sklearn.networks import BinaryClassification, Classification


class PrunedClassifier(ClassifierMixin, PrunedNetwork):
    r"""A Bayesian network for classification, pruned by its free energy.

    .. math:: y \sim \text{Categorical}(\text{softmax} f_w(x)), \qquad
              w \sim N(0, \text{scale}^2 / \text{fan-in})

    of standardised inputs; of two classes, the network has one output, the logit of the second. All
    else is as in `PrunedRegressor`.

    Parameters
    ----------
    hidden_layer_sizes, activation, prior_scale
        As of `PrunedRegressor`.
    batch_size, learning_rate_init, max_iter, max_rounds
        As of `PrunedRegressor`.
    num_samples, random_state, verbose
        As of `PrunedRegressor`.

    Attributes
    ----------
    classes_ : ndarray
        The classes, sorted.
    result_ : Reduction
        What `prune` returned: the table, model and guide, in standardised units. Its functions take
        data from `to_tensors`.
    support_ : ndarray of bool
        Which inputs a prediction still depends on.
    selected_features_ : ndarray of str
        Their names.
    loss_curve_ : list of float
        The free energy in nats, as estimated in each pass over the data.
    n_iter_ : int
        Passes over the data in all trainings.
    n_features_in_ : int
        Inputs.
    feature_names_in_ : ndarray of str
        Their names, if the data had some.

    See Also
    --------
    PrunedRegressor : The same for numbers.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(60, 3))
    >>> y = np.where(X[:, 0] > 0, "up", "down")
    >>> model = PrunedClassifier((5,), max_iter=300, random_state=0).fit(X, y)
    >>> model.selected_features_
    array(['x0'], dtype=object)
    >>> model.predict([[2.0, 0.0, 0.0]])
    array(['up'], dtype='<U4')
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train and prune.

        Parameters
        ----------
        X : array-like
            Inputs, ``(rows, inputs)``; a data frame gives its names.
        y : array-like
            Classes, ``(rows,)``: numbers or words.

        Returns
        -------
        PrunedClassifier
            Itself.

        Raises
        ------
        ValueError
            If there is only one class.
        """
        rows, targets = validate_data(self, X, y)
        check_classification_targets(targets)
        self._encoder = LabelEncoder().fit(column_or_1d(targets, warn=True))
        self.classes_ = self._encoder.classes_
        if len(self.classes_) < 2:
            msg = f"got one class, {self.classes_[0]}. Expected rows of two classes or more"
            raise ValueError(msg)
        labels = self._read_targets(targets)
        if len(self.classes_) == 2:
            self._train(rows, labels, BinaryClassification, 1)
        else:
            self._train(rows, labels, Classification, len(self.classes_))
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return the probability of each class, averaged over draws of the weights.

        Parameters
        ----------
        X : array-like
            Inputs.

        Returns
        -------
        ndarray
            Of shape ``(rows, classes)``, in the order of ``classes_``.
        """
        outputs, _ = self._outputs(X)
        if len(self.classes_) > 2:
            return softmax(outputs, -1).mean(0)
        second = expit(outputs.squeeze(-1)).mean(0)
        return np.stack([1 - second, second], 1)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the most probable class.

        Parameters
        ----------
        X : array-like
            Inputs.

        Returns
        -------
        ndarray
            Of each row.
        """
        most_probable = self.predict_proba(X).argmax(1)
        return self.classes_[most_probable]

    def _read_targets(self, targets: np.ndarray) -> Tensor:
        labels = torch.as_tensor(self._encoder.transform(targets), device="cpu")
        return labels.float() if len(self.classes_) == 2 else labels
