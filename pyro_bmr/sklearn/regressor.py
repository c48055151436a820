"""`PrunedRegressor`."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from sklearn.base import RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import validate_data
from torch import Tensor

from pyro_bmr.arguments.checks import check_switch, read_number
from pyro_bmr.sklearn.estimator import PrunedNetwork
from pyro_bmr.sklearn.networks import RegressionNetwork

_HALVINGS = 50


class PrunedRegressor(RegressorMixin, PrunedNetwork):
    r"""A Bayesian network for regression, pruned by its free energy.

    .. math:: y \sim N(f_w(x), 1 / \tau), \qquad w \sim N(0, \text{scale}^2 / \text{fan-in}),
              \qquad \tau \sim \text{Gamma}(1, 0.01)

    of standardised inputs and targets. The posterior of every weight is Normal, that of
    :math:`\tau` Gamma. It is trained by `prune`: what goes is what lowers the measured free energy,
    whole units first, then single weights, and what is left is trained again.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int
        Units of each hidden layer; ``()`` is a linear model.
    activation : str
        ``"relu"`` or ``"tanh"``.
    prior_scale : float, optional
        See `pyro_bmr.nn.fan_in_normal`. None is 1 for standardised targets, and 3 for the logits of
        classes, whose scale is larger.
    batch_size : int or str
        Rows of a step; ``"auto"`` takes all of up to 1,000 rows, about 256 of more.
    learning_rate_init : float
        Of Adam; it falls to a hundredth in the second half of each training.
    max_iter : int
        Passes over the data in the first training; each one after a reduction takes half as many.
    max_rounds : int
        Reductions at most; 0 prunes nothing.
    num_samples : int
        Draws of the posterior that predictions are averaged over, and free energies.
    random_state : int, RandomState instance or None
        Of initial values, batches and draws. As in scikit-learn, None takes one number from numpy's
        generator; those of torch, Pyro and Python are left alone.
    verbose : bool
        Show a progress bar while it trains, if there is a terminal or a notebook.

    Attributes
    ----------
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
    PrunedClassifier : The same for classes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(60, 3))
    >>> model = PrunedRegressor((5,), max_iter=300, random_state=0).fit(X, X[:, 0])
    >>> model.selected_features_
    array(['x0'], dtype=object)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train and prune.

        Parameters
        ----------
        X : array-like
            Inputs, ``(rows, inputs)``; a data frame gives its names.
        y : array-like
            Targets, ``(rows,)``.

        Returns
        -------
        PrunedRegressor
            Itself.
        """
        rows, targets = validate_data(self, X, y, y_numeric=True, ensure_min_samples=2)
        self._target = StandardScaler().fit(np.reshape(targets, (-1, 1)))
        self._train(rows, self._read_targets(targets), RegressionNetwork, 1)
        return self

    def predict(
        self, X: ArrayLike, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        r"""Return the mean of the predictive distribution, and its standard deviation.

        .. math:: \text{std}^2 = \text{Var}_q[f_w(x)] + E_q[1 / \tau]

        Parameters
        ----------
        X : array-like
            Inputs.
        return_std : bool
            Whether to return the standard deviation of a new target too, noise included, as of
            `sklearn.linear_model.BayesianRidge`.

        Returns
        -------
        ndarray, or two
            Mean of each row, and its standard deviation, in the units of the targets.
        """
        check_switch("return_std", return_std)
        means, scales = self._components(X)
        mean = means.mean(0)
        if not return_std:
            return mean
        return mean, np.sqrt(means.var(0) + np.square(scales).mean())

    def predict_interval(self, X: ArrayLike, level: float = 0.9) -> np.ndarray:
        """Return the central interval in which a new target lies with this probability.

        The predictive distribution is a mixture of Normals, one for each draw of the weights, and
        so has heavier tails than one Normal: these are its own quantiles.

        Parameters
        ----------
        X : array-like
            Inputs.
        level : float
            Between 0 and 1.

        Returns
        -------
        ndarray
            Lower and upper ends, ``(rows, 2)``.
        """
        expected = "a probability between 0 and 1"
        level = read_number("level", level, lambda value: 0 < value < 1, expected)
        means, scales = self._components(X)
        return np.stack([_quantile(means, scales, (1 + s * level) / 2) for s in (-1, 1)], 1)

    def _read_targets(self, targets: np.ndarray) -> Tensor:
        standard = self._target.transform(np.reshape(targets, (-1, 1))).squeeze(1)
        return torch.as_tensor(standard.astype(np.float32), device="cpu")

    def _components(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Means ``(draws, rows)`` and standard deviations ``(draws, 1)`` of the mixture."""
        outputs, draws = self._outputs(X)
        unit, origin = self._target.scale_, self._target.mean_
        scales = draws["precision"].double().rsqrt().numpy()[:, None]
        return outputs.squeeze(-1) * unit + origin, scales * unit


def _quantile(means: np.ndarray, scales: np.ndarray, level: float) -> np.ndarray:
    """Of mixtures of Normals, by bisection between the least and largest quantile of a part."""
    each = means + scales * ndtri(level)
    low, high = each.min(0), each.max(0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = ndtr((middle - means) / scales).mean(0) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
