"""What an autoguide of Pyro holds: its parameters and its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.guides.copied_guides import copy_guides
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import check_owned, dry_run
from pyro_bmr.programs.sites import Site


def check_called(guide: AutoGuide) -> None:
    """Raise a ValueError if a guide was never called, and so has no parameters."""
    if guide.prototype_trace is None:
        msg = (
            f"this {type(guide).__name__} has never been called, so it has no parameters. Expected "
            "a trained guide: train it by SVI, or load the param store of one, and call "
            "guide(*args) once or pass these arguments"
        )
        raise ValueError(msg)


def take_from_store(guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a copy of an autoguide that was never called, if the param store holds its parameters.

    It is a ValueError if the store lacks some. Any other guide is returned as it is.
    """  # noqa: DOC201
    store = pyro.get_param_store()
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None or not guide._model:
        return guide

    def own_parameters() -> set[str]:
        return {name for name in store if name.startswith(f"{guide._pyro_name}.")}

    held = own_parameters()
    if not held or pyro.settings.get("module_local_params"):
        return guide
    (called,) = copy_guides((guide,))
    with dry_run(guide.model, called), poutine.block():
        called(*args, **kwargs)
        lacking = sorted(own_parameters() - held)
    if lacking:
        msg = (
            f"this {type(guide).__name__} has never been called, and Pyro's param store lacks its "
            f"parameters {lacking}. Expected the store that was saved after this guide was trained "
            "for this model"
        )
        raise ValueError(msg)
    return called


def read_parameter(guide: AutoGuide, path: str) -> Tensor:
    """Read an unconstrained parameter by its dotted path, without the param store noticing.

    It is a ValueError if the store holds another tensor under its name.
    """
    parameters: dict[str, Tensor] = dict(guide.named_parameters())
    own = parameters[path if path in parameters else f"{path}_unconstrained"]
    check_owned(f"{guide._pyro_name}.{path}", own)
    return own.detach()


def read_value(guide: AutoGuide, path: str, constraint: constraints.Constraint) -> Tensor:
    """Read a constrained parameter, or a buffer in its place."""
    buffers: dict[str, Tensor] = dict(guide.named_buffers())
    if path in buffers:
        return buffers[path]
    return transform_to(constraint)(read_parameter(guide, path))


def read_site(node: Any, shape: torch.Size, event_dim: int) -> Site:
    """Read a sample site; ``shape`` is that of its unconstrained value, at full size."""
    support = find_support(node["fn"])
    return Site(node["name"], shape, event_dim, support, node["cond_indep_stack"])


def read_whole_site(guide: AutoGuide, node: Any, shape: torch.Size, event_dim: int) -> Site:
    """Read a site of a guide that has to hold all rows of its plates, or raise a ValueError."""
    for frame in node["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            msg = (
                f"{type(guide).__name__} holds {frame.size} rows of the site {node['name']!r}, "
                f"whose plate {frame.name!r} has {frame.full_size}: it cannot follow a "
                "sub-sampling plate. Expected a guide that holds all rows, such as AutoNormal"
            )
            raise ValueError(msg)
    return read_site(node, shape, event_dim)
