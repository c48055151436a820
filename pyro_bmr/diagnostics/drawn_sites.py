"""What the sites of a model are, as one run of it tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution, Unit
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmr.programs.distributions import find_core
from pyro_bmr.programs.site_kinds import is_computed, is_data


@dataclass(frozen=True, eq=False)
class SiteKinds:
    """The sites of a model, in its order, by what they are.

    Those without data are latent if there is a posterior of them, and predicted if not.
    """

    latent: tuple[str, ...]
    deterministic: tuple[str, ...]
    observed: tuple[str, ...]
    predicted: tuple[str, ...]


def sort_sites(trace: Trace, latent: Collection[str]) -> SiteKinds:
    """Tell the sites of a model apart, given those of its guide.

    Statements of `pyro.factor` have neither data nor values, and are left out.
    """
    kinds: dict[str, list[str]] = {
        kind: [] for kind in ("latent", "deterministic", "observed", "predicted")
    }
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node):
            kind = _kind(name, node, latent)
            if kind:
                kinds[kind].append(name)
    return SiteKinds(**{kind: tuple(names) for kind, names in kinds.items()})


def check_whole(trace: Trace, what: str) -> None:
    """Raise a ValueError if a plate of the model or guide takes a part of the data."""
    for name, node in trace.nodes.items():
        for frame in node["cond_indep_stack"] if node["type"] == "sample" else ():
            if frame.vectorized and frame.full_size not in {None, frame.size}:
                msg = (
                    f"the {what} takes {frame.size} of {frame.full_size} data in the plate "
                    f"{frame.name!r}, around the site {name!r}, so that draws would be of other "
                    "data each time. Expected all of the data: call it with arguments at which "
                    "the plate has no subsample, such as subsample_size=None"
                )
                raise ValueError(msg)


def read_axes(node: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Find the plate that each axis of a site runs over, None for one without, as of events."""
    event_dim, shape = node["fn"].event_dim, node["fn"].shape()
    axes: list[str | None] = [None] * len(shape)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and event_dim - frame.dim <= len(shape):
            axes[frame.dim - event_dim] = frame.name
    return tuple(axes)


def read_values(trace: Trace, sites: Collection[str]) -> dict[str, Tensor]:
    """Take values from a trace."""
    return {name: trace.nodes[name]["value"] for name in sites}


def describe(fn: Any, value: Tensor, mask: Any) -> dict[str, Tensor]:
    """Say what a distribution tells of an observation.

    ``log_prob`` in nats, 0 where masked; a draw as ``draws``; and ``mean`` and the
    ``probabilities`` of classes, if there are such.
    """
    log_prob = fn.log_prob(value)
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    found = {"log_prob": log_prob, "draws": fn.sample()}
    core, probabilities = find_core(fn), None
    if isinstance(core, torch.distributions.Categorical):
        probabilities = core.probs
    elif isinstance(core, torch.distributions.Bernoulli):
        probabilities = torch.stack([1 - core.probs, core.probs], -1)
    if probabilities is not None:
        found["probabilities"] = probabilities.expand(*fn.shape(), probabilities.shape[-1])
    if not isinstance(core, torch.distributions.Categorical):
        mean = _mean(fn)
        if isinstance(mean, Tensor):
            found["mean"] = mean.expand(fn.shape())
    return found


def find_counted(fn: Any, mask: Any) -> Tensor | None:
    """Find, on the CPU, which elements of an observation the masks of all kinds leave.

    None where nothing is masked.
    """
    shape, masks = fn.shape(), [(mask, fn.event_dim)]
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    found = [(one, event_dim) for one, event_dim in masks if one is not None]
    if not found:
        return None
    counted = torch.ones(shape, dtype=torch.bool, device="cpu")
    for mask, event_dim in found:
        one = torch.as_tensor(mask, device="cpu").bool()
        counted = counted & one.reshape(one.shape + (1,) * event_dim)
    return counted


def _kind(name: str, node: Mapping[str, Any], latent: Collection[str]) -> str | None:
    if isinstance(node["fn"], Unit):
        return None
    if is_computed(node):
        return "deterministic"
    if is_data(node):
        return "observed"
    return "latent" if name in latent else "predicted"


def _mean(fn: Any) -> Any:
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None
