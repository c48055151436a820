r"""Noise levels: latent sites that only set the scale of Normal observations.

Such a site :math:`\theta` (a precision, a variance, a scale) enters as
:math:`\sigma = c\,\theta^k`, and the expectation of the log likelihood over it is closed,

.. math:: E[\ln N(y \mid f, \sigma)] = \ln N(y \mid f, \sigma_*) - k (E[\ln\theta] - \ln\theta_*),
          \qquad \theta_*^{-2k} = E[\theta^{-2k}],

since :math:`E[\sigma^{-2}] = \sigma_*^{-2}`. So the model is run at :math:`\theta_*`, the average
:math:`E[\tau]` where the site is a precision :math:`\tau`, and a constant is added that stands for
:math:`E[\ln\tau]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Gamma, LogNormal, Normal
from pyro.poutine import Trace
from torch import Tensor

from pyro_bmr.estimators.posteriors import SitePosterior
from pyro_bmr.programs.distributions import find_core
from pyro_bmr.programs.site_kinds import is_computed


@dataclass(frozen=True)
class NoiseLevel:
    """How a site θ sets the scale σ = c θ^k of ``observed`` sites: k = -1/2 for a precision."""

    exponent: float
    observed: tuple[str, ...]


def find_noise(
    run: Callable[[Mapping[str, Tensor]], Trace], posteriors: Mapping[str, SitePosterior]
) -> dict[str, NoiseLevel]:
    """Find the sites that only set the scale of Normal observations, by varying each.

    Those whose expectations are not closed are left out.
    """

    def statements(values: Mapping[str, Tensor]) -> dict[str, Any]:
        torch.manual_seed(0)
        nodes = run(values).nodes
        return {name: node for name, node in nodes.items() if node["type"] == "sample"}

    before = statements({})
    found = {}
    for name, posterior in posteriors.items():
        core = find_core(posterior.fn)
        if isinstance(core, Gamma | LogNormal):
            # A factor of its own for every element shows which of them reaches which observation.
            draw = posterior.draw
            factor = torch.linspace(2.0, 3.0, draw.numel(), dtype=draw.dtype, device=draw.device)
            factor = factor.reshape(draw.shape)
            after = statements({name: draw * factor})
            level = _noise_level(name, before, after, factor)
            if level and (isinstance(core, LogNormal) or level.exponent == -0.5):
                found[name] = level
    return found


def plug_in(posterior: Any, exponent: float) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\theta_* = E[\theta^{-2k}]^{-1/2k}` and :math:`E[\ln\theta] - \ln\theta_*`.

    The posterior is LogNormal, or a Gamma of a precision, in any wrapping.
    """
    posterior = find_core(posterior)
    if isinstance(posterior, Gamma):
        shortfall = posterior.concentration.digamma() - posterior.concentration.log()
        return posterior.mean, shortfall
    shortfall = exponent * posterior.scale.square()
    return (posterior.loc - shortfall).exp(), shortfall


def _noise_level(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], factor: Tensor
) -> NoiseLevel | None:
    exponents = {}
    for site, node in before.items():
        if site == name or is_computed(node):
            continue
        fn, changed = (find_core(nodes[site]["fn"]) for nodes in (before, after))
        if node["is_observed"] and isinstance(fn, Normal) and _close(fn.loc, changed.loc):
            if _close(fn.scale, changed.scale):
                continue
            exponent = _exponent(changed.scale / fn.scale, factor)
            if exponent is None:
                return None
            exponents[site] = exponent
        elif not _close(_log_density(node), _log_density(after[site], node["value"])):
            return None
    if len(set(exponents.values())) != 1:
        return None
    return NoiseLevel(next(iter(exponents.values())), tuple(exponents))


def _exponent(ratio: Tensor, factor: Tensor) -> float | None:
    for exponent in (-0.5, 0.5, 1.0):
        try:
            expected = factor.pow(exponent).expand(ratio.shape)
        except RuntimeError:
            return None
        if _close(ratio, expected):
            return exponent
    return None


def _log_density(node: Any, value: Any = None) -> Tensor:
    return node["fn"].log_prob(node["value"] if value is None else value)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
