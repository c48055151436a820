"""Sampling sites at values on the real line, in the plates that they lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.programs.centers import add_weighted
from pyro_bmr.programs.distributions import find_element_support
from pyro_bmr.programs.sites import Site


def make_plates(parts: Iterable[Any], created: Any) -> dict[str, Any]:
    """Build the plates that sites lie in, as `pyro.infer.autoguide.AutoGuide` does.

    Each part has ``sites``; ``created`` are the plate or plates that the caller made.
    """
    plates = {p.name: p for p in ([created] if isinstance(created, pyro.plate) else created)}
    for frame in (frame for part in parts for site in part.sites for frame in site.plates):
        if frame.name not in plates:
            plates[frame.name] = pyro.plate(
                frame.name,
                frame.full_size or frame.size,
                dim=frame.dim,
                subsample_size=frame.size,
            )
    return plates


def inside_plates(site: Site, plates: Mapping[str, Any]) -> ExitStack:
    """Enter the plates of a site."""
    stack = ExitStack()
    for frame in site.plates:
        stack.enter_context(plates[frame.name])
    return stack


def sample_sites(
    sites: tuple[Site, ...], latent: Tensor, mask: Tensor | None, plates: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Sample sites at the parts of a vector, and yield names and values.

    Its last dimension holds their flattened unconstrained values, one site after another, without
    the elements that are False in ``mask``, which are at 0.
    """
    if mask is not None:
        full = latent.new_zeros(latent.shape[:-1] + mask.shape)
        latent = full.masked_scatter(mask, latent)
    batch_shape = latent.shape[:-1]
    sizes = [site.shape.numel() for site in sites]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    parts = {site.name: part for site, part in zip(sites, latent.split(sizes, -1), strict=True)}
    parts = add_weighted(sites, parts)
    for site, part, kept in zip(sites, parts.values(), masks, strict=True):
        shape = torch.broadcast_shapes(site.shape, batch_shape + (1,) * site.event_dim)
        left = None if kept is None else kept.reshape(site.shape)
        yield site.name, sample_site(site, part.reshape(shape), plates, left)


def sample_site(
    site: Site, unconstrained: Tensor, plates: Mapping[str, Any], kept: Tensor | None = None
) -> Tensor:
    """Sample a site at an unconstrained value; elements that are not kept have log density 0."""
    if site.center is not None:
        with inside_plates(site, plates):
            offset = pyro.subsample(site.center.offset, event_dim=site.event_dim)
        unconstrained = unconstrained + offset.to(unconstrained)
    transform = biject_to(find_element_support(site.support))
    value = transform(unconstrained)
    # A site's event may have other dimensions than its unconstrained value (a simplex has).
    event_dim = site.event_dim + value.dim() - unconstrained.dim()
    log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
    if kept is not None and not transform.domain.event_dim:
        log_density = torch.where(kept, log_density, 0)
    log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
    with inside_plates(site, plates):
        return pyro.sample(site.name, dist.Delta(value, log_density, event_dim))
