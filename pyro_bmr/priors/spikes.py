"""Where the spike of each site is: at a number, or at the mean of its prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints

from pyro_bmr.factors.centering import value_locations
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.reduced_priors import ReducedPrior, Spike
from pyro_bmr.priors.all_rows import Run, read_in_all_rows, sees_part
from pyro_bmr.priors.families import (
    MOST_JOINT,
    UnreadablePriorError,
    is_transformed_by_support,
)
from pyro_bmr.programs.centers import Center, find_mean, shift
from pyro_bmr.programs.distributions import find_core, find_element_support, is_positive
from pyro_bmr.programs.model_runs import ModelRuns, find_gradients
from pyro_bmr.programs.sites import Site

# In unconstrained coordinates of a support that has ends.
_FARTHEST = 100.0


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
    priors = cache(lambda: _Priors(model, args, kwargs, factors))
    centers: dict[str, Center] = {}
    failures: dict[str, str] = {}
    gaussian = (f for f in factors if isinstance(f, IndependentFactor | JointFactor))
    for site in (site for factor in gaussian for site in factor.sites):
        loc = _find_loc(site, reduced_prior)
        try:
            if isinstance(loc, str):
                centers[site.name] = priors().center_at_mean(site)
            elif loc is not None and (offset := _find_offset(site, loc)).any():
                centers[site.name] = priors().center_at(site, offset)
        except UnreadablePriorError as error:
            failures[site.name] = str(error)
    return centers, failures


def set_rests(
    factors: Sequence[Factor], reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> tuple[Factor, ...]:
    """Write down what is left of each site under a correlated prior, as its spike has it.

    Where something was pruned before, that stays as it was then.
    """

    def set_rest(site: Site, kept: Tensor) -> Site:
        one = _find_spike(site, reduced_prior)
        if one is None or one.rest == site.rest or not kept.all():
            return site
        return replace(site, rest=one.rest)

    def set_all(factor: Factor) -> Factor:
        kept = factor.kept()
        if isinstance(factor, IndependentFactor):
            return replace(factor, site=set_rest(factor.site, kept[factor.site.name]))
        if isinstance(factor, JointFactor):
            sites = tuple(set_rest(site, kept[site.name]) for site in factor.sites)
            return replace(factor, joint_sites=sites)
        return factor

    return tuple(map(set_all, factors))


def find_vanishing(
    factors: Sequence[Factor], reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> list[Site]:
    """Find positive sites whose spike is at zero, where only the free energy can be measured."""
    return _find_positive(factors, (IndependentFactor, GammaFactor), reduced_prior)


def find_correlated_positive(
    factors: Sequence[Factor], reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> list[Site]:
    """Find those that would be such sites, were their posterior not correlated."""
    return _find_positive(factors, (JointFactor,), reduced_prior)


def _find_positive(
    factors: Sequence[Factor],
    kinds: tuple[type[Factor], ...],
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
) -> list[Site]:
    sites = (site for factor in factors if isinstance(factor, kinds) for site in factor.sites)
    positive = (site for site in sites if is_positive(find_element_support(site.support)))
    locs = ((site, _find_loc(site, reduced_prior)) for site in positive)
    return [site for site, loc in locs if isinstance(loc, float | int) and loc == 0]


def _find_loc(
    site: Site, reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> float | Tensor | str | None:
    """Say where the spike of a site is, if its reduced prior is one."""
    one = _find_spike(site, reduced_prior)
    return None if one is None else one.loc


def _find_spike(
    site: Site, reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> Spike | None:
    one = reduced_prior.get(site.name) if isinstance(reduced_prior, Mapping) else reduced_prior
    return one if isinstance(one, Spike) else None


def _find_offset(site: Site, loc: float | Tensor) -> Tensor:
    """Return the unconstrained value of a spike; 0 of one whose shape is refused elsewhere."""
    value = torch.as_tensor(loc, dtype=torch.float64, device="cpu")
    support = find_element_support(site.support)
    transform = biject_to(support)
    if transform.domain.event_dim:
        msg = f"it is constrained to {support}, which ties its elements together"
        raise UnreadablePriorError(msg)
    if not _fits(value, site.shape):
        return torch.zeros((), device="cpu")
    offset = transform.inv(value)
    # Inverses stop short of infinity at the ends of a support.
    inside = type(support) is type(constraints.real) or bool((offset.abs() < _FARTHEST).all())
    if not (inside and support.check(value).all()):
        raise UnreadablePriorError(_outside(value, support))
    return offset


def _outside(value: Tensor, support: Any) -> str:
    spike = f"{value:g}" if value.dim() == 0 else "some of the spike"
    kind = "positive" if is_positive(support) else f"constrained to {support}"
    return f"it is {kind}, and {spike} is not; Spike(loc=...) names a value that is"


class _Priors:
    """Priors in a run of the model, and their means as functions of other sites."""

    def __init__(self, model: Any, args: Any, kwargs: Any, factors: Sequence[Factor]) -> None:
        self.holders = {site.name: factor for factor in factors for site in factor.sites}
        locations = {
            site.name: (replace(site, center=None), value_locations(factor)[site.name])
            for factor in factors
            for site in factor.sites
        }
        self.runs = ModelRuns(model, args, kwargs, locations)
        self.nodes, self.leaves = self.runs.here()

    def center_at(self, site: Site, offset: Tensor) -> Center:
        """Put the center of a site at a number."""
        self._read(site)
        return Center(offset.expand(site.shape), offset.new_zeros(site.shape, dtype=torch.bool))

    def center_at_mean(self, site: Site) -> Center:
        r"""Write the mean of a prior as :math:`c_0 + \sum_j W_j v_j`, or say why that cannot be."""
        self._read(site)
        mean = self._mean(site)
        with torch.enable_grad():
            flat = detach_provenance(mean).expand(site.shape).reshape(-1)
            weights = self._differentiate(flat)
        self._check_held(site, weights)
        offset = flat.detach().double()
        for name, weight in weights.items():
            offset = offset - weight @ self.leaves[name].detach().double().reshape(-1)
        at_mean = offset.new_ones(site.shape, dtype=torch.bool)
        center = Center(offset.reshape(site.shape), at_mean, weights)
        self._check_linear(site, center)
        return center

    def _read(self, site: Site) -> Any:
        """Return the prior of a site, of a family that can be measured from elsewhere."""
        if site.name not in self.nodes:
            msg = "it is not in the model"
            raise UnreadablePriorError(msg)
        prior = self.nodes[site.name]["fn"]
        core = find_core(prior)
        try:
            shift(prior, torch.zeros((), device="cpu"))
        except NotImplementedError as error:
            unknown = str(error)
        else:
            # Of another transform, a shift is none of its base.
            known = not isinstance(core, TransformedDistribution) or is_transformed_by_support(core)
            unknown = "" if known else type(core).__name__
        if unknown:
            msg = f"its prior is a {unknown}, which only Spike(loc=0.0) knows"
            raise UnreadablePriorError(msg)
        return prior

    def _mean(self, site: Site) -> Tensor:
        """Return the mean of a prior, with its gradients where a run sees all rows."""
        node = self.nodes[site.name]
        with torch.enable_grad():
            mean = find_mean(node["fn"])
        if not mean.isfinite().all():
            msg = "its prior has no mean for the spike to be at"
            raise UnreadablePriorError(msg)
        if not sees_part(node):
            return mean
        parents = sorted(find_gradients(mean, self.leaves))
        if parents:
            msg = (
                f"the mean of its prior is computed from {parents}, and known only in some rows of "
                "its plates; pass arguments that show all rows"
            )
            raise UnreadablePriorError(msg)
        return _read_mean(site, self.nodes, self.runs.at_rows)

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
        if len(names) > 1 and size > MOST_JOINT:
            msg = (
                f"the mean of its prior is computed from {sorted({*weights})}, and their joint "
                f"posterior has {size:,} elements, more than {MOST_JOINT:,}"
            )
            raise UnreadablePriorError(msg)

    def _check_linear(self, site: Site, center: Center) -> None:
        """Move all sites, and see whether the mean goes where it should."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        for reach in (1.0, 10.0):
            moved = {}
            for name, (_, loc) in self.runs.locations.items():
                noise = torch.randn(loc.shape, generator=generator, device="cpu")
                moved[name] = loc + reach * noise.to(loc)
            with self.runs.elsewhere() as run:
                mean = _read_mean(site, run(moved), partial(run, moved))
            expected = center.offset.reshape(-1)
            for name, weight in center.weights.items():
                expected = expected + weight @ moved[name].double().reshape(-1)
            whole = mean.expand(site.shape).double().reshape(-1)
            if not torch.allclose(whole, expected, rtol=1e-3, atol=1e-4):
                names = sorted(center.weights) or "other sites"
                msg = f"the mean of its prior is not linear in the values of {names}"
                raise UnreadablePriorError(msg)


def _read_mean(site: Site, nodes: Mapping[str, Any], run: Run) -> Tensor:
    """Read the mean of a prior in all rows."""

    def read(nodes: Mapping[str, Any]) -> list[Tensor]:
        return [detach_provenance(find_mean(nodes[site.name]["fn"])).detach()]

    (mean,) = read_in_all_rows(site.name, nodes, run, read)
    return mean


def _fits(value: Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        return False
