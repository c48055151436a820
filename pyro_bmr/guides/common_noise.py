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
class NoiseCoupling:
    """Maps the ``size`` standard normals of a correlated factor to those of what remains of it."""

    size: int
    condition: Callable[[Tensor], Tensor]


def couple(
    factors: Iterable[Factor], masks: Mapping[str, Tensor] | None = None
) -> dict[str, NoiseCoupling]:
    """Couple correlated factors with what remains of them under masks, where True stays.

    By statement of the `PrunedGuide` of what remains. Independent factors need no coupling, since
    they draw their pruned elements as well.
    """
    return {
        latent_name(factor.sites): NoiseCoupling(
            factor.posterior.noise_size, factor.condition_noise(masks or {})
        )
        for factor in factors
        if isinstance(factor, JointFactor)
    }


class CommonNoise(Messenger):
    """Effect handler that draws correlated factors of a `PrunedGuide` from common noise.

    The same seed gives the same noise, whatever remains of a factor. Other statements draw as ever.
    """

    def __init__(self, couplings: Mapping[str, NoiseCoupling], seed: int) -> None:
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
