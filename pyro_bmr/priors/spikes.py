"""Where the spike of each site is: at a number, or at the mean of its prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_bmr.factors.centering import value_locations
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.reduced_priors import ReducedPrior, Spike
from pyro_bmr.priors.families import UnreadablePriorError
from pyro_bmr.programs.centers import Center, find_mean, shift
from pyro_bmr.programs.distributions import find_element_support, is_positive
from pyro_bmr.programs.model_runs import ModelRuns, find_gradients
from pyro_bmr.programs.sites import Site

# More correlated elements than this take too much memory.
_MOST_JOINT = 4_096


def find_centers(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    factors: Sequence[Factor],
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
) -> tuple[dict[str, Center], dict[str, str]]:
    """Find the centers of sites whose spike is not at zero, and why others have none.

    ``factors`` are measured from zero but for what was pruned before.
    """
    means = cache(lambda: _Means(model, args, kwargs, factors))
    centers: dict[str, Center] = {}
    failures: dict[str, str] = {}
    gaussian = (f for f in factors if isinstance(f, IndependentFactor | JointFactor))
    for site in (site for factor in gaussian for site in factor.sites):
        mapping = isinstance(reduced_prior, Mapping)
        spike = reduced_prior.get(site.name) if mapping else reduced_prior
        try:
            if not isinstance(spike, Spike):
                continue
            if isinstance(spike.loc, str):
                centers[site.name] = means().center(site)
            else:
                centers |= _at_number(site, spike.loc)
        except UnreadablePriorError as error:
            failures[site.name] = str(error)
    return centers, failures


def find_vanishing(
    factors: Sequence[Factor], reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> list[Site]:
    """Find positive sites whose spike is at zero, where only the free energy can be measured."""
    found = []
    for site in (f.site for f in factors if isinstance(f, IndependentFactor | GammaFactor)):
        mapping = isinstance(reduced_prior, Mapping)
        spike = reduced_prior.get(site.name) if mapping else reduced_prior
        at_zero = isinstance(spike, Spike) and spike.loc == 0
        if is_positive(find_element_support(site.support)) and at_zero:
            found.append(site)
    return found


def _at_number(site: Site, loc: float | Tensor) -> dict[str, Center]:
    value, support = torch.as_tensor(loc, dtype=torch.float64), find_element_support(site.support)
    if support is constraints.real and not value.any():
        return {}
    transform = biject_to(support)
    if transform.domain.event_dim:
        msg = f"it is constrained to {support}, which ties its elements together"
        raise UnreadablePriorError(msg)
    if not _fits(value, site.shape):
        return {}
    offset = transform.inv(value)
    if not (support.check(value) & offset.isfinite()).all():
        raise UnreadablePriorError(_outside(value, support))
    return {site.name: Center(offset.expand(site.shape), torch.zeros(site.shape).bool())}


def _outside(value: Tensor, support: Any) -> str:
    spike = f"{value:g}" if value.dim() == 0 else "some of the spike"
    kind = "positive" if is_positive(support) else f"constrained to {support}"
    return f"it is {kind}, and {spike} is not inside; Spike(loc=...) may be"


class _Means:
    """The means of priors as functions of other sites, from a run of the model."""

    def __init__(self, model: Any, args: Any, kwargs: Any, factors: Sequence[Factor]) -> None:
        self.holders = {site.name: factor for factor in factors for site in factor.sites}
        locations = {
            site.name: (replace(site, center=None), value_locations(factor)[site.name])
            for factor in factors
            for site in factor.sites
        }
        self.runs = ModelRuns(model, args, kwargs, locations)
        self.nodes, self.leaves = self.runs.here()

    def center(self, site: Site) -> Center:
        r"""Write the mean of a prior as :math:`c_0 + \sum_j W_j v_j`, or say why that cannot be."""
        prior = self.nodes[site.name]["fn"]
        mean = self._mean(site, prior)
        try:
            shift(prior, mean)
        except NotImplementedError as error:
            msg = f'its prior is a {error}, which Spike(loc="prior") does not know'
            raise UnreadablePriorError(msg) from None
        with torch.enable_grad():
            flat = detach_provenance(mean).expand(site.shape).reshape(-1)
            weights = self._differentiate(flat)
        self._check_held(site, weights)
        offset = flat.detach().double()
        for name, weight in weights.items():
            offset = offset - weight @ self.leaves[name].detach().double().reshape(-1)
        center = Center(offset.reshape(site.shape), torch.ones(site.shape).bool(), weights)
        self._check_linear(site, center)
        return center

    def _mean(self, site: Site, prior: Any) -> Tensor:
        with torch.enable_grad():
            mean = find_mean(prior)
        if not mean.isfinite().all():
            msg = "its prior has no mean for the spike to be at"
            raise UnreadablePriorError(msg)
        try:
            mean.expand(site.shape)
        except RuntimeError:
            msg = (
                "the mean of its prior is known only in some rows of its plates; pass arguments "
                "that show all rows"
            )
            raise UnreadablePriorError(msg) from None
        return mean

    def _differentiate(self, flat: Tensor) -> dict[str, Tensor]:
        parents = [name for name, slope in find_gradients(flat, self.leaves).items()]
        if not parents:
            return {}
        leaves = [self.leaves[name] for name in parents]
        rows = [
            torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True) for one in flat
        ]
        found = {}
        for i, (name, leaf) in enumerate(zip(parents, leaves, strict=True)):
            parts = [torch.zeros_like(leaf) if row[i] is None else row[i] for row in rows]
            weight = torch.stack(parts).reshape(len(flat), -1).double()
            if weight.any():
                found[name] = weight
        return found

    def _check_held(self, site: Site, weights: Iterable[str]) -> None:
        names = [name for name in self.holders if name in {site.name, *weights}]
        factors = {id(self.holders[name]): self.holders[name] for name in names}.values()
        for factor in factors:
            if not isinstance(factor, IndependentFactor | JointFactor):
                msg = f"the mean of its prior depends on {factor.sites[0].name!r}, not a Gaussian"
                raise UnreadablePriorError(msg)
        size = sum(s.shape.numel() for factor in factors for s in factor.sites)
        if len(names) > 1 and size > _MOST_JOINT:
            msg = (
                f"the mean of its prior is computed from {sorted({*weights})}, and their joint "
                f"posterior has {size:,} elements, more than {_MOST_JOINT:,}"
            )
            raise UnreadablePriorError(msg)

    def _check_linear(self, site: Site, center: Center) -> None:
        """Move all sites, and see whether the mean goes where it should."""
        generator = torch.Generator().manual_seed(0)
        for reach in (1.0, 10.0):
            moved = {
                name: loc + reach * torch.randn(loc.shape, generator=generator).to(loc)
                for name, (_, loc) in self.runs.locations.items()
            }
            with self.runs.elsewhere() as run:
                mean = find_mean(run(moved)[site.name]["fn"]).expand(site.shape).double()
            expected = center.offset.reshape(-1)
            for name, weight in center.weights.items():
                expected = expected + weight @ moved[name].double().reshape(-1)
            if not torch.allclose(mean.reshape(-1), expected, rtol=1e-3, atol=1e-4):
                names = sorted(center.weights) or "other sites"
                msg = f"the mean of its prior is not linear in the values of {names}"
                raise UnreadablePriorError(msg)


def _fits(value: Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        return False
