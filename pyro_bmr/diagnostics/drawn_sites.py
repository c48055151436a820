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


@dataclass(frozen=True, eq=False)
class SiteKinds:
    """The sites of a model, in its order, by what they are.

    Parameters
    ----------
    latent : tuple of str
        Those of which there is a posterior.
    deterministic : tuple of str
        Those of `pyro.deterministic`.
    observed : tuple of str
        Those with data.
    predicted : tuple of str
        Those without data of which there is no posterior.

    Examples
    --------
    >>> SiteKinds(("w",), (), ("y",), ()).observed
    ('y',)
    """

    latent: tuple[str, ...]
    deterministic: tuple[str, ...]
    observed: tuple[str, ...]
    predicted: tuple[str, ...]


def sort_sites(trace: Trace, latent: Collection[str]) -> SiteKinds:
    """Tell the sites of a model apart.

    Statements of `pyro.factor` have neither data nor values, and are left out.

    Parameters
    ----------
    trace : Trace
        Of the model.
    latent : collection of str
        The sites of its guide.

    Returns
    -------
    SiteKinds
        By name.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro import poutine
    >>> model = lambda: pyro.deterministic("twice", 2 * pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> sort_sites(poutine.trace(model).get_trace(), ["w"])
    SiteKinds(latent=('w',), deterministic=('twice',), observed=(), predicted=())
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
    """Look for plates that take a part of the data.

    Parameters
    ----------
    trace : Trace
        Of a model or a guide.
    what : str
        Which of them.

    Raises
    ------
    ValueError
        If there is one.

    Examples
    --------
    >>> check_whole(Trace(), "model")
    """
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
    """Find the plate that each axis of a site runs over.

    Parameters
    ----------
    node : mapping
        Of a trace.

    Returns
    -------
    tuple of str
        The name of the plate; None for an axis without one, such as those of events.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro import poutine
    >>> with poutine.trace() as capture, pyro.plate("data", 3):
    ...     _ = pyro.sample("y", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
    >>> read_axes(capture.trace.nodes["y"])
    ('data', None)
    """
    event_dim, shape = node["fn"].event_dim, node["fn"].shape()
    axes: list[str | None] = [None] * len(shape)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and event_dim - frame.dim <= len(shape):
            axes[frame.dim - event_dim] = frame.name
    return tuple(axes)


def read_values(trace: Trace, sites: Collection[str]) -> dict[str, Tensor]:
    """Take values from a trace.

    Parameters
    ----------
    trace : Trace
        Of a model or a guide.
    sites : collection of str
        Those wanted.

    Returns
    -------
    dict of Tensor
        By site.

    Examples
    --------
    >>> read_values(Trace(), [])
    {}
    """
    return {name: trace.nodes[name]["value"] for name in sites}


def describe(fn: Any, value: Tensor, mask: Any) -> dict[str, Tensor]:
    """Say what a distribution tells of an observation.

    Parameters
    ----------
    fn : Distribution
        Of the observation.
    value : Tensor
        The data.
    mask : Tensor or bool, optional
        That of Pyro's handlers; where it is False, the log probability is 0.

    Returns
    -------
    dict of Tensor
        ``log_prob`` in nats, a draw as ``draws``, and, if there are such, ``mean`` and
        ``probabilities``.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> describe(dist.Bernoulli(0.25), torch.tensor(1.0), None)["probabilities"]
    tensor([0.7500, 0.2500])
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
    """Find which elements of an observation the masks of a distribution and of handlers leave.

    Parameters
    ----------
    fn : Distribution
        Of the observation.
    mask : Tensor or bool, optional
        That of Pyro's handlers.

    Returns
    -------
    Tensor or None
        Boolean, of the shape of the observation; None where nothing is masked.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> normal = dist.Normal(torch.zeros(2), 1.0)
    >>> find_counted(normal.mask(torch.tensor([True, False])), None)
    tensor([ True, False])
    """
    shape, masks = fn.shape(), [(mask, fn.event_dim)]
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    found = [(torch.as_tensor(m), event_dim) for m, event_dim in masks if m is not None]
    if not found:
        return None
    counted = torch.ones(shape, dtype=torch.bool, device=found[0][0].device)
    for one, event_dim in found:
        counted = counted & one.bool().reshape(one.shape + (1,) * event_dim)
    return counted


def _kind(name: str, node: Mapping[str, Any], latent: Collection[str]) -> str | None:
    if isinstance(node["fn"], Unit):
        return None
    if node["infer"].get("_deterministic"):
        return "deterministic"
    if node["is_observed"]:
        return "observed"
    return "latent" if name in latent else "predicted"


def _mean(fn: Any) -> Any:
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None
