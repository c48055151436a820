"""The weights that a network had before it was converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bmr.arguments.checks import check_function, check_kind
from pyro_bmr.conversion.layers import buffer_name, site_name
from pyro_bmr.display import a_or_an


def init_to_pretrained(
    net: nn.Module, *, fallback: Callable[[Any], Tensor] = init_to_median
) -> Callable[[Any], Tensor]:
    """Start a guide at the weights that the network had before `bayesianize`.

    Parameters
    ----------
    net : Module
        What `bayesianize` returned, or a module that holds it; the one that the model calls.
    fallback : callable
        Where to start the other sites: a function of `pyro.infer.autoguide.initialization`.

    Returns
    -------
    callable
        An ``init_loc_fn`` for Pyro's autoguides.

    Raises
    ------
    ValueError
        If no part of ``net`` comes from `bayesianize`; later, if the model calls another one.

    Examples
    --------
    >>> import torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import bayesianize
    >>> linear = nn.Linear(2, 1)
    >>> net = bayesianize(linear)
    >>> guide = AutoNormal(net, init_loc_fn=init_to_pretrained(net))
    >>> _ = guide(torch.zeros(3, 2))
    >>> torch.equal(guide.median()["weight"], linear.weight)
    True
    """
    check_kind("net", net, nn.Module, "what pyro_bmr.nn.bayesianize returned")
    check_function("fallback", fallback, "a function of pyro.infer.autoguide.initialization")
    if not any(True for _ in _pretrained(net)):
        msg = (
            f"init_to_pretrained got {a_or_an(net)} that holds no pretrained weights. "
            "Expected what pyro_bmr.nn.bayesianize returned, or a module that holds it"
        )
        raise ValueError(msg)

    def init(site: Any) -> Tensor:
        values = dict(_pretrained(net))
        if site["name"] in values:
            return values[site["name"]].clone()
        _check_is_run(net, site["name"], values)
        return fallback(site)

    return init


def _pretrained(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for layer in net.modules():
        for key in layer._pyro_samples if isinstance(layer, PyroModule) else ():
            if buffer_name(key) in layer._buffers:
                yield site_name(layer, key), layer.get_buffer(buffer_name(key))


def _check_is_run(net: nn.Module, site: str, values: dict[str, Tensor]) -> None:
    own = next((name for name in values if site.endswith(f".{name}")), None)
    if own and isinstance(net, PyroModule) and not net._pyro_context.used:
        msg = (
            f"init_to_pretrained got a network whose {own!r} is not the model's {site!r}. Expected "
            "the network that the model calls, not one that it was copied from"
        )
        raise ValueError(msg)
