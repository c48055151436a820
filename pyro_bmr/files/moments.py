"""Posteriors from elsewhere as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pyro_bmr.files.structure import check_shape, refuse
from pyro_bmr.moments.names import Layout
from pyro_bmr.moments.posterior import Posterior


def pack_moments(posterior: Posterior) -> dict[str, Any]:
    """Describe a posterior with its prior."""
    labels = posterior.layout.labels
    return {
        "sites": [
            {
                "name": name,
                "shape": list(shape),
                "labels": [list(map(str, axis)) for axis in labels.get(name, ())],
            }
            for name, shape in posterior.layout.shapes.items()
        ],
        "mean": posterior.mean,
        "spread": posterior.spread,
        "prior_mean": posterior.prior_mean,
        "prior_spread": posterior.prior_spread,
        "kept": posterior.kept,
        "free_energy": posterior.free_energy,
    }


def unpack_moments(packed: Mapping[str, Any]) -> Posterior:
    """Make the posterior that `pack_moments` described."""
    shapes = {one["name"]: torch.Size(one["shape"]) for one in packed["sites"]}
    labels = {
        one["name"]: tuple(map(tuple, one["labels"])) for one in packed["sites"] if one["labels"]
    }
    layout = Layout(shapes, labels)
    mean = layout.split(packed["mean"])
    empty = Posterior(mean, scale=1.0, prior_scale=1.0, free_energy=packed["free_energy"])
    object.__setattr__(empty, "layout", layout)
    prior = packed["prior_mean"], packed["prior_spread"]
    return empty.replaced(packed["mean"], packed["spread"], packed["kept"], prior)


def check_moments(packed: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Check the shapes in a posterior; return those of its sites."""
    sites = {one["name"]: tuple(one["shape"]) for one in packed["sites"]}
    if len(sites) != len(packed["sites"]):
        raise refuse([one["name"] for one in packed["sites"]], "/moments/sites", "each site once")
    for i, one in enumerate(packed["sites"]):
        sizes = tuple(map(len, one["labels"]))
        if sizes and sizes != tuple(one["shape"]):
            raise refuse(sizes, f"/moments/sites/{i}/labels", f"names of {one['shape']}")
    size = sum(map(math.prod, sites.values()))
    for key in ("mean", "prior_mean", "kept"):
        check_shape(packed[key], (size,), f"/moments/{key}")
    for key in ("spread", "prior_spread"):
        dims = max(1, packed[key].dim())
        check_shape(packed[key], (size,) * min(dims, 2), f"/moments/{key}")
        variance = packed[key] if dims == 1 else packed[key].diagonal()
        if (variance < 0).any():
            raise refuse(variance.tolist(), f"/moments/{key}", "variances that are not negative")
    return sites
