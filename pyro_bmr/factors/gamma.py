"""A Gamma factor of a posterior: carried through a reduction as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.factors.factor import (
    Factor,
    Normals,
    Prior,
    Search,
    Terms,
    check_finite,
    check_positive,
)
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.programs.sites import Indices, Site, take


@dataclass(frozen=True)
class GammaFactor(Factor):
    r"""Independent Gamma posteriors at one positive site, as in `AutoGamma`.

    Nothing of it can be pruned, since it has no density at zero. ``mean`` is that of :math:`\tau`;
    mean and standard deviation in unconstrained coordinates are those of :math:`\ln\tau`.
    """

    site: Site
    concentration: Tensor
    mean: Tensor

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    @property
    def obstacle(self) -> str:
        """See `Factor.obstacle`."""
        return "its posterior is a Gamma distribution, of which no element can be zero"

    @property
    def priors(self) -> Mapping[str, Prior]:
        """Empty: see ``Factor.priors``."""
        return {}

    @override
    def check(self) -> None:
        for what, values in (("concentration", self.concentration), ("mean", self.mean)):
            check_finite(self.site.name, what, values)
            check_positive(self.site.name, values)

    @override
    def locations(self) -> dict[str, Tensor]:
        return {self.site.name: self.marginals()[self.site.name].loc}

    @override
    def marginals(self) -> dict[str, Diagonal]:
        loc = self.concentration.digamma() - (self.concentration / self.mean).log()
        return {self.site.name: Diagonal(loc, torch.polygamma(1, self.concentration).sqrt())}

    @override
    def kept(self) -> dict[str, Tensor]:
        return {self.site.name: torch.ones_like(self.mean, dtype=torch.bool)}

    @override
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        marginal = self.marginals()[self.site.name]
        noise = torch.stack(list(normals(2 * self.mean.numel()))).to(self.mean)
        log_tau = _log_gamma(self.concentration.reshape(-1), *noise.chunk(2, -1))
        log_tau = (log_tau - log_tau.mean(0)) / log_tau.std(0, correction=0)
        for step in log_tau:
            yield {self.site.name: marginal.loc + marginal.scale * step.reshape(self.mean.shape)}

    @override
    def with_priors(self, priors: Mapping[str, Prior]) -> GammaFactor:
        return self

    @override
    def scores(self) -> dict[str, Tensor]:
        return {}

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        return {}

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        return Terms(self.mean.new_zeros(0, dtype=torch.long), self.mean.new_zeros(0).double())

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return {}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> GammaFactor:
        return self

    @override
    def take(self, kept: Mapping[str, Indices]) -> GammaFactor:
        mine = kept.get(self.site.name)
        if mine is None:
            return self
        return GammaFactor(
            self.site.take(mine), take(self.concentration, mine), take(self.mean, mine)
        )


def _log_gamma(concentration: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # Wilson & Hilferty (1931) for Gamma(a + 1), whose cube root is nearly normal from 1 on; and
    # Gamma(a) = Gamma(a + 1) U^(1 / a), which does not underflow where a is small.
    above = concentration + 1
    cube_root = 1 - 1 / (9 * above) + first / (3 * above.sqrt())
    log_uniform = torch.special.log_ndtr(second)
    return 3 * cube_root.clamp(min=1e-3).log() + log_uniform / concentration
