"""Positive elements that are set to zero, which their coordinates reach at minus infinity."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Prior
from pyro_bmr.programs.centers import Center
from pyro_bmr.programs.sites import Site


def vanishes(prior: Prior | None) -> bool:
    """Tell whether the pruned elements of a site go to the end of its support."""
    return prior is not None and prior.divergence is not None


def put_at_zero(site: Site, dropped: Tensor) -> Site:
    """Put elements of a positive site at zero; all others stay where they are."""
    center = site.center
    if center is None:
        offset = torch.zeros(site.shape, dtype=torch.float64, device=dropped.device)
        center = Center(offset, torch.zeros_like(offset, dtype=torch.bool))
    center = center.to(dropped.device)
    at_zero = Center(
        center.offset.masked_fill(dropped, -torch.inf), center.at_mean & ~dropped, center.weights
    )
    return replace(site, center=at_zero)
