"""Measuring the sites of a posterior from other centers, which leaves the posterior what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor, to_joint
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.programs.centers import Center, add_weighted
from pyro_bmr.programs.sites import Site


def recenter(factors: Sequence[Factor], centers: Mapping[str, Center]) -> tuple[Factor, ...]:
    r"""Measure what is left of all sites from ``centers``, or from zero; what was pruned stays.

    With :math:`(I - W) v = u + c` for values :math:`v`,

    .. math:: u' = (I - W') (I - W)^{-1} (u + c) - c'

    so that sites whose center is computed from other sites, which must come before them in the
    order of ``factors``, are of one joint factor with these.
    """
    merged = _merge_related(factors, centers)
    return tuple(
        _RECENTER[type(factor)](factor, centers) if type(factor) in _RECENTER else factor
        for factor in merged
    )


def value_locations(factor: Factor) -> dict[str, Tensor]:
    """Return the means of a factor's unconstrained values, measured from zero."""
    flat = {name: loc.reshape(-1) for name, loc in factor.locations().items()}
    added = add_weighted(factor.sites, flat)
    return {
        site.name: added[site.name].reshape(site.shape)
        + (0 if site.center is None else site.center.offset.to(added[site.name]))
        for site in factor.sites
    }


def value_marginals(factor: Factor) -> dict[str, Diagonal]:
    """Return the marginals of a Gaussian factor's unconstrained values, measured from zero."""
    locations = value_locations(factor)
    scales = {name: marginal.scale for name, marginal in factor.marginals().items()}
    if isinstance(factor, JointFactor) and _has_weights(factor.sites):
        device = factor.posterior.loc.device
        mixing = torch.linalg.inv(_unmix(factor.sites, device))[:, factor.flat_mask]
        flat = (mixing @ _to_dense(factor.posterior).scale_tril).norm(dim=-1).to(_dtype(factor))
        sizes = [site.shape.numel() for site in factor.sites]
        parts = zip(factor.sites, flat.split(sizes), strict=True)
        scales = {site.name: part.reshape(site.shape) for site, part in parts}
    return {name: Diagonal(loc, scales[name]) for name, loc in locations.items()}


def _merge_related(factors: Sequence[Factor], centers: Mapping[str, Center]) -> list[Factor]:
    """Join factors whose sites enter each other's centers."""
    merged = list(factors)
    for name, center in centers.items():
        wanted = {name, *center.weights}
        if not center.weights:
            continue
        together = [f for f in merged if wanted & {site.name for site in f.sites}]
        if len(together) > 1:
            at = merged.index(together[0])
            merged[at] = _merge(together, [site.name for f in factors for site in f.sites])
            merged = [f for f in merged if f not in together[1:]]
    return merged


def _merge(factors: Sequence[Factor], order: Sequence[str]) -> JointFactor:
    """Make one joint factor of independent ones, its sites in the order that is given."""
    joint = [to_joint(factor) for factor in factors]
    sites = [site for factor in joint for site in factor.sites]
    ends = list(accumulate((site.shape.numel() for site in sites), initial=0))
    ranks = sorted(range(len(sites)), key=lambda i: order.index(sites[i].name))
    places = torch.cat([torch.arange(ends[i], ends[i + 1], device="cpu") for i in ranks])
    mask = torch.cat([factor.flat_mask for factor in joint])
    posteriors = [_to_dense(factor.posterior) for factor in joint]
    loc = torch.cat([one.loc for one in posteriors])
    root = torch.block_diag(*(one.scale_tril for one in posteriors))
    # Which rows of the posterior, over what is left, stand where in the new order.
    rows = (mask.long().cumsum(0) - 1)[places][mask[places]]
    ordered = Dense(loc[rows], torch.linalg.cholesky((root @ root.mT)[rows][:, rows]))
    whole = None if mask.all() else mask[places]
    return JointFactor(tuple(sites[i] for i in ranks), ordered.to(_dtype(joint[0])), whole)


