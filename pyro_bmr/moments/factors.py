"""A `Posterior` as factors with their priors, and what is left of it as a `Posterior`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.factors.joint_prior import JointPrior
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.moments import Moments, find_subspace
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.sites import Site

FIXED = "fixed: its variance is zero"


def to_factors(
    posterior: Posterior, rest: str
) -> tuple[tuple[Factor, ...], dict[str, Prior], dict[str, str]]:
    """Read the factors of a posterior, the priors of its sites, and why others stay whole.

    ``rest`` is what is left of a correlated prior, as `pyro_bmr.Spike` has it. What is fixed of a
    site that is not fixed as a whole has a standard normal in its place, and no prior.
    """
    whole = posterior.layout.split(posterior.free | ~posterior.kept)
    fixed = {name: FIXED for name, free in whole.items() if not free.any()}
    sites = tuple(
        Site(name, shape, len(shape), rest=rest)
        for name, shape in posterior.layout.shapes.items()
        if name not in fixed
    )
    mine = torch.cat(
        [torch.full_like(free, n not in fixed).reshape(-1) for n, free in whole.items()]
    )
    own, prior = _on_one_subspace(posterior)
    own, prior, kept = own.select(mine), prior.select(mine), posterior.kept[mine]
    free = posterior.free[mine]
    correlated = not _is_diagonal(prior.covariance)
    by_site = _split(sites, torch.where(free, _at_zero(prior), torch.inf), *_scales(prior))
    priors = {
        name: Prior(density, None if correlated else Diagonal(loc, scale))
        for name, (density, loc, scale) in by_site.items()
    }
    if not correlated and _is_diagonal(own.covariance):
        parts = _split(sites, *_scales(own), kept)
        return (
            tuple(
                IndependentFactor(site, loc, scale, mask=None if left.all() else left)
                for site, (loc, scale, left) in zip(sites, parts.values(), strict=True)
            ),
            priors,
            fixed,
        )
    joint = JointPrior(prior, free, rest == "marginal") if correlated else None
    mask = None if kept.all() else kept
    factor = JointFactor(sites, own.select(kept).dense(), mask, priors, joint)
    return (factor,), priors, fixed


def from_factors(posterior: Posterior, remaining: Sequence[Factor]) -> Posterior:
    """Return what is left of a posterior, with the prior of what is left."""
    places = posterior.layout.split(torch.arange(posterior.layout.size, device="cpu"))
    kept = posterior.kept.clone()
    loc, covariance = posterior.mean.clone(), posterior.covariance.clone()
    prior = Moments(posterior.prior_mean, posterior.prior_covariance)
    drop = ~kept
    for factor in remaining:
        index = torch.cat([places[site.name].reshape(-1) for site in factor.sites])
        left = torch.cat([factor.kept()[site.name].reshape(-1) for site in factor.sites])
        free = posterior.free[index]
        kept[index] = left
        locs = torch.cat([factor.locations()[site.name].reshape(-1) for site in factor.sites])
        loc[index] = torch.where(free | ~left, locs, loc[index])
        if isinstance(factor, JointFactor):
            whole = covariance.new_zeros(len(index), len(index))
            whole[left[:, None] & left] = factor.posterior.covariance.reshape(-1)
        else:
            scales = [m.scale.reshape(-1) for m in factor.marginals().values()]
            whole = torch.cat(scales).square().diag()
        stays = free[:, None] & free
        covariance[index[:, None], index] = torch.where(stays, whole, 0)
    drop = ~kept
    return posterior.replaced(loc, covariance, kept, _prior_of_rest(prior, drop, remaining))


def _prior_of_rest(prior: Moments, drop: Tensor, remaining: Sequence[Factor]) -> Moments:
    marginal = any(
        isinstance(factor, JointFactor) and factor.joint_prior and factor.joint_prior.marginal
        for factor in remaining
    )
    left = prior.select(~drop) if marginal else prior.given_zero(drop)
    loc, covariance = torch.zeros_like(prior.loc), torch.zeros_like(prior.covariance)
    loc[~drop] = left.loc
    covariance[(~drop)[:, None] & ~drop] = left.covariance.reshape(-1)
    return Moments(loc, covariance)


def _on_one_subspace(posterior: Posterior) -> tuple[Moments, Moments]:
    """Return posterior and prior where both vary, with standard normals for what is fixed.

    Directions in which the posterior has no variance left are as good as fixed, and leave the
    prior, too.
    """
    free = posterior.free
    both = free[:, None] & free
    ones = (~free).to(posterior.mean).diag()
    own = Moments(posterior.mean, torch.where(both, posterior.covariance, 0) + ones)
    covariance = torch.where(both, posterior.prior_covariance, 0) + ones
    loc = torch.where(free, posterior.prior_mean, posterior.mean)
    basis = find_subspace(own.covariance)
    if basis.shape[-1] == len(loc):
        return own, Moments(loc, covariance)
    projection = basis @ basis.mT
    moved = own.loc + projection @ (loc - own.loc)
    projected = projection @ covariance @ projection
    return own, Moments(moved, (projected + projected.mT) / 2)


def _is_diagonal(covariance: Tensor) -> bool:
    return bool((covariance.diagonal().diag() == covariance).all())


def _scales(moments: Moments) -> tuple[Tensor, Tensor]:
    return moments.loc, moments.covariance.diagonal().sqrt()


def _at_zero(moments: Moments) -> Tensor:
    """Return ln p(θ_i = 0) of each element."""
    loc, scale = _scales(moments)
    return Normal(loc, scale, validate_args=False).log_prob(torch.zeros_like(loc))


def _split(sites: Sequence[Site], *vectors: Tensor) -> dict[str, Any]:
    """Bring vectors into the shapes of sites."""
    sizes = [site.shape.numel() for site in sites]
    parts = zip(*(vector.split(sizes) for vector in vectors), strict=True)
    return {
        site.name: tuple(part.reshape(site.shape) for part in mine)
        for site, mine in zip(sites, parts, strict=True)
    }
