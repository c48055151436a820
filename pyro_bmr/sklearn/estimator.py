"""What estimators share: options, training, draws of a trained network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_choice,
    check_switch,
    read_count,
    read_optional,
    read_positive,
    refuse_kind,
)
from pyro_bmr.programs.alone import hold
from pyro_bmr.selection.groups import elements, units
from pyro_bmr.sklearn.networks import ACTIVATIONS, Network, used_inputs
from pyro_bmr.training.pruning import prune

_MOST_SEED = 2**31 - 1
# Up to so many rows are one batch.
_ALL_ROWS = 1000
_ABOUT = 256


class PrunedNetwork(BaseEstimator):
    """A Bayesian network that is trained, pruned by its free energy, and trained again."""

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (50,),
        *,
        activation: str = "relu",
        prior_scale: float | None = None,
        batch_size: int | str = "auto",
        learning_rate_init: float = 0.02,
        max_iter: int = 400,
        max_rounds: int = 1,
        num_samples: int = 100,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.prior_scale = prior_scale
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.max_rounds = max_rounds
        self.num_samples = num_samples
        self.random_state = random_state
        self.verbose = verbose

    @property
    def selected_features_(self) -> np.ndarray:
        """Names of the inputs in ``support_``; ``x0``, ``x1`` ... if the data had none."""
        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(self.n_features_in_)])
        return np.asarray(names, dtype=object)[self.support_]

    def to_tensors(self, X: ArrayLike, y: ArrayLike) -> tuple[Tensor, Tensor]:
        """Return data as the network reads them, for functions of ``result_``.

        Those take standardised data, as in ``model.result_.audit(*model.to_tensors(X, y))``.

        Parameters
        ----------
        X : array-like
            Inputs, ``(rows, inputs)``.
        y : array-like
            Targets or classes, ``(rows,)``.

        Returns
        -------
        tuple of Tensor
            Inputs, with the mean and scale of those of `fit` taken away; and targets likewise, or
            numbers of classes, in the order of ``classes_``.
        """
        check_is_fitted(self)
        rows, targets = validate_data(self, X, y, reset=False)
        x = self._scaler.transform(rows).astype(np.float32)
        return torch.as_tensor(x, device="cpu"), self._read_targets(targets)

    @abstractmethod
    def _read_targets(self, targets: np.ndarray) -> Tensor:
        """Return them as the network observes them."""

    def _train(self, x: np.ndarray, y: Tensor, network_type: type[Network], outputs: int) -> None:
        """Set what was learned."""
        sizes = [x.shape[1], *self._read_hidden(), outputs]
        check_choice("activation", self.activation, ACTIVATIONS)
        scale = read_optional(self.prior_scale, read_positive, "prior_scale")
        options = self._read_options(len(x), hidden=len(sizes) > 2)
        self._seed = int(check_random_state(self.random_state).randint(_MOST_SEED))
        self._scaler = StandardScaler().fit(x)
        table: Any = self._scaler.transform(x).astype(np.float32)
        if hasattr(self, "feature_names_in_"):
            table = pd.DataFrame(table, columns=self.feature_names_in_)
        else:
            table = torch.as_tensor(table, device="cpu")
        losses: list[float] = []
        options["callback"] = lambda epoch: losses.append(epoch.loss)
        with _own_state("fit", self._seed):
            self._network = network_type.of(sizes, self.activation, scale)
            guide = self._network.make_guide()
            self.result_ = prune(self._network, guide, table, y, **options)
        self.loss_curve_ = losses
        self.n_iter_ = len(losses)
        self.support_ = used_inputs(self.result_.masks, self._network).numpy()

    def _outputs(self, X: ArrayLike) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Return outputs, ``(draws, rows, outputs)``, and the draws, the same in every call."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        x = torch.as_tensor(self._scaler.transform(X), dtype=torch.float64, device="cpu")
        with _own_state("predict", self._seed), torch.no_grad():
            with pyro.plate("draws", self.num_samples):
                draws = self.result_.guide(x)
            outputs = torch.cat(list(self._network.outputs(x, draws)), 1)
        return outputs.numpy(), draws

    def _read_hidden(self) -> list[int]:
        sizes: Any = self.hidden_layer_sizes
        if isinstance(sizes, str | bytes) or not isinstance(
            sizes, Sequence | np.ndarray | Integral
        ):
            refuse_kind("hidden_layer_sizes", sizes, "numbers of units, as in (50,)")
        sizes = [sizes] if isinstance(sizes, Integral) else sizes
        return [read_count("hidden_layer_sizes", size) for size in sizes]

    def _read_options(self, rows: int, hidden: bool) -> dict[str, Any]:
        """Return options of `prune`."""
        size = self.batch_size
        if isinstance(size, str) and size == "auto":
            size = rows if rows <= _ALL_ROWS else ceil(rows / round(rows / _ABOUT))
        size = min(rows, read_count("batch_size", size, expected="a number of rows, or 'auto'"))
        epochs = read_count("max_iter", self.max_iter)
        check_switch("verbose", self.verbose)
        return {
            "batch_size": None if size == rows else size,
            "lr": read_positive("learning_rate_init", self.learning_rate_init),
            "num_epochs": epochs,
            "refit_epochs": ceil(epochs / 2),
            "max_rounds": read_count("max_rounds", self.max_rounds, 0),
            "groups": [units, elements] if hidden else elements,
            "estimator": "local",
            "num_samples": read_count("num_samples", self.num_samples, 2),
            "progress": self.verbose,
        }


@contextmanager
def _own_state(verb: str, seed: int) -> Iterator[None]:
    """Give it generators and a param store of its own, and let no other thread have them."""
    with (
        hold(verb),
        torch.random.fork_rng(devices=[]),
        pyro.get_param_store().scope(),
    ):
        torch.manual_seed(seed)
        yield
