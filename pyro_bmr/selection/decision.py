"""What a reduction decided: which elements of a posterior go, and how to carry that out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.estimators.meter import Meter
from pyro_bmr.factors.factor import Factor, is_everything
from pyro_bmr.factors.switched import SwitchedFactor
from pyro_bmr.guides.common_noise import NoiseCoupling, couple
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.moments.factors import from_factors
from pyro_bmr.moments.no_program import NoProgram
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.switching import NewPrior, SwitchedModel
from pyro_bmr.units.producers_and_readers import Structure

_MOST_SAMPLED = 1024


def decide(
    origin: Origin,
    factors: tuple[Factor, ...],
    masks: Mapping[str, Tensor],
    spiked: Collection[str],
    structure: Structure | None = None,
) -> Decision:
    """Write down what goes of a posterior, and how to tell whether that has been trained since."""
    order = _order(factors, structure)
    shared = {name: tensor.detach().clone() for name, tensor in _find_shared(origin).items()}
    return Decision(origin, factors, masks, spiked, _sample(factors), order, shared)


@dataclass(frozen=True, eq=False)
class Decision:
    """A posterior with its priors, and what of it goes.

    ``masks``, by reducible site, is True where an element keeps its place or, if it can be shrunk,
    its prior; ``spiked`` are the sites whose reduced prior is the spike. ``sampled`` holds some of
    each site's locations at the time. Reduced one after the other in ``order``, sites add their
    parts of ΔF. The factors hold the tensors of the guide that came in, not copies; of what is run,
    the origin has a copy, and ``shared`` the values of what could not be copied. A ``meter`` is
    there while the decision is made.
    """

    origin: Origin
    factors: tuple[Factor, ...]
    masks: Mapping[str, Tensor]
    spiked: Collection[str]
    sampled: Mapping[str, Tensor]
    order: tuple[str, ...]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    meter: Meter | None = None

    def restrict(self, sites: Collection[str]) -> Decision:
        """Leave all other sites as they are; with no sites, nothing is reduced."""
        kept = {name: kept for factor in self.factors for name, kept in factor.kept().items()}
        masks = {n: m if n in sites else kept[n].contiguous() for n, m in self.masks.items()}
        return replace(self, masks=masks)

    def and_drop(self, masks: Mapping[str, Tensor]) -> Decision:
        """Drop also what masks, by reducible site, are False for."""
        return replace(self, masks={n: _both(m, masks.get(n, m)) for n, m in self.masks.items()})

    def in_order(self, structure: Structure | None) -> Decision:
        """Put producers of units after what reads them."""
        return replace(self, order=_order(self.factors, structure))

    def remaining(self) -> tuple[Factor, ...]:
        """Return the posterior given that all that goes is at zero."""
        return tuple(factor.prune(self.masks) for factor in self.factors)

    def assemble(
        self, remaining: tuple[Factor, ...] | None = None
    ) -> tuple[PrunedModel, PrunedGuide, dict[str, Tensor]]:
        """Make the reduced model, guide (of its own tensors) and masks of `pyro_bmr.Reduction`."""
        remaining = self.remaining() if remaining is None else remaining
        new_priors = self._new_priors()
        model, guide, masks = assemble(self.origin, remaining, new_priors, self.spiked)
        return model, guide, masks | {name: new.mask for name, new in new_priors.items()}

    def changed(self) -> tuple[str, ...]:
        """Return the sites of which something goes or takes another prior, in ``order``."""
        kept = {name: kept for factor in self.factors for name, kept in factor.kept().items()}
        changed = {n for n, mask in self.masks.items() if bool((kept[n] & ~mask).any())}
        return tuple(name for name in self.order if name in changed)

    def couplings(self) -> dict[str, NoiseCoupling]:
        """By statement of the reduced guide, how to draw it from the noise of the one before."""
        # Shrinkage leaves correlated elements their number, and the order of their noise.
        shrunk = [f.factor for f in self.factors if isinstance(f, SwitchedFactor)]
        return couple(shrunk) | couple(self.factors, self.masks)

    def check_unchanged(self) -> None:
        """Raise a ``ValueError`` if the guide that was reduced has been trained since."""
        now = _sample(self.factors)
        if not all(torch.equal(now[name], then) for name, then in self.sampled.items()):
            msg = (
                "the guide that was reduced has been trained on since, and a reduction keeps no "
                "copy of it. Expected it as it was: reduce it again, or copy.deepcopy it before "
                "training on"
            )
            raise ValueError(msg)

    def is_shared_unchanged(self) -> bool:
        """Tell whether what is run, and could not be copied, is as it was."""
        tensors = _find_shared(self.origin)
        return all(torch.equal(tensors[name], then) for name, then in self.shared.items())

    @contextmanager
    @torch.no_grad()
    def as_it_was(self) -> Iterator[None]:
        """Put what is run, and could not be copied, back to what it was, for a while."""
        tensors = _find_shared(self.origin)
        now = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, then in self.shared.items():
            tensors[name].copy_(then)
        try:
            yield
        finally:
            for name, value in now.items():
                tensors[name].copy_(value)

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


def assemble(
    origin: Origin,
    remaining: tuple[Factor, ...],
    new_priors: Mapping[str, NewPrior],
    spiked: Collection[str] = (),
) -> tuple[PrunedModel, PrunedGuide, dict[str, Tensor]]:
    """Make the model and the guide of a reduced posterior, and the masks of what is not zero."""
    if origin.moments is not None:
        return _assemble_moments(origin.moments, remaining, new_priors, spiked)
    full_model: Any = origin.model
    if new_priors:
        full_model = SwitchedModel(full_model, new_priors)
    masks = {
        name: kept
        for factor in remaining
        for name, kept in factor.kept().items()
        if name in spiked or not kept.all()
    }
    guide = PrunedGuide(remaining, replace(origin, model=full_model))
    sites = [site for factor in remaining for site in factor.sites]
    centers = {site.name: site.center for site in sites if site.center is not None}
    marginal = [site.name for site in sites if site.rest == "marginal" and site.name in masks]
    return PrunedModel(full_model, masks, centers, marginal), guide, masks


def _assemble_moments(
    moments: Posterior,
    remaining: tuple[Factor, ...],
    new_priors: Mapping[str, NewPrior],
    spiked: Collection[str],
) -> Any:
    kept = {name: kept for factor in remaining for name, kept in factor.kept().items()}
    masks = {name: mask for name, mask in kept.items() if name in spiked or not mask.all()}
    return NoProgram(), from_factors(moments, remaining, new_priors), masks


def _order(factors: tuple[Factor, ...], structure: Structure | None) -> tuple[str, ...]:
    """Put sites in an order in which their parts of ΔF come true one after the other."""
    # Correlated ones are conditioned on in the order of their vector. What is released, as nothing
    # depends on it any more, comes after what read it.
    ahead: dict[str, set[str]] = {}
    for factor in factors:
        names = [site.name for site in factor.sites]
        for i, name in enumerate(names):
            readers = structure.find_readers(name) if structure and len(names) == 1 else set()
            ahead[name] = set(names[:i]) | (readers - {name})
    order: list[str] = []
    while ahead:
        free = (name for name, before in ahead.items() if not before & ahead.keys())
        # Sites that read each other have no order.
        order.append(next(free, next(iter(ahead))))
        del ahead[order[-1]]
    return tuple(order)


def _both(one: Tensor, other: Tensor) -> Tensor:
    """Keep what two masks keep, in memory of its own only if need be."""
    return other if is_everything(one) else one & other


def _sample(factors: tuple[Factor, ...]) -> dict[str, Tensor]:
    """Take some locations of every site, evenly spaced."""
    found = {name: loc for factor in factors for name, loc in factor.locations().items()}
    return {
        name: value.reshape(-1)[:: max(1, value.numel() // _MOST_SAMPLED)].clone()
        for name, value in found.items()
    }


def _find_shared(origin: Origin) -> dict[str, Tensor]:
    program = origin.program
    return {} if program is None else program.find_shared(origin.args, origin.kwargs)
