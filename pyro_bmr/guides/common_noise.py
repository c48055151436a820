"""Draws of correlated factors from noise that the posteriors before and after a reduction share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.pruned_guide import latent_name
from pyro_bmr.mathematics.gaussian import Dense, LowRank


@dataclass(frozen=True)
class Coupling:
    """How a correlated factor, after a reduction, is drawn from the noise of the one before.

    Parameters
    ----------
    size : int
        How many standard normals the factor before needs.
    condition : callable
        From these to those of the factor after.

    Examples
    --------
    >>> Coupling(3, lambda noise: noise[:2]).size
    3
    """

    size: int
    condition: Callable[[Tensor], Tensor]


def couple(
    factors: Iterable[Factor], masks: Mapping[str, Tensor] | None = None
) -> dict[str, Coupling]:
    """Couple what remains of correlated factors with the factors themselves.

    Parameters
    ----------
    factors : iterable of Factor
        Before a reduction.
    masks : mapping, optional
        By site, True for what stays, if something goes; the rest is zero.

    Returns
    -------
    dict of Coupling
        By statement of the `PrunedGuide` of what remains; none for independent factors, which draw
        their pruned elements as well.

    Examples
    --------
    >>> from pyro_bmr.programs.sites import Site
    >>> factor = JointFactor((Site("w", torch.Size([2])),), Dense(torch.zeros(2), torch.eye(2)))
    >>> coupling = couple([factor], {"w": torch.tensor([False, True])})["w_latent"]
    >>> coupling.condition(torch.tensor([3.0, 4.0]).double())
    tensor([4.], dtype=torch.float64)
    """
    return {
        latent_name(factor.sites): Coupling(
            factor.posterior.noise_size, factor.condition_noise(masks or {})
        )
        for factor in factors
        if isinstance(factor, JointFactor)
    }


class CommonNoise(Messenger):
    """Effect handler that draws correlated factors of a `PrunedGuide` from common noise.

    Other statements draw as ever.

    Parameters
    ----------
    couplings : mapping
        By statement.
    seed : int
        Of the noise: the same seed gives the same noise, whatever remains of a factor.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> two = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> one = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    >>> with CommonNoise({"w_latent": Coupling(2, lambda noise: noise)}, seed=0):
    ...     before = pyro.sample("w_latent", two)
    >>> with CommonNoise({"w_latent": Coupling(2, lambda noise: noise[1:])}, seed=0):
    ...     after = pyro.sample("w_latent", one)
    >>> bool(before[1] == after[0])
    True
    """

    def __init__(self, couplings: Mapping[str, Coupling], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._couplings = couplings
        self._noise = {
            name: torch.randn(coupling.size, generator=generator, dtype=torch.float64)
            for name, coupling in couplings.items()
        }

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["name"] not in self._couplings or type(fn).__name__ not in _GAUSSIANS:
            return
        gaussian = _GAUSSIANS[type(fn).__name__](fn)
        noise = self._couplings[msg["name"]].condition(self._noise[msg["name"]])
        if len(noise) == gaussian.noise_size:
            msg["value"] = gaussian.transform(noise.to(fn.loc))
            msg["done"] = True


_GAUSSIANS: dict[str, Callable[[Any], Dense | LowRank]] = {
    "MultivariateNormal": lambda fn: Dense(fn.loc, fn.scale_tril),
    "LowRankMultivariateNormal": lambda fn: LowRank(fn.loc, fn.cov_factor, fn.cov_diag),
}
