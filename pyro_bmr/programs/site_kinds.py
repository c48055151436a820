"""What a sample statement is: latent, data, a factor of the density, or a computed value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.ops.provenance import detach_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmr.programs.distributions import find_core


def is_latent(site: Any) -> bool:
    """Tell whether a node of a trace is a sample site without data."""
    return _is_statement(site) and not site["is_observed"]


def is_data(site: Any) -> bool:
    """Tell whether a node of a trace is an observation."""
    return is_likelihood(site) and not isinstance(site["fn"], Unit)


def is_likelihood(site: Any) -> bool:
    """Tell whether a node of a trace is an observation or a `pyro.factor`."""
    return _is_statement(site) and site["is_observed"] and not is_computed(site)


def is_computed(site: Any) -> bool:
    """Tell whether a sample statement gives a name to a value that follows from other sites."""
    return is_deterministic(site) or is_reparameterized(site)


def is_deterministic(site: Any) -> bool:
    """Tell whether a sample statement is a `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


def is_reparameterized(site: Any) -> bool:
    """Tell whether `pyro.poutine.reparam` put others in the place of a site.

    Pyro then observes the site's value under a point mass at this very value. An observation of a
    point mass compares two values.
    """
    point = find_core(site["fn"])
    if not (site["is_observed"] and isinstance(point, Delta)):
        return False
    place, value = detach_provenance(point.v), detach_provenance(site["value"])
    # Plates around it make another view of the place.
    return place is value or place.is_set_to(value)


class DataShapeError(ValueError):
    """Data and distribution of a site do not fit each other."""


def check_data_shapes(nodes: Mapping[str, Any]) -> None:
    """Raise a `DataShapeError` if data do not have the shape of the distribution of their site."""
    for name, site in nodes.items():
        if not is_data(site):
            continue
        fn, value = site["fn"], site["value"]
        value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        data, shape = value.shape, fn.shape()
        try:
            torch.broadcast_shapes(data, shape)
            fits = fn.log_prob(value).shape == fn.batch_shape
        except RuntimeError:
            fits = data == shape
        if not fits:
            msg = (
                f"the data of the observed site {name!r} have the shape {tuple(data)}, and its "
                f"distribution {tuple(shape)}. Expected data of the distribution's shape: are they "
                "a column where a row is meant? y.squeeze(-1)"
            )
            raise DataShapeError(msg)


def _is_statement(site: Any) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)
