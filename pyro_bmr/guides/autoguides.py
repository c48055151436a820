"""What an autoguide of Pyro holds: its parameters and its sites."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.programs.dry_run import check_owned
from pyro_bmr.programs.sites import Site


def check_called(guide: AutoGuide) -> None:
    """Look whether a guide has parameters yet.

    Parameters
    ----------
    guide : AutoGuide
        Any.

    Raises
    ------
    ValueError
        If it was never called.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> check_called(guide)
    """
    if guide.prototype_trace is None:
        msg = (
            f"this {type(guide).__name__} has never been called, so it has no parameters. Expected "
            "a trained guide: train it by SVI, or call guide(*args) once"
        )
        raise ValueError(msg)


def read_parameter(guide: AutoGuide, path: str) -> Tensor:
    """Read what a guide optimises, without the param store noticing.

    Parameters
    ----------
    guide : AutoGuide
        A guide.
    path : str
        The attribute, with dots.

    Returns
    -------
    Tensor
        The unconstrained parameter.

    Raises
    ------
    ValueError
        If the param store holds another tensor under the name of this parameter.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> guide = AutoDiagonalNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> read_parameter(guide, "scale")
    tensor([-2.2522])
    """
    parameters: dict[str, Tensor] = dict(guide.named_parameters())
    own = parameters[path if path in parameters else f"{path}_unconstrained"]
    check_owned(f"{guide._pyro_name}.{path}", own)
    return own.detach()


def read_value(guide: AutoGuide, path: str, constraint: constraints.Constraint) -> Tensor:
    """Read a constrained parameter, or a buffer in its place.

    Parameters
    ----------
    guide : AutoGuide
        A guide.
    path : str
        The attribute, with dots.
    constraint : Constraint
        Of the parameter.

    Returns
    -------
    Tensor
        Its constrained value.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> guide = AutoDiagonalNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> read_value(guide, "scale", guide.scale_constraint)
    tensor([0.1000])
    """
    buffers: dict[str, Tensor] = dict(guide.named_buffers())
    if path in buffers:
        return buffers[path]
    return transform_to(constraint)(read_parameter(guide, path))


def read_site(node: Any, shape: torch.Size, event_dim: int) -> Site:
    """Read what a guide remembers of a sample site.

    Parameters
    ----------
    node : dict
        Of a trace, or what the guide keeps of it.
    shape : torch.Size
        Of the unconstrained value, at full size.
    event_dim : int
        How many of its dimensions belong to one event.

    Returns
    -------
    Site
        The site.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> node = {"name": "w", "fn": dist.Normal(0.0, 1.0), "cond_indep_stack": ()}
    >>> read_site(node, torch.Size([]), 0).support
    Real()
    """
    return Site(node["name"], shape, event_dim, node["fn"].support, node["cond_indep_stack"])


def read_whole_site(guide: AutoGuide, node: Any, shape: torch.Size, event_dim: int) -> Site:
    """Read a site of a guide that does not follow sub-sampling plates.

    Parameters
    ----------
    guide : AutoGuide
        The guide.
    node, shape, event_dim
        As in `read_site`.

    Returns
    -------
    Site
        The site.

    Raises
    ------
    ValueError
        If the guide holds only some rows of a plate.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> node = {"name": "w", "fn": dist.Normal(0.0, 1.0), "cond_indep_stack": ()}
    >>> read_whole_site(None, node, torch.Size([]), 0).name
    'w'
    """
    for frame in node["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            msg = (
                f"{type(guide).__name__} holds {frame.size} rows of the site {node['name']!r}, "
                f"whose plate {frame.name!r} has {frame.full_size}: it cannot follow a "
                "sub-sampling plate. Expected a guide that holds all rows, such as AutoNormal"
            )
            raise ValueError(msg)
    return read_site(node, shape, event_dim)
