"""Posterior samples, such as those of MCMC, read as the Gaussian that has their moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.ops.stats import effective_sample_size
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.display import warn
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.linear_gaussian import Conditional, join
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, triangular
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.sites import Site

_DRAWS_PER_ELEMENT = 10


def match_moments(
    samples: Mapping[str, Tensor], origin: Origin, *, chains: bool
) -> tuple[Factor, ...]:
    r"""Return the Gaussian with the mean and covariance of posterior samples.

    The samples are in the model's own coordinates, of shape ``(draws, *site)``, or
    ``(chains, draws, *site)`` with ``chains``; those of discrete or observed sites are left out.

    The Gaussian is in unconstrained coordinates, and comes with a warning, for what the samples
    show beyond these moments is lost. The covariance of all :math:`n` elements needs at least
    :math:`10 n` effective draws: with :math:`S` draws, the quadratic form
    :math:`\mu^\top \Sigma^{-1} \mu` of a ΔF comes out too large by a factor of about
    :math:`S / (S - n)`. With fewer, the elements are taken as independent, and the warning says so.
    """
    lead = 2 if chains else 1
    nodes = _latent_nodes(samples, origin)
    sites, parts = [], []
    for name, node in nodes.items():
        values = torch.as_tensor(samples[name], device=node["value"].device).detach()
        if values.shape[lead:] != node["value"].shape or not values.numel():
            msg = (
                f"the samples of the site {name!r} have the shape {tuple(values.shape)}. Expected "
                f"{'(chains, draws' if chains else '(draws'}, ...) with the shape "
                f"{tuple(node['value'].shape)} of the site in the model: are the arguments those "
                "of the run?"
            )
            raise ValueError(msg)
        support = find_support(node["fn"])
        unconstrained = biject_to(support).inv(values)
        shape = unconstrained.shape[lead:]
        event_dim = node["fn"].event_dim + len(shape) - node["value"].dim()
        frames = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
        sites.append(Site(name, shape, event_dim, support, frames))
        parts.append(unconstrained.reshape(*values.shape[:lead], -1))
    counts = {site.name: tuple(p.shape[:lead]) for site, p in zip(sites, parts, strict=True)}
    if len(set(counts.values())) > 1:
        msg = (
            f"got samples with other numbers of {'chains and ' if chains else ''}draws, {counts}. "
            "Expected as many of each site, which were drawn together"
        )
        raise ValueError(msg)
    draws = torch.cat(parts, -1).double()
    draws = draws if chains else draws[None]
    return _gaussian(sites, draws, parts[0].dtype)


def _latent_nodes(samples: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """Run the model, and return its continuous latent sites of which there are samples."""
    if origin.model is None:
        msg = (
            "posterior samples do not know their model. Expected it as model=, and after the "
            "samples what it is called with"
        )
        raise ValueError(msg)
    try:
        with dry_run(origin.model), PriorMessenger(*origin.args, **origin.kwargs):
            trace = poutine.trace(origin.model).get_trace(*origin.args, **origin.kwargs)
    except Exception as error:
        msg = (
            f"the model could not be run to read its sites ({type(error).__name__}: {error}). "
            "Expected it to run with the arguments given; pass those of the MCMC run"
        )
        raise RuntimeError(msg) from error
    unknown = sorted(samples.keys() - trace.nodes.keys())
    latent = dict(prune_subsample_sites(trace).iter_stochastic_nodes())
    found = {
        name: node
        for name, node in latent.items()
        if name in samples and not node["fn"].support.is_discrete
    }
    if unknown or not found:
        msg = (
            f"got samples of {sorted(samples)}, but the model has the latent sites "
            f"{sorted(latent)}. Expected samples of sites of the model, by name"
        )
        raise ValueError(msg)
    return found


def _gaussian(sites: list[Site], draws: Tensor, dtype: torch.dtype) -> tuple[Factor, ...]:
    total, size = draws.shape[:-1].numel(), draws.shape[-1]
    if total < 4 or not draws.isfinite().all():
        msg = (
            f"got {total} draws, of which {int((~draws.isfinite()).any(-1).sum())} are not finite "
            "in unconstrained coordinates. Expected at least 4 finite draws inside the support"
        )
        raise ValueError(msg)
    effective = int(effective_sample_size(draws).nan_to_num(0.0).min())
    enough = min(effective, total) >= _DRAWS_PER_ELEMENT * size
    flat = draws.reshape(total, size)
    loc = flat.mean(0)
    centred = (flat - loc) / (total - 1) ** 0.5
    _warn(total, min(effective, total), size, enough)
    if enough:
        return (JointFactor(tuple(sites), Dense(loc, triangular(centred.mT)).to(dtype)),)
    scale = centred.square().sum(0).sqrt()
    split = [site.shape.numel() for site in sites]
    return join(
        [
            Conditional(site, Diagonal(*(t.reshape(site.shape).to(dtype) for t in moments)))
            for site, *moments in zip(sites, loc.split(split), scale.split(split), strict=True)
        ]
    )


def _warn(total: int, effective: int, size: int, enough: bool) -> None:
    by_what = "mean and covariance" if enough else "means and variances"
    but = (
        ""
        if enough
        else (
            f"; all {size} elements are taken as independent, because their covariance needs "
            f"{_DRAWS_PER_ELEMENT} effective draws per element"
        )
    )
    msg = (
        "moment matching: the posterior samples are replaced by the Gaussian in unconstrained "
        f"coordinates that has their {by_what} ({total} draws, of which {effective} effective in "
        f"the worst element){but}"
    )
    warn(msg)
