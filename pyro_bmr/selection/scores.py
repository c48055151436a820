"""Scores: what a selection looks at before it decides what to drop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pyro_bmr.factors.factor import Factor, Search


@dataclass(frozen=True)
class Scores:
    """The reducible sites of a posterior and the evidence of dropping each element.

    Every mapping goes from the name of a reducible site to a tensor of the site's shape.

    Parameters
    ----------
    factors : tuple of Factor
        Posterior and prior.
    delta_f : mapping
        ΔF in nats of dropping each element by itself; ``inf`` where that is impossible, 0 where
        it was pruned before.

    Examples
    --------
    >>> import torch
    >>> from pyro_bmr.factors.factor import Prior
    >>> from pyro_bmr.programs.sites import Site
    >>> from pyro_bmr.factors.independent import IndependentFactor
    >>> site = Site("w", torch.Size([2]))
    >>> factor = IndependentFactor(site, torch.tensor([0.0, 3.0]), torch.ones(2))
    >>> score((factor.with_priors({"w": Prior(torch.tensor(-0.9189))}),)).loc
    {'w': tensor([0., 3.])}
    """

    factors: tuple[Factor, ...]
    delta_f: Mapping[str, Tensor]

    @cached_property
    def loc(self) -> dict[str, Tensor]:
        """Posterior mean of each element, 0 where it was pruned before."""
        return {
            name: loc
            for factor in self.factors
            for name, loc in factor.locations().items()
            if name in self.delta_f
        }

    @cached_property
    def scale(self) -> dict[str, Tensor]:
        """Posterior standard deviation of each element, 0 where it was pruned before."""
        return {
            name: marginal.scale
            for factor in self.factors
            for name, marginal in factor.marginals().items()
            if name in self.delta_f
        }

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """True for the elements that have not been pruned before."""
        return {
            name: kept
            for factor in self.factors
            for name, kept in factor.kept().items()
            if name in self.delta_f
        }

    @cached_property
    def unscored(self) -> dict[str, int]:
        """By site, how many elements cannot go because they have no prior density at zero."""
        return {
            name: int(scores.isposinf().sum()) if scores.numel() and scores.max().isinf() else 0
            for name, scores in self.delta_f.items()
        }

    def elimination(self) -> dict[str, Tensor]:
        """Return the ΔF at which each element falls when the cheapest always goes first.

        Independent elements fall at their own ΔF. Correlated ones are scored again after each
        removal, given all that went before.

        Returns
        -------
        dict of Tensor
            In nats.
        """
        path: dict[str, Tensor] = {}
        for factor in self.factors:
            path |= factor.elimination(self.delta_f)
        return path

    def search(self, choose: Search, margin: float = 0.0) -> dict[str, Tensor]:
        """Search sets of correlated elements; independent ones each decide for themselves.

        Parameters
        ----------
        choose : callable
            From a correlated posterior and ln p(θ = 0) of its elements to a boolean tensor, True
            for those to drop.
        margin : float
            In nats: what dropping an element costs beyond its ΔF.

        Returns
        -------
        dict of Tensor
            By site, True where kept.
        """
        masks: dict[str, Tensor] = {}
        for factor in self.factors:
            masks |= factor.search(self.delta_f, choose, margin)
        return masks


def score(factors: tuple[Factor, ...]) -> Scores:
    """Score the removal of every element that may be reduced.

    Parameters
    ----------
    factors : tuple of Factor
        Posterior and prior.

    Returns
    -------
    Scores
        With one tensor a reducible site.

    Examples
    --------
    >>> score(()).delta_f
    {}
    """
    delta_f: dict[str, Tensor] = {}
    for factor in factors:
        delta_f |= factor.scores()
    return Scores(factors, delta_f)
