"""Runs of a model on some of its rows, which are compared to learn what depends on rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.scales import read_scale
from pyro_bmr.programs.site_kinds import is_latent, is_likelihood

Sites = dict[str, Any]

# Relatively, of sums of log densities.
_ROUNDING = 1e-4


def run_trial(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0
) -> Sites:
    """Return the latent and observed sites of a run.

    What a latent site draws follows from its name, whatever is drawn before; other noise of the
    model follows from the seed.
    """
    with poutine.block(), dry_run(model), torch.no_grad(), PriorMessenger(*args, **kwargs):
        torch.manual_seed(seed)
        with _SeedMessenger(seed):
            nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    return {name: node for name, node in nodes.items() if is_latent(node) or is_likelihood(node)}


def log_density(site: Any) -> Tensor:
    """Return the log density of a site's value, where it is not masked."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]).double().sum()


def scaled_log_density(site: Any) -> Tensor:
    """Return what a site adds to the log density of its model."""
    density = site["fn"].log_prob(site["value"])
    return scale_and_mask(density, site["scale"], site["mask"]).double().sum()


def is_about(value: float, expected: float, size: float = 0.0) -> bool:
    """Tell whether log densities, of terms of a size, are the same but for rounding."""
    both_nan = math.isnan(value) and math.isnan(expected)
    least = _ROUNDING * max(size, 1e-2)
    return both_nan or math.isclose(value, expected, rel_tol=_ROUNDING, abs_tol=least)


def shapes(site: Any) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of a site's distribution and of its value."""
    return site["fn"].shape(), torch.Size(np.shape(site["value"]))


def fits(site: Any) -> bool:
    """Tell whether a value has a shape of its distribution."""
    try:
        torch.broadcast_shapes(*shapes(site))
    except RuntimeError:
        return False
    return True


def constant_scale(site: Any) -> float | None:
    """Return the scale of all elements of a site, if it is one."""
    scales = read_scale(site).unique()
    return scales.item() if len(scales) == 1 else None


def stands_for(site: Any, rows: int) -> int | None:
    """Return of how many rows a batch is a part, by the scale of a site."""
    scale = constant_scale(site)
    return None if scale is None else round(scale * rows)


def same_scale(site: Any, other: Any) -> bool:
    """Tell whether a batch of another size has the same scale, in the rows that both have."""
    scale, other_scale = map(read_scale, (site, other))
    both = tuple(slice(min(sizes)) for sizes in zip(scale.shape, other_scale.shape, strict=True))
    return torch.allclose(scale[both], other_scale[both])


def follows_rows(site: Any, other: Any) -> bool:
    """Tell whether another batch has a distribution of another shape."""
    return other["fn"].shape() != site["fn"].shape()


def depends_on_rows(site: Any, other: Any) -> bool:
    """Tell a likelihood from a term that is the same for every batch, such as a penalty."""
    density, more = (s["fn"].log_prob(s["value"]) for s in (site, other))
    return density.shape != more.shape or not torch.equal(density, more)


def has_other_prior(site: Any, other: Any) -> bool:
    """Tell whether a value has another log density in another run."""
    if follows_rows(site, other):
        return True
    density, more = (s["fn"].log_prob(site["value"]) for s in (site, other))
    return not torch.allclose(density, more, rtol=_ROUNDING, equal_nan=True)


class _SeedMessenger(Messenger):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None:
            torch.manual_seed(crc32(msg["name"].encode()))

    def _pyro_post_sample(self, _msg: Any) -> None:
        torch.manual_seed(self.seed)
