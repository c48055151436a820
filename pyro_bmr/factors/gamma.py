"""A factor of independent Gamma distributions at one positive site."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

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
from pyro_bmr.factors.independent import independent_terms
from pyro_bmr.factors.vanishing import put_at_zero
from pyro_bmr.mathematics.evidence import total_dropped
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.programs.sites import Indices, Site, take


@dataclass(frozen=True)
class GammaFactor(Factor):
    r"""Independent Gamma posteriors at one positive site, as in `AutoGamma`.

    ``mean`` is that of :math:`\tau`; mean and standard deviation in unconstrained coordinates are
    those of :math:`\ln\tau`. Without the data it stays whole. ``mask``, of the site's shape, is
    True where an element was not pruned, and ``prior`` that of a site that may be reduced.
    """

    site: Site
    concentration: Tensor
    mean: Tensor
    mask: Tensor | None = None
    prior: Prior | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    @property
    def obstacle(self) -> str:
        """See `Factor.obstacle`."""
        return "its posterior is a Gamma distribution, which is not scored for zero"

    @property
    def priors(self) -> Mapping[str, Prior]:
        """See ``Factor.priors``."""
        return {} if self.prior is None else {self.site.name: self.prior}

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
        scale = torch.polygamma(1, self.concentration).sqrt()
        kept = self.kept()[self.site.name]
        return {self.site.name: Diagonal(torch.where(kept, loc, 0), torch.where(kept, scale, 0))}

    @override
    def kept(self) -> dict[str, Tensor]:
        everything = torch.ones((), dtype=torch.bool, device=self.mean.device)
        kept = everything.expand(self.mean.shape) if self.mask is None else self.mask
        return {self.site.name: kept}

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
        return replace(self, prior=priors.get(self.site.name))

    @override
    def scores(self) -> dict[str, Tensor]:
        return {
            name: torch.where(self.kept()[name], prior.divergence.delta_f, 0)
            for name, prior in self.priors.items()
            if prior.divergence is not None
        }

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: scores[name] for name in self.priors}

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        return {name: scores[name] > -margin for name in self.priors}

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        return independent_terms(self, scores, index)

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        name = self.site.name
        return {name: total_dropped(scores[name], masks[name])} if name in masks else {}

    @property
    def releasable(self) -> tuple[str, ...]:
        """See `Factor.releasable`."""
        return tuple(name for name, prior in self.priors.items() if prior.divergence is not None)

    @override
    def released(self) -> dict[str, Tensor]:
        return {
            name: torch.where(self.kept()[name], -prior.divergence.value, 0)
            for name, prior in self.priors.items()
            if prior.divergence is not None
        }

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> GammaFactor:
        mask = masks.get(self.site.name)
        if mask is None:
            return self
        kept = self.kept()[self.site.name]
        site = put_at_zero(self.site, kept & ~mask)
        return replace(self, site=site, mask=mask & kept)

    @override
    def take(self, kept: Mapping[str, Indices]) -> GammaFactor:
        mine = kept.get(self.site.name)
        if mine is None:
            return replace(self, prior=None)
        return GammaFactor(
            self.site.take(mine),
            take(self.concentration, mine),
            take(self.mean, mine),
            None if self.mask is None else take(self.mask, mine),
        )


def _log_gamma(concentration: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # Wilson & Hilferty (1931) for Gamma(a + 1), whose cube root is nearly normal from 1 on; and
    # Gamma(a) = Gamma(a + 1) U^(1 / a), which does not underflow where a is small.
    above = concentration + 1
    cube_root = 1 - 1 / (9 * above) + first / (3 * above.sqrt())
    log_uniform = torch.special.log_ndtr(second)
    return 3 * cube_root.clamp(min=1e-3).log() + log_uniform / concentration
