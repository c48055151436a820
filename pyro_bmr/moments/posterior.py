"""`Posterior`: a Gaussian posterior from elsewhere, with its Gaussian prior."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import read_number, read_optional, refuse
from pyro_bmr.display import Tabular
from pyro_bmr.moments.bayesian_torch import read_bayesian_torch
from pyro_bmr.moments.laplace_torch import read_laplace
from pyro_bmr.moments.names import Layout, read_vector
from pyro_bmr.moments.numpyro_guides import read_numpyro
from pyro_bmr.moments.samples import read_samples
from pyro_bmr.moments.spreads import read_along, read_spread

if TYPE_CHECKING:
    import pandas as pd

# Of so many independent elements a matrix of covariances can be made.
_LARGEST = 20_000


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Posterior(Tabular):
    r"""A Gaussian posterior from elsewhere, and its Gaussian prior, for whatever takes a guide.

    .. math::
        q(\theta) = N(\theta \mid \mu, \Sigma), \quad
        p(\theta) = N(\theta \mid \mu_0, \Sigma_0)

    Parameters
    ----------
    mean : array or mapping
        :math:`\mu`, a vector; with names from ``names=`` or the index of a pandas Series, each
        element is a site of its own. Or arrays by site, as a mapping, an xarray Dataset or a named
        DataArray, whose coordinates name the elements. An array without names is called
        ``"theta"``.
    covariance, scale, precision : array, optional
        Of these, one: :math:`\Sigma`, ``(n, n)``; the standard deviations of independent elements;
        or :math:`\Sigma^{-1}`. Of arrays by site, over all their elements in order; standard
        deviations may be a mapping, too.
    prior_mean : float, array or mapping
        :math:`\mu_0`.
    prior_covariance, prior_scale, prior_precision : array, optional
        Of these, at most one. Without, the prior is that of a Pyro model of the same sites, passed
        as ``model=`` to the function that takes the posterior. The covariance may be singular.
    names : sequence of str, optional
        Of the elements of a vector.
    free_energy : float, optional
        F of the full model, in nats; the sign is that of a loss.

    Attributes
    ----------
    spread, prior_spread : Tensor
        Covariances, ``(n, n)``, or the variances of independent elements, ``(n,)``.
    layout : Layout
        The names and shapes of the sites.
    kept : Tensor
        Boolean, of each element, False if it was pruned.

    Raises
    ------
    ValueError
        If numbers are not finite, shapes do not fit or a covariance has a negative eigenvalue.
    TypeError
        If something is no array of numbers.

    Examples
    --------
    >>> import numpy as np
    >>> q = Posterior([0.1, 2.0], scale=[0.5, 0.5], prior_scale=1.0, names=["a", "b"])
    >>> q.summary()["sd"].tolist()
    [0.5, 0.5]
    """

    mean: Tensor
    spread: Tensor
    prior_mean: Tensor
    prior_spread: Tensor | None
    free_energy: float | None
    layout: Layout
    kept: Tensor

    def __init__(
        self,
        mean: Any,
        covariance: Any = None,
        *,
        scale: Any = None,
        precision: Any = None,
        prior_mean: Any = 0.0,
        prior_covariance: Any = None,
        prior_scale: Any = None,
        prior_precision: Any = None,
        names: Sequence[str] | None = None,
        free_energy: float | None = None,
    ) -> None:
        vector, layout = read_vector(mean, names)
        _check_different(layout.elements())
        spreads = {"covariance": covariance, "scale": scale, "precision": precision}
        own = read_spread(spreads, layout)
        if own is None:
            refuse("covariance", None, "one of covariance=, scale= and precision=")
        prior = {
            "prior_covariance": prior_covariance,
            "prior_scale": prior_scale,
            "prior_precision": prior_precision,
        }
        before = read_spread(prior, layout)
        values = {
            "mean": vector,
            "spread": own.to(vector.device),
            "prior_mean": read_along("prior_mean", prior_mean, layout).to(vector.device),
            "prior_spread": None if before is None else before.to(vector.device),
            "free_energy": read_optional(
                free_energy, read_number, "free_energy", fits=lambda _: True
            ),
            "layout": layout,
            "kept": torch.ones_like(vector, dtype=torch.bool),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_samples(
        cls,
        samples: Mapping[Any, Any],
        *,
        sites: Sequence[str] | None = None,
        prior_mean: Any = None,
        prior_covariance: Any = None,
        prior_scale: Any = None,
        prior_precision: Any = None,
        free_energy: float | None = None,
    ) -> Posterior:
        """Make one of the moments of posterior draws: of PyMC, Stan or others through ArviZ.

        The moments are those of the coordinates of the draws; where a variable is positive, pass
        its logarithm. Elements are named by the coordinates of ArviZ.

        Parameters
        ----------
        samples : InferenceData, DataTree, Dataset or mapping
            What ArviZ holds, with a group ``posterior`` or that group itself; or arrays of shape
            ``(draws, ...)`` by name. Arrays of shape ``(chains, draws, ...)`` are read through
            ``arviz.from_dict``.
        sites : sequence of str, optional
            Which variables. Without, those of the prior, if it is given by name, or all.
        prior_mean, prior_covariance, prior_scale, prior_precision : optional
            As of `Posterior`. Without any, the moments of the group ``prior``, if there is one.
            Its correlations that are within five standard errors of zero are zero.
        free_energy : float, optional
            F of the full model, in nats.

        Returns
        -------
        Posterior
            With the covariance of the draws; independent, with a warning, where there are fewer
            than ten effective draws per element.

        Raises
        ------
        ValueError
            If draws are few or not finite, do not fit each other, or lack a site.
        TypeError
            If the samples are no mapping.

        Warns
        -----
        UserWarning
            Of few draws, and of elements that are strongly skewed or heavy-tailed.

        Examples
        --------
        >>> draws = {"w": torch.randn(500, 2, generator=torch.Generator("cpu").manual_seed(0))}
        >>> Posterior.from_samples(draws, prior_scale=3.0).summary()["sd"].round().tolist()
        [1.0, 1.0]
        """
        prior = _given(prior_mean, prior_covariance, prior_scale, prior_precision)
        return cls(**read_samples(samples, sites, prior), free_energy=free_energy)

    @classmethod
    def from_numpyro(
        cls,
        guide: Any,
        params: Mapping[str, Any],
        *,
        sites: Sequence[str] | None = None,
        prior_mean: Any = None,
        prior_covariance: Any = None,
        prior_scale: Any = None,
        prior_precision: Any = None,
        free_energy: float | None = None,
    ) -> Posterior:
        """Make one of a trained autoguide of NumPyro, such as ``AutoNormal``.

        Others that are read are ``AutoDiagonalNormal``, ``AutoMultivariateNormal``,
        ``AutoLowRankMultivariateNormal`` and ``AutoLaplaceApproximation``.

        Parameters
        ----------
        guide : AutoGuide
            Of NumPyro, as SVI trained it.
        params : mapping
            Its parameters, ``svi_result.params``.
        sites : sequence of str, optional
            Which sites. Without, all on the real line whose prior is Normal and does not depend on
            other sites; the others are left out with a warning, which changes no ΔF of these.
        prior_mean, prior_covariance, prior_scale, prior_precision : optional
            As of `Posterior`, instead of the model's own prior.
        free_energy : float, optional
            F of the full model in nats, ``svi_result.losses[-1]``.

        Returns
        -------
        Posterior
            By site.

        Raises
        ------
        ValueError
            If the guide was never called, is not Gaussian, or if a site cannot be read.
        TypeError
            If this is no guide of NumPyro.

        Warns
        -----
        UserWarning
            Of sites that are left out.
        """
        prior = _given(prior_mean, prior_covariance, prior_scale, prior_precision)
        return cls(**read_numpyro(guide, params, sites, prior), free_energy=free_energy)

    @classmethod
    def from_laplace(cls, la: Any, *, free_energy: float | None = None) -> Posterior:
        """Make one of a fitted Laplace approximation of laplace-torch.

        Parameters
        ----------
        la : Laplace
            Of all weights, a last layer or a subnetwork; full, of Kronecker factors or diagonal.
        free_energy : float, optional
            F of the full model in nats, ``-la.log_marginal_likelihood().item()``.

        Returns
        -------
        Posterior
            By the names of the weights; of a subnetwork, each of its elements is one of its own.

        Raises
        ------
        ValueError
            If it was never fitted, or if its prior is improper.
        TypeError
            If this is no Laplace approximation of weights.
        """
        return cls(**read_laplace(la), free_energy=free_energy)

    @classmethod
    def from_bayesian_torch(cls, module: Any, *, free_energy: float | None = None) -> Posterior:
        """Make one of the mean-field layers of bayesian-torch in a module.

        Its layers take what they call the variance of the prior for the standard deviation, and so
        does this. Their divergence is a mean over the elements of a layer: train with their sum
        where F is to be one.

        Parameters
        ----------
        module : torch.nn.Module
            With layers such as ``LinearReparameterization`` or ``Conv2dFlipout``.
        free_energy : float, optional
            F of the full model, in nats.

        Returns
        -------
        Posterior
            By site, ``{layer}.weight`` and ``{layer}.bias``.

        Raises
        ------
        ValueError
            If there are no such layers.
        TypeError
            If this is no module.
        """
        return cls(**read_bayesian_torch(module), free_energy=free_energy)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the elements, in order: ``b``, or ``A[2,1]`` of an array."""
        return self.layout.elements()

    @property
    def covariance(self) -> Tensor:
        r""":math:`\Sigma`, of shape ``(n, n)``."""
        return _as_matrix(self.spread)

    @property
    def prior_covariance(self) -> Tensor | None:
        r""":math:`\Sigma_0`, of shape ``(n, n)``; None if the prior is that of a Pyro model."""
        return None if self.prior_spread is None else _as_matrix(self.prior_spread)

    @property
    def variance(self) -> Tensor:
        """Of each element, of shape ``(n,)``."""
        return _variances(self.spread)

    @property
    def prior_variance(self) -> Tensor:
        """Of each element before the data, of shape ``(n,)``; inf if that is not known."""
        if self.prior_spread is None:
            return torch.full_like(self.mean, torch.inf)
        return _variances(self.prior_spread)

    @property
    def free(self) -> Tensor:
        """True for elements whose variance is positive before and after; others are fixed."""
        return (self.variance > 0) & (self.prior_variance > 0)

    def replaced(
        self, mean: Tensor, spread: Tensor, kept: Tensor, prior: tuple[Tensor, Tensor]
    ) -> Posterior:
        """Return the same sites with other moments, of which some elements are zero.

        Parameters
        ----------
        mean, spread : Tensor
            Of all elements, zero where one is pruned; variances or a covariance.
        kept : Tensor
            Boolean, False for elements that are pruned.
        prior : tuple of Tensor
            Mean, and variances or covariance, of the prior.

        Returns
        -------
        Posterior
            With the free energy of before; see `after`.
        """
        new = copy.copy(self)
        values = {"mean": mean, "spread": spread, "kept": kept}
        values |= dict(zip(("prior_mean", "prior_spread"), prior, strict=True))
        for name, value in values.items():
            object.__setattr__(new, name, value)
        return new

    def after(self, delta_f: float) -> Posterior:
        """Add to the free energy, if that is known.

        Parameters
        ----------
        delta_f : float
            In nats.

        Returns
        -------
        Posterior
            The same posterior.
        """
        new = copy.copy(self)
        if self.free_energy is not None:
            object.__setattr__(new, "free_energy", self.free_energy + delta_f)
        return new

    def to(self, device: torch.device | str) -> Posterior:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        Posterior
            With all tensors there.
        """
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(new, name, value.to(device))
        return new

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per element.

        Returns
        -------
        DataFrame
            Indexed by name; columns ``mean``, ``sd``, and ``prior mean`` and ``prior sd`` if the
            prior is known.
        """
        import pandas as pd

        columns = {"mean": self.mean, "sd": self.variance.sqrt()}
        if self.prior_spread is not None:
            columns["prior mean"] = self.prior_mean
            columns["prior sd"] = self.prior_variance.sqrt()
        data = {name: column.cpu().numpy() for name, column in columns.items()}
        return pd.DataFrame(data, index=pd.Index(self.names, name="element"))

    def __rich__(self) -> Table:
        frame = self._shown()
        table = Table("element", title=self._title, title_justify="left")
        for column in frame.columns:
            table.add_column(column, justify="right")
        for name, row in frame.iterrows():
            cells = (value if isinstance(value, str) else f"{value:.4g}" for value in row)
            table.add_row(str(name), *cells)
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self._shown()}

    def _shown(self) -> pd.DataFrame:
        """Return the summary; of many elements, fixed ones are one line, and the middle is cut."""
        import pandas as pd

        frame, varies = self.summary(), (self.free | ~self.kept).cpu().numpy()
        if len(frame) <= _MOST_ROWS:
            return frame

        def line(told: str) -> pd.DataFrame:
            return pd.DataFrame("", index=pd.Index([told], name="element"), columns=frame.columns)

        fixed = int((~varies).sum())
        frame = frame[varies]
        parts = [frame]
        if len(frame) > _MOST_ROWS:
            parts = [frame.iloc[:_FIRST_ROWS], line("…"), frame.iloc[-_LAST_ROWS:]]
        parts += [line(f"and {fixed:,} fixed")] if fixed else []
        return pd.concat([part.astype(object) for part in parts])

    @property
    def _title(self) -> str:
        fixed, pruned = int((~self.free & self.kept).sum()), int((~self.kept).sum())
        told = f", {fixed:,} of them fixed" if fixed else ""
        told += f", {pruned:,} pruned" if pruned else ""
        level = "" if self.free_energy is None else f", F = {self.free_energy:,.2f} nats"
        return f"posterior of {self.layout.size:,} elements{told}{level}"


_MOST_ROWS, _FIRST_ROWS, _LAST_ROWS = 50, 30, 10


def _given(mean: Any, covariance: Any, scale: Any, precision: Any) -> dict[str, Any]:
    prior = {"mean": mean, "covariance": covariance, "scale": scale, "precision": precision}
    return {f"prior_{name}": value for name, value in prior.items() if value is not None}


def _check_different(names: Sequence[str]) -> None:
    if len({*names}) < len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        refuse("names", repeated[:5], "names and coordinates that tell all elements apart")


def _as_matrix(spread: Tensor) -> Tensor:
    if spread.dim() == 2:
        return spread
    if len(spread) > _LARGEST:
        msg = (
            f"got {len(spread):,} independent elements, whose covariance would have "
            f"{len(spread) ** 2:,} numbers. Expected up to {_LARGEST:,}; variance has any number"
        )
        raise ValueError(msg)
    return spread.diag()


def _variances(spread: Tensor) -> Tensor:
    return spread if spread.dim() == 1 else spread.diagonal()
