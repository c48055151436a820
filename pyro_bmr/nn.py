"""From torch to Pyro: a network whose weights are sample sites, made from a plain torch module.

`bayesianize` is the entry; `fan_in_normal`, `normal` and `learned_normal` are priors,
`init_to_pretrained` starts a guide at the weights that the network had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from math import isfinite, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from pyro_bmr.arguments.checks import (
    check_function,
    check_kind,
    read_number,
    read_positive,
    refuse_kind,
)
from pyro_bmr.programs.failures import running

WeightPrior = Callable[[str, Tensor, nn.Module], Any]
"""From the name of a parameter, its value when it was a parameter, and its layer, to its prior."""

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.RNNCellBase,
)
"""The layers whose weights and biases become sample sites, and those derived from them."""


def fan_in_normal(scale: float = 1.0) -> WeightPrior:
    r"""Return the prior under which a unit's input has the same variance however wide the layer.

    .. math:: w \sim N(0, \text{scale}^2 / \text{fan-in}), \qquad b \sim N(0, \text{scale}^2)

    The fan-in is torch's, the number of elements of ``weight[0]``; that of an embedding is 1, and
    that of what has fewer than two dimensions (a bias, the gain of a norm layer) also.

    Parameters
    ----------
    scale : float
        Standard deviation of a bias, and of the sum that a unit takes over inputs of size 1.

    Returns
    -------
    callable
        A prior for `bayesianize`.

    References
    ----------
    Neal (1996), "Bayesian Learning for Neural Networks", ch. 2, who scales weights but not
    biases; Lee et al. (2018), arXiv:1711.00165, sec. 2.

    Examples
    --------
    >>> layer = nn.Linear(4, 2)
    >>> fan_in_normal()("weight", layer.weight, layer).scale
    tensor(0.5000)
    """
    return partial(_fan_in_normal, scale=_read_scale(scale))


def normal(loc: float = 0.0, scale: float = 1.0) -> WeightPrior:
    """Return the prior that is the same normal distribution for every weight and bias.

    Parameters
    ----------
    loc, scale : float
        Mean and standard deviation.

    Returns
    -------
    callable
        A prior for `bayesianize`.

    Examples
    --------
    >>> layer = nn.Linear(4, 2)
    >>> normal(scale=0.1)("weight", layer.weight, layer)
    Normal(loc: 0.0, scale: 0.1...)
    """
    loc = read_number("loc", loc, isfinite, "a finite mean")
    return partial(_normal, loc=loc, scale=_read_scale(scale))


def learned_normal(scale: float = 1.0) -> WeightPrior:
    r"""Return the prior in which each element has a scale of its own, learned with the posterior.

    .. math:: w_i \sim N(0, \tau_i^2), \qquad
              \min_{\tau_i} KL(q \,\|\, p) = \tfrac{1}{2} \ln(1 + m_i^2 / s_i^2)
              \text{ at } \tau_i^2 = m_i^2 + s_i^2

    for a posterior :math:`N(m_i, s_i^2)`: automatic relevance determination. It shrinks large
    weights hardly at all, and those that are not needed to zero. Scales are parameters of the
    model, which `fit` and `pyro.infer.SVI` train together with the guide; MCMC does not. A scale
    that is chosen for its element costs nothing: once it is, the evidence of an element that is
    independent in the posterior never says that F falls when it goes. Prune what raises F by less
    than a margin, as in ``by_evidence(margin=-0.1)``, and do not compare this F with that of a
    prior that was fixed in advance.

    Parameters
    ----------
    scale : float
        Scales start at those of `fan_in_normal`.

    Returns
    -------
    callable
        A prior for `bayesianize`.

    References
    ----------
    MacKay (1994), "Bayesian nonlinear modeling for the prediction competition"; Kharitonov,
    Molchanov & Vetrov (2018), "Variational dropout via empirical Bayes", arXiv:1811.00596.

    Examples
    --------
    >>> net = bayesianize(nn.Linear(4, 2), prior=learned_normal())
    >>> [(name, tuple(scales.shape)) for name, scales in net.named_parameters()]
    [('weight_prior_scale_unconstrained', (2, 4)), ('bias_prior_scale_unconstrained', (2,))]
    """
    return partial(_learned_normal, scale=_read_scale(scale))


# Priors are partials of these, not closures, so that a network can be pickled.
def _normal(_name: str, parameter: Tensor, _layer: nn.Module, *, loc: float, scale: float) -> Any:
    return dist.Normal(parameter.new_full((), loc), parameter.new_full((), scale))


def _fan_in_normal(name: str, parameter: Tensor, layer: nn.Module, *, scale: float) -> Any:
    looks_up = isinstance(layer, _LOOKUPS)
    fan_in = 1 if looks_up else max(1, parameter.shape[1:].numel())
    return _normal(name, parameter, layer, loc=0.0, scale=scale / sqrt(fan_in))


def _learned_normal(name: str, parameter: Tensor, layer: Any, *, scale: float) -> Any:
    key = f"{name.rpartition('.')[2]}_prior_scale"
    if key not in layer._pyro_params:
        if hasattr(layer, key):
            msg = (
                f"the layer of {name!r} has an attribute {key!r} already. Expected none of this "
                "name, under which the learned scales are kept: give it another one"
            )
            raise ValueError(msg)
        start = _fan_in_normal(name, parameter, layer, scale=scale).scale
        whole = start.expand_as(parameter).clone()
        setattr(layer, key, PyroParam(whole, constraints.positive, event_dim=whole.dim()))
    scales = getattr(layer, key)
    return dist.Normal(torch.zeros_like(scales), scales)


def _read_scale(scale: float) -> float:
    return read_positive("scale", scale, "a positive standard deviation")


def bayesianize(
    module: nn.Module,
    *,
    prior: WeightPrior = fan_in_normal(),  # noqa: B008
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
    _check_module(module, layers)
    expected = "a function, such as pyro_bmr.nn.normal()"
    check_function("prior", prior, expected)
    if isinstance(prior, TorchDistributionMixin):
        refuse_kind("prior", prior, expected)
    net = copy.deepcopy(module)
    to_pyro_module_(net)
    owners: dict[int, tuple[Any, str]] = {}
    for layer in net.modules():
        for key, parameter in _trainable(layer) if isinstance(layer, layers) else ():
            owners.setdefault(id(parameter), (layer, key))
    for layer in net.modules():
        for key, parameter in _parameters(layer):
            if not parameter.requires_grad:
                delattr(layer, key)
                layer.register_buffer(key, parameter.detach())
            elif id(parameter) in owners:
                _make_site(layer, key, parameter, prior, *owners[id(parameter)])
    return net


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
    >>> from pyro.infer.autoguide import AutoNormal
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
            f"init_to_pretrained got a {type(net).__name__} that holds no pretrained weights. "
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


_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)

_NOT_BAYESIAN = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
)


def _make_site(
    layer: Any, key: str, parameter: Tensor, prior: WeightPrior, owner: Any, owner_key: str
) -> None:
    layer.register_buffer(_buffer(key), parameter.detach(), persistent=False)
    if (layer, key) == (owner, owner_key):
        name = _site_name(layer, key)
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
    fn, shape = _ask(layer, key, name, prior), layer.get_buffer(_buffer(key)).shape
    batch_dim = len(shape) - fn.event_dim
    return (fn if whole else _broadcast(fn, shape, name)).to_event(max(0, batch_dim))


def _ask(layer: Any, key: str, name: str, prior: WeightPrior) -> Any:
    parameter = layer.get_buffer(_buffer(key))
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
    row = layer.get_buffer(_buffer("weight"))[layer.padding_idx]
    return torch.where((index == layer.padding_idx).unsqueeze(-1), row, output)


def _parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the layer itself, each under all its names; not those of a prior."""
    learned = getattr(layer, "_pyro_params", {})
    own = layer.named_parameters(recurse=False, remove_duplicate=False)
    return [(key, p) for key, p in own if key.removesuffix("_unconstrained") not in learned]


