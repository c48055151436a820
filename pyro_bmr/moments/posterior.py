"""`Posterior`: a Gaussian posterior from elsewhere, with its Gaussian prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import read_number, read_optional, refuse
from pyro_bmr.display import Tabular
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.moments.names import Layout, read_numbers, read_vector

# Of a correlation matrix, how far below zero rounding may take an eigenvalue.
_ROUNDING = 1e-7


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Posterior(Tabular):
    r"""A Gaussian posterior from elsewhere, and its Gaussian prior, for whatever takes a guide.

    .. math:: q(\theta) = N(\theta \mid \mu, \Sigma), \quad p(\theta) = N(\theta \mid \mu_0, \Sigma_0)

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
    covariance: Tensor
    prior_mean: Tensor
    prior_covariance: Tensor | None
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
        spreads = {"covariance": covariance, "scale": scale, "precision": precision}
        own = _read_spread(spreads, layout)
        if own is None:
            refuse("covariance", None, "one of covariance=, scale= and precision=")
        prior = {
            "prior_covariance": prior_covariance,
            "prior_scale": prior_scale,
            "prior_precision": prior_precision,
        }
        values = {
            "mean": vector,
            "covariance": own.to(vector.device),
            "prior_mean": _read_along("prior_mean", prior_mean, layout).to(vector.device),
            "prior_covariance": _read_spread(prior, layout),
            "free_energy": read_optional(
                free_energy, read_number, "free_energy", fits=lambda _: True
            ),
            "layout": layout,
            "kept": torch.ones_like(vector, dtype=torch.bool),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def replaced(
        self, mean: Tensor, covariance: Tensor, kept: Tensor, prior: Moments
    ) -> Posterior:
        """Return the same sites with other moments, of which some elements are zero.

        Parameters
        ----------
        mean, covariance : Tensor
            Of all elements, zero where one is pruned.
        kept : Tensor
            Boolean, False for elements that are pruned.
        prior : Moments
            As of the posterior.

        Returns
        -------
        Posterior
            Of which the free energy is not known.
        """
        new = Posterior(
            self.layout.split(mean),
            covariance,
            prior_mean=prior.loc,
            prior_covariance=prior.covariance,
        )
        object.__setattr__(new, "layout", self.layout)
        object.__setattr__(new, "kept", kept)
        return new

    @property
    def names(self) -> tuple[str, ...]:
        """Of the elements, in order: ``b``, or ``A[2,1]`` of an array."""
        return self.layout.elements()

    @property
    def free(self) -> Tensor:
        """True for elements whose variance is positive before and after; others are fixed."""
        free = self.covariance.diagonal() > 0
        if self.prior_covariance is not None:
            free = free & (self.prior_covariance.diagonal() > 0)
        return free

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per element.

        Returns
        -------
        DataFrame
            Indexed by name; columns ``mean``, ``sd``, and ``prior mean`` and ``prior sd`` if the
            prior is known.
        """
        columns = {"mean": self.mean, "sd": self.covariance.diagonal().sqrt()}
        if self.prior_covariance is not None:
            columns["prior mean"] = self.prior_mean
            columns["prior sd"] = self.prior_covariance.diagonal().sqrt()
        data = {name: column.cpu().numpy() for name, column in columns.items()}
        return pd.DataFrame(data, index=pd.Index(self.names, name="element"))

    def __rich__(self) -> Table:
        frame = self.summary()
        table = Table("element", title=self._title, title_justify="left")
        for column in frame.columns:
            table.add_column(column, justify="right")
        for name, row in frame.iterrows():
            table.add_row(str(name), *(f"{value:.4g}" for value in row))
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary()}

    @property
    def _title(self) -> str:
        fixed = int((~self.free).sum())
        told = f", {fixed:,} of them fixed" if fixed else ""
        level = "" if self.free_energy is None else f", F = {self.free_energy:,.2f} nats"
        return f"posterior of {self.layout.size:,} elements{told}{level}"


class NoProgram:
    """Takes the place of the model of moments from elsewhere, and says that there is none."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise the ValueError that says so."""
        raise ValueError(_NO_PROGRAM)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(_NO_PROGRAM)

    def __repr__(self) -> str:
        return "NoProgram()"


_NO_PROGRAM = (
    "this is the reduction of a Posterior, of moments without a program. Expected a guide and its "
    "Pyro model for what runs one, or Posterior(...) with model= of the prior; the reduced moments "
    "are result.guide"
)


def _read_along(place: str, value: Any, layout: Layout) -> Tensor:
    """Read a number for each element: one for all, by site, or a vector."""
    if isinstance(value, Mapping):
        if value.keys() != layout.shapes.keys():
            refuse(place, sorted(value), f"a value for each of {sorted(layout.shapes)}")
        parts = [
            _broadcast(f"{place}[{name!r}]", value[name], shape)
            for name, shape in layout.shapes.items()
        ]
        return torch.cat([part.reshape(-1) for part in parts])
    return _broadcast(place, value, torch.Size([layout.size]))


def _broadcast(place: str, value: Any, shape: torch.Size) -> Tensor:
    numbers = read_numbers(place, value)
    if numbers.numel() == shape.numel() and numbers.dim():
        return numbers.reshape(shape).clone()
    if numbers.numel() != 1:
        refuse(place, value, f"a number, or an array of shape {tuple(shape)}")
    return numbers.reshape(()).expand(shape).clone()


def _read_spread(spreads: Mapping[str, Any], layout: Layout) -> Tensor | None:
    """Read a covariance, given as one, as standard deviations or as a precision."""
    given = {name: value for name, value in spreads.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        refuse(" and ".join(given), "both", f"one of {', '.join(spreads)}")
    ((name, value),) = given.items()
    if name.endswith("scale"):
        scale = _read_along(name, value, layout)
        if (scale < 0).any():
            refuse(name, value, "standard deviations, which are not negative")
        return scale.square().diag()
    matrix = read_numbers(name, value)
    if matrix.shape != (layout.size, layout.size):
        refuse(name, value, f"a matrix of shape {(layout.size, layout.size)}")
    return _as_covariance(name, matrix) if name.endswith("covariance") else _invert(name, matrix)


def _as_covariance(name: str, matrix: Tensor) -> Tensor:
    """Check that a matrix is symmetric and not negative, up to rounding, and make it symmetric."""
    scale = matrix.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = inverse[:, None] * matrix * inverse
    symmetric = (matrix + matrix.mT) / 2
    uneven = float((correlation - correlation.mT).abs().max())
    least = float(torch.linalg.eigvalsh((correlation + correlation.mT) / 2)[0])
    fixed = scale == 0
    if uneven > _ROUNDING or least < -_ROUNDING or (matrix[fixed] != 0).any():
        msg = (
            f"got {name} that is no covariance: as correlations, it differs from its transpose by "
            f"up to {uneven:.1g} and has the eigenvalue {least:.1g}. Expected a symmetric matrix "
            "without negative eigenvalues, whose rows are zero where its diagonal is"
        )
        raise ValueError(msg)
    return symmetric


def _invert(name: str, matrix: Tensor) -> Tensor:
    tril, failed = torch.linalg.cholesky_ex(_as_covariance(name, matrix))
    if failed:
        msg = (
            f"got a singular {name}. Expected a positive definite one; a covariance may be singular"
        )
        raise ValueError(msg)
    return torch.cholesky_inverse(tril)
