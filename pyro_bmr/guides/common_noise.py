"""Draws of correlated factors from noise that the posteriors before and after a reduction share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor, as_held
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
        for factor in map(as_held, factors)
        if isinstance(factor, JointFactor)
    }


def draw_noise(couplings: Mapping[str, NoiseCoupling], seed: int) -> dict[str, Tensor]:
    """Draw what remains of the noise of each factor; the same seed means the same draw of it."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = {
        name: torch.randn(coupling.size, generator=generator, dtype=torch.float64, device="cpu")
        for name, coupling in couplings.items()
    }
    return {name: coupling.condition(noise[name]) for name, coupling in couplings.items()}


class CommonNoise(Messenger):
    """Effect handler that makes the draws of a `PrunedGuide` of correlated factors from noise.

    By statement, from `draw_noise`. Other statements draw as ever.
    """

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["name"] not in self._noise or type(fn).__name__ not in _GAUSSIANS:
            return
        gaussian, noise = _GAUSSIANS[type(fn).__name__](fn), self._noise[msg["name"]]
        if len(noise) == gaussian.noise_size:
            msg["value"] = gaussian.transform(noise.to(fn.loc))
            msg["done"] = True


_GAUSSIANS: dict[str, Callable[[Any], Dense | LowRank]] = {
    "MultivariateNormal": lambda fn: Dense(fn.loc, fn.scale_tril),
    "LowRankMultivariateNormal": lambda fn: LowRank(fn.loc, fn.cov_factor, fn.cov_diag),
}
