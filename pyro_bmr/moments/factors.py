"""A `Posterior` as factors with their priors, and what is left of it as a `Posterior`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_bmr.display import warn
from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.factors.joint_prior import JointPrior
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.moments import Moments, find_subspace
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.sites import Site
from pyro_bmr.programs.switching import NewPrior

FIXED = "fixed: its variance is zero"


def to_factors(
    posterior: Posterior, rest: str
) -> tuple[tuple[Factor, ...], dict[str, Prior], dict[str, str]]:
    """Read the factors of a posterior, the priors of its sites, and why others stay whole.

    ``rest`` is what is left of a correlated prior, as `pyro_bmr.Spike` has it. What is fixed of a
    site that is not fixed as a whole has a standard normal in its place, and no prior.
    """
    present = posterior.layout.split(posterior.free | ~posterior.kept)
    fixed = {name: FIXED for name, some in present.items() if not some.any()}
    sites = tuple(
        Site(name, shape, len(shape), rest=rest)
        for name, shape in posterior.layout.shapes.items()
        if name not in fixed
    )
    parts = [torch.full_like(some, n not in fixed).reshape(-1) for n, some in present.items()]
    mine = torch.cat(parts)
    free, kept = posterior.free[mine], posterior.kept[mine]
    loc = torch.where(posterior.free, posterior.prior_mean, posterior.mean)[mine]
    scale = torch.where(free, posterior.prior_variance[mine].sqrt(), 1.0)
    density = Normal(loc, scale, validate_args=False).log_prob(torch.zeros_like(loc))
    diagonal = _is_diagonal(posterior.prior_spread) and _is_diagonal(posterior.spread)
    by_site = _split(sites, torch.where(free, density, torch.inf), loc, scale)
    priors = {
        name: Prior(at_zero, Diagonal(own_loc, own_scale))
        for name, (at_zero, own_loc, own_scale) in by_site.items()
    }
    if diagonal:
        own = torch.where(free, posterior.variance[mine].sqrt(), 1.0)
        columns = _split(sites, posterior.mean[mine], own, kept).values()
        factors = tuple(
            IndependentFactor(site, loc, scale, mask=None if left.all() else left)
            for site, (loc, scale, left) in zip(sites, columns, strict=True)
        )
        return factors, priors, fixed
    _check_fixed(posterior, rest)
    q, p = (one.select(mine) for one in _on_one_subspace(posterior))
    correlated = not _is_diagonal(p.covariance) or q.select(kept).singular
    joint = JointPrior(p, free, rest == "marginal") if correlated else None
    if correlated:
        index = _split(sites, torch.arange(len(loc), device=loc.device))
        priors = {
            name: replace(prior, gaussian=None, joint=p.select(index[name][0].reshape(-1)))
            for name, prior in priors.items()
        }
    mask = None if kept.all() else kept
    return (JointFactor(sites, q.select(kept).dense(), mask, priors, joint),), priors, fixed


def from_factors(
    posterior: Posterior, remaining: Sequence[Factor], new_priors: Mapping[str, NewPrior]
) -> Posterior:
    """Return what is left of a posterior, of which some may have new Gaussian priors."""
    places = posterior.layout.split(torch.arange(posterior.layout.size, device="cpu"))
    kept, mean = posterior.kept.clone(), posterior.mean.clone()
    joint = [factor for factor in remaining if isinstance(factor, JointFactor)]
    spread = (posterior.covariance if joint else posterior.variance).clone()
    for factor in remaining:
        index = _gather(places, factor)
        left, free = _gather(factor.kept(), factor), posterior.free[index]
        kept[index] = left
        mean[index] = torch.where(free | ~left, _gather(factor.locations(), factor), mean[index])
        scales = {name: one.scale for name, one in factor.marginals().items()}
        own = _gather(scales, factor).square()
        if joint:
            own = own.diag()
        if isinstance(factor, JointFactor):
            root = factor.posterior.root()
            own[left[:, None] & left] = (root @ root.mT).reshape(-1)
        stays = free[:, None] & free if joint else free
        here = (index[:, None], index) if joint else (index,)
        spread[here] = torch.where(stays, own, 0)
    marginal = any(one.joint_prior is not None and one.joint_prior.marginal for one in joint)
    return posterior.replaced(
        mean, spread, kept, _prior_of_rest(posterior, ~kept, marginal, new_priors)
    )


def _prior_of_rest(
    posterior: Posterior, drop: Tensor, marginal: bool, new_priors: Mapping[str, NewPrior]
) -> tuple[Tensor, Tensor]:
    spread: Any = posterior.prior_spread
    if spread.dim() == 1:
        loc, variance = torch.where(drop, 0, posterior.prior_mean), torch.where(drop, 0, spread)
        places = posterior.layout.split(torch.arange(len(loc), device="cpu"))
        for name, new in new_priors.items():
            index = places[name].reshape(-1)[~new.mask.reshape(-1)]
            taken = (new.parameters[key].expand(new.mask.shape) for key in ("loc", "scale"))
            loc[index], scale = (one.reshape(-1)[~new.mask.reshape(-1)].double() for one in taken)
            variance[index] = scale.square()
        return loc, variance
    prior = Moments(posterior.prior_mean, spread)
    left = prior.select(~drop) if marginal else prior.given_zero(drop)
    loc, covariance = torch.zeros_like(prior.loc), torch.zeros_like(spread)
    loc[~drop] = left.loc
    covariance[(~drop)[:, None] & ~drop] = left.covariance.reshape(-1)
    return loc, covariance


def _on_one_subspace(posterior: Posterior) -> tuple[Moments, Moments]:
    """Return posterior and prior where both vary, with standard normals for what is fixed.

    Directions in which the posterior has no variance left are as good as fixed, and leave the
    prior, too.
    """
    free = posterior.free
    both = free[:, None] & free
    ones = (~free).to(posterior.mean).diag()
    own = Moments(posterior.mean, torch.where(both, posterior.covariance, 0) + ones)
    prior: Any = posterior.prior_covariance
    covariance = torch.where(both, prior, 0) + ones
    loc = torch.where(free, posterior.prior_mean, posterior.mean)
    basis = find_subspace(own.covariance)
    if basis.shape[-1] == len(loc):
        return own, Moments(loc, covariance)
    warn(
        f"the posterior has no variance in {len(loc) - basis.shape[-1]} directions, combinations "
        f"of {_name_tied(posterior, basis)}, which are taken as fixed: the prior is that on what "
        "varies"
    )
    projection = basis @ basis.mT
    moved = own.loc + projection @ (loc - own.loc)
    projected = projection @ covariance @ projection
    return own, Moments(moved, (projected + projected.mT) / 2)


def _name_tied(posterior: Posterior, basis: Tensor) -> str:
    """Name the elements that have a part in directions without variance."""
    missing = 1 - basis.square().sum(1)
    tied = [posterior.names[i] for i in (missing > _PART).nonzero()[:, 0].tolist()]
    return ", ".join(tied[:8]) + (f" and {len(tied) - 8} others" if len(tied) > 8 else "")


# The least part, squared, of an element in a direction of length 1 that is told.
_PART = 1e-3


def _check_fixed(posterior: Posterior, rest: str) -> None:
    """Refuse a marginal prior of elements that are correlated with what is fixed."""
    if rest != "marginal" or posterior.spread.dim() == 1 or posterior.free.all():
        return
    prior: Any = posterior.prior_covariance
    tied = (prior[~posterior.free][:, posterior.free] != 0).any(1)
    if tied.any():
        index = (~posterior.free).nonzero()[:, 0][tied]
        named = [posterior.names[i] for i in index.tolist()]
        msg = (
            f"got Spike(rest='marginal') for a Posterior in which {named[:5]} have no variance, "
            "but a prior that is correlated with that of others. Expected "
            "Spike(rest='conditional')"
        )
        raise ValueError(msg)


def _is_diagonal(spread: Any) -> bool:
    return spread.dim() == 1 or bool((spread.diagonal().diag() == spread).all())


def _gather(by_site: Mapping[str, Tensor], factor: Factor) -> Tensor:
    return torch.cat([by_site[site.name].reshape(-1) for site in factor.sites])


def _split(sites: Sequence[Site], *vectors: Tensor) -> dict[str, Any]:
    """Bring vectors into the shapes of sites."""
    sizes = [site.shape.numel() for site in sites]
    parts = zip(*(vector.split(sizes) for vector in vectors), strict=True)
    return {
        site.name: tuple(part.reshape(site.shape) for part in mine)
        for site, mine in zip(sites, parts, strict=True)
    }
