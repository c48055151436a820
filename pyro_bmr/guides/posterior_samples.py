"""Posterior samples, such as those of MCMC, read as the Gaussian that has their moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.display import warn
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.latent_sites import find_latent_nodes, make_site
from pyro_bmr.guides.linear_gaussian import Conditional, join
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, triangular
from pyro_bmr.moments.draws import read_draws
from pyro_bmr.moments.names import Layout
from pyro_bmr.moments.sample_moments import SampleMoments, measure_moments
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.sites import Site


def match_moments(samples: Mapping[str, Any], origin: Origin) -> tuple[Factor, ...]:
    """Return the Gaussian with the mean and covariance of posterior samples.

    The samples are in the model's own coordinates, of shape ``(draws, *site)`` or ``(chains, draws,
    *site)``: tensors or arrays by site, or what ArviZ holds. Those of discrete or observed sites
    are left out, as are variables that are no sites of the model.

    The Gaussian is in unconstrained coordinates, and comes with a warning, for what the samples
    show beyond these moments is lost. With few draws, the elements are taken as independent.
    """
    given = read_draws(samples)
    nodes, others = find_latent_nodes(given, origin, "posterior samples")
    sites, parts = [], []
    for name, node in nodes.items():
        values = _as_tensor(given[name], node["value"])
        lead = values.dim() - node["value"].dim()
        if lead not in (1, 2) or values.shape[lead:] != node["value"].shape or not values.numel():
            msg = (
                f"the samples of the site {name!r} have the shape {tuple(values.shape)}. Expected "
                "(draws, ...) or (chains, draws, ...) with the shape "
                f"{tuple(node['value'].shape)} of the site in the model: are the arguments those "
                "of the run?"
            )
            raise ValueError(msg)
        values = values if lead == 2 else values[None]
        support = find_support(node["fn"])
        unconstrained = biject_to(support).inv(values)
        sites.append(make_site(name, node, unconstrained.shape[2:]))
        parts.append(unconstrained.reshape(*values.shape[:2], -1))
    counts = {site.name: tuple(p.shape[:2]) for site, p in zip(sites, parts, strict=True)}
    if len(set(counts.values())) > 1:
        msg = (
            f"got samples with other numbers of chains and draws, {counts}. Expected as many of "
            "each site, which were drawn together"
        )
        raise ValueError(msg)
    moments = measure_moments(torch.cat(parts, -1).double())
    _warn(moments, sites, others)
    return _gaussian(sites, moments, parts[0].dtype)


def _as_tensor(values: Any, like: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to(like.device)
    return torch.as_tensor(np.array(values), dtype=like.dtype, device=like.device)


def _gaussian(sites: list[Site], moments: SampleMoments, dtype: torch.dtype) -> tuple[Factor, ...]:
    if moments.correlated:
        dense = Dense(moments.mean, triangular(moments.root.mT))
        return (JointFactor(tuple(sites), dense.to(dtype)),)
    split = [site.shape.numel() for site in sites]
    return join(
        [
            Conditional(site, Diagonal(*(t.reshape(site.shape).to(dtype) for t in pair)))
            for site, *pair in zip(
                sites, moments.mean.split(split), moments.scale.split(split), strict=True
            )
        ]
    )


def _warn(moments: SampleMoments, sites: list[Site], others: tuple[str, ...]) -> None:
    told = moments.describe(Layout({site.name: site.shape for site in sites}, {}).elements)
    left = f". Left out, because no sites of the model: {', '.join(others)}" if others else ""
    warn(
        "moment matching: the posterior samples are replaced by the Gaussian in unconstrained "
        f"coordinates that has their {told}{left}"
    )
