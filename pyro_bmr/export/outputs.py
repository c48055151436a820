"""What a model computes: what it returns, or what it says of its observations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.display import a_or_an
from pyro_bmr.programs.distributions import find_core
from pyro_bmr.programs.site_kinds import is_computed


class OutputError(ValueError):
    """A model has no output, or not the one that was asked for."""


def find_output(
    returned: Any, nodes: Mapping[str, Any], latent: Collection[str], output: str | None
) -> Any:
    """Choose the output of a model that was run, from what it returned and its trace's nodes.

    ``output`` is a site; a parameter of the observed site's distribution, such as ``"logits"``; or
    both, as in ``"obs.logits"``. If None, it is what the model returns, where observations or draws
    of them stand for the mean of their distribution, and this mean if the model returns nothing.
    An output that is not there raises an `OutputError`.
    """
    sites = {name: node for name, node in nodes.items() if _is_site(node)}
    data = [n for n, node in sites.items() if n not in latent and not is_computed(node)]
    if output is not None:
        return _named(output, sites, data, latent)
    leaves, spec = pytree.tree_flatten(returned)
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        by_value = {id(sites[name]["value"]): name for name in data}
        means = [
            _mean(by_value[id(leaf)], sites) if id(leaf) in by_value else _checked(leaf)
            for leaf in leaves
        ]
        return pytree.tree_unflatten(means, spec)
    return _mean(_only(data, sites), sites)


def _named(output: str, sites: Mapping[str, Any], data: list[str], latent: Collection[str]) -> Any:
    if output in sites:
        return _mean(output, sites) if output in data else sites[output]["value"]
    site, _, parameter = output.rpartition(".")
    if not site:
        site = _only(data, sites)
    if site in sites:
        value = getattr(find_core(sites[site]["fn"]), parameter, None)
        if isinstance(value, Tensor):
            return value
    of_data = find_core(sites[data[0]]["fn"]) if data else None
    parameters = sorted(getattr(of_data, "arg_constraints", {}))
    msg = (
        f"got output={output!r}, which the model does not have. Expected a site, one of "
        f"{sorted(name for name in sites if name not in latent)}, or a parameter of the observed "
        f"site's distribution, such as {parameters}"
    )
    raise OutputError(msg)


def _only(data: list[str], sites: Mapping[str, Any]) -> str:
    if len(data) == 1:
        return data[0]
    observed = [name for name in data if sites[name]["is_observed"]]
    if len(observed) == 1:
        return observed[0]
    msg = (
        f"the model returns no tensor and has {len(observed)} observed sites {sorted(data)}. "
        "Expected one of either: pass output= the name of a site, let the model return its "
        'prediction, or name it in the model as pyro.deterministic("prediction", ...)'
    )
    raise OutputError(msg)


def _mean(name: str, sites: Mapping[str, Any]) -> Tensor:
    fn = sites[name]["fn"]
    core = find_core(fn)
    try:
        # The mean of a Categorical is not a number; that of its one-hot vector is.
        mean = core.probs if isinstance(core, torch.distributions.Categorical) else fn.mean
    except NotImplementedError:
        mean = None
    if not isinstance(mean, Tensor):
        parameters = sorted(getattr(core, "arg_constraints", {}))
        own = f"output= one of its parameters, {parameters}, or " if parameters else ""
        msg = (
            f"the {type(core).__name__} of the site {name!r} has no mean. Expected {own}the model "
            "to return its prediction"
        )
        raise OutputError(msg)
    return mean


def _checked(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, Tensor | bool | int | float | str):
        return leaf
    msg = (
        f"the model returns {a_or_an(leaf)}. Expected tensors, or tuples, lists and dicts "
        "of these; pass output= the name of a site, or a parameter of the observed site's "
        "distribution such as 'logits'"
    )
    raise OutputError(msg)


def _is_site(node: Any) -> bool:
    return node["type"] == "sample" and not (
        isinstance(node["fn"], Unit) or type(node["fn"]).__name__ == "_Subsample"
    )
