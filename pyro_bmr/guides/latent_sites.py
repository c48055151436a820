"""Latent sites of a model that is run once, for posteriors that are no programs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.sites import Site


def find_latent_nodes(
    names: Collection[str], origin: Origin, what: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run the model; return its continuous latent sites among names, and what is no site.

    ``what`` there is, for errors.
    """
    if origin.model is None:
        msg = (
            f"got {what} without the model. Expected it as model=, and after the posterior what it "
            "is called with"
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
    unknown = sorted(set(names) - trace.nodes.keys())
    latent = dict(prune_subsample_sites(trace).iter_stochastic_nodes())
    found = {
        name: node
        for name, node in latent.items()
        if name in names and not node["fn"].support.is_discrete
    }
    if not found:
        msg = (
            f"got {what} of {sorted(names)}, but the model has the latent sites "
            f"{sorted(latent)}. Expected some of these, by name"
        )
        raise ValueError(msg)
    return found, tuple(unknown)


def make_site(name: str, node: Any, shape: torch.Size) -> Site:
    """Make the site of a node, whose unconstrained value has a shape."""
    event_dim = node["fn"].event_dim + len(shape) - node["value"].dim()
    frames = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return Site(name, shape, event_dim, find_support(node["fn"]), frames)
