"""What a reduction decided: which elements of a posterior go, and how to carry that out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.problem import assemble
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.shrunk.switched_factors import SwitchedFactor
from pyro_bmr.shrunk.switching import NewPrior

_MOST_SAMPLED = 1024


def decide(
    origin: Origin,
    factors: tuple[Factor, ...],
    masks: Mapping[str, Tensor],
    spiked: Collection[str],
) -> Decision:
    """Write down what goes of a posterior, and how to tell whether that has been trained since.

    Parameters
    ----------
    origin, factors, masks, spiked
        See `Decision`.

    Returns
    -------
    Decision
        Its tensors are those of the factors, not copies.

    Examples
    --------
    >>> decide(Origin(print), (), {}, ()).assemble()[2]
    {}
    """
    sampled = {name: value.clone() for name, value in _sample(factors).items()}
    return Decision(origin, factors, masks, spiked, sampled)


@dataclass(frozen=True, eq=False)
class Decision:
    """A posterior with its priors, and what of it goes.

    Parameters
    ----------
    origin : Origin
        The full model, and what to call it with.
    factors : tuple of Factor
        The posterior before the reduction. Its tensors are those of the guide that came in.
    masks : mapping
        By reducible site, True where an element keeps its place or, if shrunk, its prior.
    spiked : collection of str
        Sites whose reduced prior is the spike.
    sampled : mapping
        By site, some of its locations at the time.
    """

    origin: Origin
    factors: tuple[Factor, ...]
    masks: Mapping[str, Tensor]
    spiked: Collection[str]
    sampled: Mapping[str, Tensor]

    def restrict(self, sites: Collection[str]) -> Decision:
        """Leave all other sites as they are.

        Parameters
        ----------
        sites : collection of str
            Those to reduce; none of them gives the full model and guide.

        Returns
        -------
        Decision
            Of these alone.
        """
        kept = {name: kept for factor in self.factors for name, kept in factor.kept().items()}
        masks = {n: mask if n in sites else kept[n].contiguous() for n, mask in self.masks.items()}
        return replace(self, masks=masks)

    def remaining(self) -> tuple[Factor, ...]:
        """Return the posterior given that all that goes is at zero.

        Returns
        -------
        tuple of Factor
            As many as there were.
        """
        return tuple(factor.prune(self.masks) for factor in self.factors)

    def assemble(
        self, remaining: tuple[Factor, ...] | None = None
    ) -> tuple[PrunedModel, PrunedGuide, dict[str, Tensor]]:
        """Make the reduced model and guide.

        Parameters
        ----------
        remaining : tuple of Factor, optional
            What `remaining` returned, if it is at hand.

        Returns
        -------
        model, guide, masks
            The masks as in `pyro_bmr.Reduction`; the tensors of the guide are copies.
        """
        remaining = self.remaining() if remaining is None else remaining
        new_priors = self._new_priors()
        model, guide, masks = assemble(self.origin, remaining, new_priors, self.spiked)
        return model, guide, masks | {name: new.mask for name, new in new_priors.items()}

    def check_unchanged(self) -> None:
        """Look whether the guide that was reduced has been trained since.

        Raises
        ------
        ValueError
            If its locations are other ones now.
        """
        now = _sample(self.factors)
        if not all(torch.equal(now[name], then) for name, then in self.sampled.items()):
            msg = (
                "the guide that was reduced has been trained on since, and a reduction keeps no "
                "copy of it. Expected it as it was: reduce it again, or copy.deepcopy it before "
                "training on"
            )
            raise ValueError(msg)

    def _new_priors(self) -> dict[str, NewPrior]:
        """By site that is shrunk, the new prior; its mask is True for what keeps the old one."""
        return {
            name: new
            for factor in self.factors
            if isinstance(factor, SwitchedFactor)
            for name, new in factor.new_priors(
                {n: self.masks[n] & kept for n, kept in factor.kept().items() if n in self.masks}
            ).items()
        }


def _sample(factors: tuple[Factor, ...]) -> dict[str, Tensor]:
    """Take some locations of every site, evenly spaced."""
    return {
        name: loc.reshape(-1)[:: max(1, loc.numel() // _MOST_SAMPLED)]
        for factor in factors
        for name, loc in factor.locations().items()
    }