def _recenter_independent(
    factor: IndependentFactor, centers: Mapping[str, Center]
) -> IndependentFactor:
    if factor.site.center is None and factor.site.name not in centers:
        return factor
    center = _target(factor.site, factor.kept()[factor.site.name], centers)
    device = factor.loc.device
    before = _offsets([factor.site], device)
    after = _offsets([replace(factor.site, center=center)], device)
    step = (before - after).to(factor.loc).reshape(factor.loc.shape)
    # What is pruned may be at minus infinity.
    shifted = factor.loc + torch.where(factor.kept()[factor.site.name], step, 0)
    return replace(factor, site=replace(factor.site, center=center), loc=shifted)


def _recenter_joint(factor: JointFactor, centers: Mapping[str, Center]) -> JointFactor:
    kept = factor.kept()
    sites = tuple(replace(s, center=_target(s, kept[s.name], centers)) for s in factor.sites)
    if all(site.center is None for site in (*sites, *factor.sites)):
        return factor
    left, dtype, device = factor.flat_mask, _dtype(factor), factor.posterior.loc.device
    before, after = _offsets(factor.sites, device), _offsets(sites, device)
    if not (_has_weights(sites) or _has_weights(factor.sites)):
        loc = factor.posterior.loc + (before - after)[left].to(dtype)
        return replace(factor, joint_sites=sites, posterior=replace(factor.posterior, loc=loc))
    change = torch.linalg.solve_triangular(
        *(_unmix(factor.sites, device), _unmix(sites, device)),
        upper=False,
        left=False,
        unitriangular=True,
    )
    posterior, inner = _to_dense(factor.posterior), change[left][:, left]
    # A unit lower triangular matrix times a Cholesky factor is one.
    loc = inner @ posterior.loc + (change @ before - after)[left]
    moved = Dense(loc, inner @ posterior.scale_tril).to(dtype)
    return replace(factor, joint_sites=sites, posterior=moved)


def _target(site: Site, kept: Tensor, centers: Mapping[str, Center]) -> Center | None:
    """Give what is left of a site its new center, and what was pruned that which it has."""
    new, old = centers.get(site.name), site.center
    if old is None and (new is None or bool(kept.all())):
        return new
    if new is None and bool(kept.all()):
        return None
    zero = torch.zeros_like(kept, dtype=torch.float64)
    none = Center(zero, torch.zeros_like(kept))
    return _combine(kept, new or none, old or none)


def _combine(kept: Tensor, new: Center, old: Center) -> Center | None:
    """Take one center where an element is kept, and another elsewhere."""
    new, old = new.to(kept.device), old.to(kept.device)
    offset = torch.where(kept, new.offset, old.offset)
    at_mean = torch.where(kept, new.at_mean, old.at_mean)
    nothing, rows = offset.new_zeros(1, 1), kept.reshape(-1, 1)
    weights = {
        name: torch.where(rows, new.weights.get(name, nothing), old.weights.get(name, nothing))
        for name in {**old.weights, **new.weights}
    }
    weights = {name: weight for name, weight in weights.items() if weight.any()}
    if not (weights or at_mean.any() or offset.any()):
        return None
    return Center(offset, at_mean, weights)


def _unmix(sites: Sequence[Site], device: torch.device) -> Tensor:
    """Return :math:`I - W` over the flattened elements of all sites."""
    sizes = [site.shape.numel() for site in sites]
    matrix = torch.eye(sum(sizes), dtype=torch.float64, device=device)
    places: dict[str, slice] = {}
    end = 0
    for site, size in zip(sites, sizes, strict=True):
        here = places[site.name] = slice(end, end + size)
        for name, weight in ({} if site.center is None else site.center.weights).items():
            matrix[here, places[name]] = -weight.to(matrix)
        end = here.stop
    return matrix


def _offsets(sites: Iterable[Site], device: torch.device) -> Tensor:
    parts = [
        torch.zeros(site.shape.numel(), dtype=torch.float64, device=device)
        if site.center is None
        else site.center.offset.to(device).double().reshape(-1)
        for site in sites
    ]
    return torch.cat(parts)


def _has_weights(sites: Iterable[Site]) -> bool:
    return any(site.center is not None and site.center.weights for site in sites)


def _to_dense(posterior: Dense | LowRank) -> Dense:
    exact = posterior.to(torch.float64)
    return exact.dense() if isinstance(exact, LowRank) else exact


def _dtype(factor: JointFactor) -> torch.dtype:
    return factor.posterior.loc.dtype


_RECENTER: Any = {IndependentFactor: _recenter_independent, JointFactor: _recenter_joint}
