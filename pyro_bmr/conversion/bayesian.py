"""A torch module with sample sites in place of its weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_bmr.arguments.checks import check_function, refuse_kind
from pyro_bmr.conversion.layers import (
    LAYERS,
    buffer_name,
    own_parameters,
    site_name,
    trainable_parameters,
)
from pyro_bmr.conversion.obstacles import check_module
from pyro_bmr.conversion.weight_priors import WeightPrior, fan_in_normal
from pyro_bmr.programs.failures import running


def bayesianize(
    module: nn.Module,
    *,
    prior: WeightPrior = fan_in_normal(),
    layers: tuple[type[nn.Module], ...] = LAYERS,
) -> Any:
    """Turn a torch module into a Pyro module whose weights and biases are sample sites.

    It has the same structure, and computes the same from the same weights. A site is called like
    its parameter, after the path in the outermost ``PyroModule``: ``0.weight``, or ``net.0.weight``
    in a model whose ``self.net`` it is. The module that came in is left as it was.

    Norm layers and `torch.nn.PReLU` keep parameters that are learned without a prior; ask for
    ``layers=(*pyro_bmr.nn.LAYERS, torch.nn.LayerNorm)`` to give them one. Frozen parameters
    (``requires_grad=False``) become buffers, which Pyro does not train. A parameter that several
    modules share is sampled once; where else it stands is a deterministic site. The padding row of
    an embedding stays at its value: its site has this row too, but the output does not use it.

    Parameters
    ----------
    module : Module
        Any nesting of layers, containers and modules with a forward of their own.
    prior : callable
        `fan_in_normal`, `normal`, `learned_normal`, or any function of the name of a parameter, a
        tensor with its value and its layer, which returns a distribution that broadcasts to its
        shape. It is called whenever the weights are sampled: let it make its tensors from the one
        that it gets (``parameter.new_ones(())``), and they will follow the network's device and
        dtype. If it has parameters of its own, give it the whole shape, so that
        `Reduction.compact` can cut it.
    layers : tuple of type
        The layers to make Bayesian.

    Returns
    -------
    PyroModule
        The network. Call it as ``net(x)``, once per run of the model and outside of plates.

    Raises
    ------
    TypeError
        If ``module`` is not a module, or ``prior`` no function that returns a Pyro distribution.
    ValueError
        If nothing in it can be made Bayesian, if part of it has parameters but is not among
        ``layers``, is lazy, or computes its weights from others (weight norm, spectral
        norm, pruning), or if a prior does not fit its parameter.

    Notes
    -----
    Pyro's own rules for a ``PyroModule`` hold. Its learnable parameters live in the param store
    under their names, so call `pyro.clear_param_store` before another network of the same names. Do
    not run it by itself before it becomes part of another ``PyroModule``. Weights are no longer
    among ``net.parameters()``.

    Examples
    --------
    >>> from pyro import poutine
    >>> net = bayesianize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> list(poutine.trace(net).get_trace(torch.zeros(5, 4)).stochastic_nodes)
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_module(module, layers)
    expected = "a function, such as pyro_bmr.nn.normal()"
    check_function("prior", prior, expected)
    if isinstance(prior, TorchDistributionMixin):
        refuse_kind("prior", prior, expected)
    net = copy.deepcopy(module)
    to_pyro_module_(net)
    owners: dict[int, tuple[Any, str]] = {}
    for layer in net.modules():
        for key, parameter in trainable_parameters(layer) if isinstance(layer, layers) else ():
            owners.setdefault(id(parameter), (layer, key))
    for layer in net.modules():
        for key, parameter in own_parameters(layer):
            if not parameter.requires_grad:
                delattr(layer, key)
                layer.register_buffer(key, parameter.detach())
            elif id(parameter) in owners:
                _make_site(layer, key, parameter, prior, *owners[id(parameter)])
    return net


def _make_site(
    layer: Any, key: str, parameter: Tensor, prior: WeightPrior, owner: Any, owner_key: str
) -> None:
    layer.register_buffer(buffer_name(key), parameter.detach(), persistent=False)
    if (layer, key) == (owner, owner_key):
        name = site_name(layer, key)
        whole = _ask(layer, key, name, prior).shape() == parameter.shape
        make = partial(_make_prior, key=key, name=name, prior=prior, whole=whole)
        make(layer)
    else:
        make = partial(_read, owner=owner, key=owner_key)
    setattr(layer, key, PyroSample(make))
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        layer.register_forward_hook(_hold_padding, with_kwargs=True)


def _make_prior(layer: Any, *, key: str, name: str, prior: WeightPrior, whole: bool) -> Any:
    """Ask for the prior where the layer is now; if it is not whole, give it all of its shape."""
    # Compaction may have made a whole one smaller than the parameter was.
    fn, shape = _ask(layer, key, name, prior), layer.get_buffer(buffer_name(key)).shape
    batch_dim = len(shape) - fn.event_dim
    return (fn if whole else _broadcast(fn, shape, name)).to_event(max(0, batch_dim))


def _ask(layer: Any, key: str, name: str, prior: WeightPrior) -> Any:
    parameter = layer.get_buffer(buffer_name(key))
    with running("prior", (name, parameter, layer), {}, "a function of these three"):
        fn = prior(name, parameter, layer)
    if not isinstance(fn, TorchDistributionMixin):
        msg = (
            f"prior returned a {type(fn).__module__}.{type(fn).__name__} for {name!r}. Expected a "
            "distribution from pyro.distributions"
        )
        raise TypeError(msg)
    return fn


def _broadcast(fn: Any, shape: torch.Size, name: str) -> Any:
    try:
        expanded = fn.expand(shape[: max(0, len(shape) - fn.event_dim)])
    except (RuntimeError, ValueError):
        expanded = fn
    if expanded.shape() != shape:
        msg = (
            f"prior returned a distribution of shape {tuple(fn.shape())} for {name!r}. Expected "
            f"one that broadcasts to {tuple(shape)}, the shape of the parameter that it is given"
        )
        raise ValueError(msg)
    return expanded


def _read(_layer: Any, *, owner: Any, key: str) -> Tensor:
    return getattr(owner, key)


def _hold_padding(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    # torch gives the padding row no gradient, so that its posterior would stay at the prior.
    index = args[0] if args else kwargs["input"]
    row = layer.get_buffer(buffer_name("weight"))[layer.padding_idx]
    return torch.where((index == layer.padding_idx).unsqueeze(-1), row, output)
