"""Factors: the independent pieces of a posterior, each over named sample sites.

ΔF adds across factors, never inside a correlated one. All kinds of factor answer the same
questions: what is the marginal of each element, what does dropping it by itself do, in which
order should elements go, what did dropping these together do, and what remains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.evidence import Correlated
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.programs.sites import Indices, Site

# From a correlated posterior and ln p(θ = 0) of its elements to those to drop.
Search = Callable[[Correlated, Tensor], Tensor]

# From a number of elements to one vector of standard normals a draw, of that many elements each.
Normals = Callable[[int], Iterator[Tensor]]


@dataclass(frozen=True)
class Divergence:
    r"""What a prior says of positive elements, which have no density at zero.

    Parameters
    ----------
    value : Tensor
        :math:`KL(q \,\|\, p)` of each element in nats, float64, of the shape of the site; under a
        hierarchical prior, its expectation.
    accuracy : Tensor
        What the expected log likelihood falls by without the element, if it is quadratic in it and
        the posterior is at the optimum of F; in nats.

    Examples
    --------
    >>> Divergence(torch.tensor(2.0), torch.tensor(0.5)).delta_f
    tensor(-1.5000)
    """

    value: Tensor
    accuracy: Tensor

    @property
    def delta_f(self) -> Tensor:
        """ΔF of setting each element to zero, in nats."""
        return self.accuracy - self.value


@dataclass(frozen=True)
class Prior:
    """What a reduction knows of the prior of a site.

    Parameters
    ----------
    log_density_at_zero : Tensor
        ln p(θ = 0) in nats and float64; broadcasts to the site's shape. ``inf`` at elements that
        have no prior, which keeps them. Under a hierarchical prior, its expectation.
    gaussian : Diagonal, optional
        The prior itself where it is Gaussian, in float64; broadcasts to the site's shape. Under a
        hierarchical prior, the Gaussian of the expected natural parameters.
    note : str
        What the reader of a reduction should know of it.
    divergence : Divergence, optional
        Of a positive site that is set to zero as F is measured, where both densities vanish.
    note_if_reduced : str
        The same, where something of the site goes.
    joint : Moments, optional
        Of a prior whose elements are correlated, mean and covariance of all elements of the site;
        then ``log_density_at_zero`` is that of each by itself, and ``gaussian`` is None.

    Examples
    --------
    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> Prior(normal.log_prob(torch.tensor(0.0).double())).log_density_at_zero
    tensor(-0.9189, dtype=torch.float64)
    """

    log_density_at_zero: Tensor
    gaussian: Diagonal | None = None
    note: str = ""
    divergence: Divergence | None = None
    joint: Moments | None = None
    note_if_reduced: str = ""


@dataclass(frozen=True)
class Terms:
    """What ΔF of any set of elements of a factor follows from.

    ``element``: those that can go, as the caller numbers them. ``cost``: in nats and float64, ΔF of
    dropping each where they are independent, otherwise ln p(θ_i = 0) + ½ ln 2π. ``posterior``: of
    these elements, in float64, if they are correlated.
    """

    element: Tensor
    cost: Tensor
    posterior: Correlated | None = None


@dataclass(frozen=True)
class Factor(ABC):
    """A posterior over one or more sample sites, with the prior of those that may be reduced."""

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The sites that it holds."""

    @property
    def obstacle(self) -> str:
        """Why it cannot be reduced whatever its prior; empty for a Gaussian."""
        return ""

    @property
    @abstractmethod
    def priors(self) -> Mapping[str, Prior]:
        """By site, its prior; a site that is not here stays whole."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if a location or a scale is not finite, or a scale not positive."""

    @abstractmethod
    def locations(self) -> dict[str, Tensor]:
        """By site, the posterior mean in unconstrained coordinates; 0 if pruned."""

    @abstractmethod
    def marginals(self) -> dict[str, Diagonal]:
        """By site, the marginal of each element in unconstrained coordinates; 0 ± 0 if pruned."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """By site, True where an element has not been pruned before."""

    @abstractmethod
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        """Draw some of its sites, in unconstrained coordinates, from the noise that is given.

        Parameters
        ----------
        names : collection of str
            Sites that it holds.
        normals : callable
            From a number of elements to their standard normals, one vector per draw. Where the
            posterior is Gaussian, a draw is the mean plus something linear in them.
        """

    @abstractmethod
    def with_priors(self, priors: Mapping[str, Prior]) -> Factor:
        """Return the factor with the priors of the sites that may be reduced."""

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """By reducible site, ΔF in nats of dropping each element by itself; 0 if pruned before."""

    @abstractmethod
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By reducible site, the ΔF at which each element falls when the best one goes first.

        Parameters
        ----------
        scores : mapping
            What `scores` returned.
        """

    @abstractmethod
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        """By reducible site, True where a search over sets keeps an element.

        Parameters
        ----------
        scores : mapping
            What `scores` returned.
        choose : callable
            From a correlated posterior and ln p(θ = 0) of its elements to a boolean tensor, True
            for those to drop.
        margin : float
            In nats: what dropping an element costs beyond its ΔF.
        """

    @abstractmethod
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        """Return what ΔF of any set of its elements follows from.

        Parameters
        ----------
        scores : mapping
            What `scores` returned.
        index : mapping
            By reducible site, a number for each element, int64.
        """

    @abstractmethod
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """By site of ``masks``, its part of the joint ΔF in nats of all that is dropped."""

    @property
    def releasable(self) -> tuple[str, ...]:
        """The sites that `released` tells of."""
        return tuple(self.released())

    def released(self) -> dict[str, Tensor]:
        """By site, ΔF in nats of each element if nothing depends on it any more.

        Returns
        -------
        dict of Tensor
            In float64, 0 if pruned before; without sites whose elements are correlated, or whose
            prior is not Gaussian.
        """
        return {}

    @abstractmethod
    def prune(self, masks: Mapping[str, Tensor]) -> Factor:
        """Return what remains: the posterior given that all dropped elements are 0.

        What was pruned before stays pruned, whatever its mask says now.
        """

    @abstractmethod
    def take(self, kept: Mapping[str, Indices]) -> Factor:
        """Return the marginal over some indices of its sites, without priors.

        Parameters
        ----------
        kept : mapping
            By site, for each axis the indices that stay, or None for all; a site that is not here
            stays as it is.
        """


def everything(like: Tensor) -> Tensor:
    """Return a mask that keeps all of a tensor: one element, which is expanded."""
    return torch.ones((), dtype=torch.bool, device=like.device).expand(like.shape)


def is_everything(mask: Tensor) -> bool:
    """Tell whether a mask is from `everything`, without a look at the device."""
    return mask.numel() > 1 and not any(mask.stride())


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Raise ValueError if a value, ``what`` the guide has for a site, is NaN or infinite."""
    if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        msg = (
            f"the guide's {what} of the site {name!r} is NaN or infinite in "
            f"{int((~values.isfinite()).sum())} of {values.numel()} elements. Expected a guide "
            "that was trained to finite values: look for a NaN loss, a learning rate that is too "
            "high, or NaN in the data"
        )
        raise ValueError(msg)


def check_positive(name: str, scale: Tensor) -> None:
    """Raise ValueError if a scale is zero or negative."""
    bad = int((scale <= 0).sum())
    if bad:
        msg = (
            f"the guide's scale of the site {name!r} is zero or negative in {bad} of "
            f"{scale.numel()} elements. Expected positive scales, which in float32 vanish below "
            "1e-45: train in float64 or with a smaller learning rate"
        )
        raise ValueError(msg)
