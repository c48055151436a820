"""A site that the user's own guide draws: it stays whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.factors.factor import Factor, Normals, Prior, Search, Terms, check_finite
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.programs.sites import Indices, Site


@dataclass(frozen=True)
class ProgramFactor(Factor):
    """A site of which only draws are known, since a guide that is run draws it.

    ``values`` are draws in unconstrained coordinates, of shape ``(draws, *site.shape)``; ``reason``
    says why it is not read.
    """

    site: Site
    values: Tensor
    reason: str

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    @property
    def obstacle(self) -> str:
        """See `Factor.obstacle`."""
        return self.reason

    @property
    def priors(self) -> Mapping[str, Prior]:
        """Empty: see `Factor.priors`."""
        return {}

    @override
    def check(self) -> None:
        check_finite(self.site.name, "value", self.values)

    @override
    def locations(self) -> dict[str, Tensor]:
        return {self.site.name: self.values.mean(0)}

    @override
    def marginals(self) -> dict[str, Diagonal]:
        return {self.site.name: Diagonal(self.values.mean(0), self.values.std(0, correction=0))}

    @override
    def kept(self) -> dict[str, Tensor]:
        return {self.site.name: torch.ones_like(self.values[0], dtype=torch.bool)}

    @override
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        for index, _ in enumerate(normals(1)):
            yield {self.site.name: self.values[index % len(self.values)]}

    @override
    def with_priors(self, priors: Mapping[str, Prior]) -> ProgramFactor:
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
        return Terms(
            torch.zeros(0, dtype=torch.long, device="cpu"),
            torch.zeros(0, dtype=torch.float64, device="cpu"),
        )

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return {}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> ProgramFactor:
        return self

    @override
    def take(self, kept: Mapping[str, Indices]) -> ProgramFactor:
        if any(index is not None for index in kept.get(self.site.name, ())):
            msg = (
                f"cannot cut the site {self.site.name!r}, which the guide that came in draws as "
                "it is. Expected to cut what is reduced only"
            )
            raise ValueError(msg)
        return self
