"""Priors for the weights of a network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_bmr.arguments.checks import read_number, read_positive
from pyro_bmr.conversion.layers import LOOKUPS

WeightPrior = Callable[[str, Tensor, nn.Module], Any]
"""From the name of a parameter, its value when it was a parameter, and its layer, to its prior."""


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
    return _Prior(_fan_in_normal, scale=_read_scale(scale))


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
    return _Prior(_normal, loc=loc, scale=_read_scale(scale))


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
    >>> from pyro_bmr import bayesianize
    >>> net = bayesianize(nn.Linear(4, 2), prior=learned_normal())
    >>> [(name, tuple(scales.shape)) for name, scales in net.named_parameters()]
    [('weight_prior_scale_unconstrained', (2, 4)), ('bias_prior_scale_unconstrained', (2,))]
    """
    return _Prior(_learned_normal, scale=_read_scale(scale))


class _Prior(partial[Any]):
    """Shown as the call that made it; no closure, so that a network can be pickled."""

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
        return f"{self.func.__name__.removeprefix('_')}({given})"


def _normal(_name: str, parameter: Tensor, _layer: nn.Module, *, loc: float, scale: float) -> Any:
    return dist.Normal(parameter.new_full((), loc), parameter.new_full((), scale))


def _fan_in_normal(name: str, parameter: Tensor, layer: nn.Module, *, scale: float) -> Any:
    looks_up = isinstance(layer, LOOKUPS)
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