def _trainable(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, p) for key, p in _parameters(layer) if p.requires_grad]


def _buffer(key: str) -> str:
    return f"{key}_pretrained"


def _site_name(layer: Any, key: str) -> str:
    return f"{layer._pyro_name}.{key}" if layer._pyro_name else key


def _pretrained(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for layer in net.modules():
        for key in layer._pyro_samples if isinstance(layer, PyroModule) else ():
            if _buffer(key) in layer._buffers:
                yield _site_name(layer, key), layer.get_buffer(_buffer(key))


def _check_is_run(net: nn.Module, site: str, values: dict[str, Tensor]) -> None:
    own = next((name for name in values if site.endswith(f".{name}")), None)
    if own and isinstance(net, PyroModule) and not net._pyro_context.used:
        msg = (
            f"init_to_pretrained got a network whose {own!r} is not the model's {site!r}. Expected "
            "the network that the model calls, not one that it was copied from"
        )
        raise ValueError(msg)


def _check_module(module: Any, layers: tuple[type[nn.Module], ...]) -> None:
    if not isinstance(module, nn.Module):
        msg = f"bayesianize got a {type(module).__name__}. Expected a torch.nn.Module"
        raise TypeError(msg)
    if (
        not isinstance(layers, tuple)
        or not all(isinstance(layer, type) for layer in layers)
        or not layers
    ):
        refuse_kind("layers", layers, "a tuple of types, such as pyro_bmr.nn.LAYERS")
    asked = [layer for layer in module.modules() if isinstance(layer, layers)]
    known = {id(parameter) for layer in asked for parameter in layer.parameters(recurse=False)}
    for path, layer in module.named_modules():
        obstacle = _obstacle(layer, known)
        if obstacle:
            place = f"{path!r}, a" if path else "a"
            msg = f"bayesianize got {place} {type(layer).__name__} that {obstacle}"
            raise ValueError(msg)
    if not any(_trainable(layer) for layer in asked):
        names = ", ".join(layer.__name__ for layer in layers)
        msg = (
            f"bayesianize got a {type(module).__name__} in which no layer of layers= has trainable "
            f"parameters. Expected some of {names}; unfreeze them, or name other types in layers="
        )
        raise ValueError(msg)


def _obstacle(layer: Any, known: set[int]) -> str | None:
    """Say why a module cannot be converted, and what to do about it, if so."""
    if any(map(is_lazy, (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))):
        return "is lazy. Run it once on a batch, so that its parameters get their shapes"
    if is_parametrized(layer):
        return (
            f"computes its {', '.join(layer.parametrizations)} from other parameters. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    trainable = _trainable(layer)
    for key, _ in trainable:
        stem = key.rpartition("_")[0]
        if isinstance(vars(layer).get(stem), Tensor):
            return (
                f"computes its {stem} from {key} in a hook (weight norm, spectral norm, pruning). "
                "Remove the hook first, as by torch.nn.utils.prune.remove"
            )
    if trainable and isinstance(layer, _LOOKUPS) and layer.max_norm is not None:
        return (
            f"rescales its weight in place (max_norm={layer.max_norm}), which would change the "
            "draws. Set max_norm=None"
        )
    own = [key for key, parameter in trainable if id(parameter) not in known]
    if own and not isinstance(layer, _NOT_BAYESIAN):
        return (
            f"has parameters of its own ({', '.join(own)}) and is not among layers=. If its "
            f"forward reads them as attributes (self.{own[0]}), pass layers=(*pyro_bmr.nn.LAYERS, "
            f"{type(layer).__name__}); otherwise build it from layers that are "
            "(torch.nn.GRUCell for torch.nn.GRU), or freeze it with requires_grad_(False)"
        )
    return None
