"""The evidence of prior scales in a whole posterior, and the scales that maximise it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.gaussian import Diagonal, LowRank
from pyro_bmr.mathematics.scale_search import Tuned, find_best_variance


def choose_variances(factors: tuple[Factor, ...], labels: Mapping[str, Tensor]) -> Tuned:
    """Choose the prior variance of every group by the joint evidence.

    The priors of the sites in ``labels`` are Gaussian; a label of -1 keeps an element's prior.
    """
    pools = [_POOL[type(factor)](factor, labels) for factor in factors if factor.priors]
    count = 1 + max((int(t.max()) for t in labels.values() if t.numel()), default=0)
    highest = torch.zeros(count, dtype=torch.float64, device="cpu")
    for pool in pools:
        tuned = pool.group >= 0
        widest = (_WIDEST * pool.prior.scale[tuned]).square().cpu()
        highest.scatter_reduce_(0, pool.group[tuned].cpu(), widest, "amax")
    chosen = _maximise(pools, highest, torch.arange(count, device="cpu"))
    correlated = [pool for pool in pools if isinstance(pool, _Correlated)]
    turns = torch.cat(
        [torch.arange(0, device="cpu"), *(p.group[p.group >= 0].cpu() for p in correlated)]
    )
    turns = turns.unique()
    if len(turns) < 2:
        return chosen
    # Groups of a correlated posterior take turns, each with the evidence given all others.
    for _ in range(_MAX_SWEEPS):
        before = chosen
        for turn in turns:
            best = _maximise(pools, highest, turn[None])
            chosen = chosen.with_group(turn, best)
            for pool in correlated:
                pool.change(int(turn), float(best.variance[turn]))
        moved = (chosen.variance / before.variance).log().abs()
        if not (moved > _SETTLED).any():
            break
    return chosen


# Times the widest prior of a group: where a search ends.
_WIDEST = 100
_MAX_SWEEPS = 100
_SETTLED = 1e-6
# The joint evidence of a low-rank posterior is computed with all its covariances.
_MOST_CORRELATED = 10_000


def _maximise(pools: list[Any], highest: Tensor, mine: Tensor) -> Tuned:
    nothing = (highest[:0], highest[:0], mine[:0])
    parts = [nothing, *(pool.likelihood(mine) for pool in pools)]
    curvature, slope, group = (torch.cat([part[i].cpu() for part in parts]) for i in range(3))
    return find_best_variance(curvature, slope, group, highest)


@dataclass
class _Independent:
    """Independent elements: their posterior, their prior and their groups, as vectors."""

    posterior: Diagonal
    prior: Diagonal
    group: Tensor

    def likelihood(self, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return curvature and slope around the prior mean, and the group, of some groups."""
        index = torch.isin(self.group, mine.to(self.group.device)).nonzero()[:, 0]
        s, s0 = (g.scale[index].square() for g in (self.posterior, self.prior))
        slope = (self.posterior.loc[index] - self.prior.loc[index]) / s
        return (s0 - s) / (s * s0), slope, self.group[index]


@dataclass
class _Correlated:
    """A correlated posterior under the prior variances that its groups have now."""

    loc: Tensor
    covariance: Tensor
    prior: Diagonal
    variance: Tensor
    group: Tensor

    def likelihood(self, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return curvature and slope along eigenvectors, and the group, of some groups."""
        groups = set(mine.tolist()) & set(self.group.tolist())
        parts = [self._along(group) for group in sorted(groups)]
        empty = self.loc.new_zeros(0), self.loc.new_zeros(0), self.group[:0]
        curvature, slope, group = (torch.cat(part) for part in zip(empty, *parts, strict=True))
        return curvature, slope, group

    def change(self, group: int, variance: float) -> None:
        """Give a group another prior variance, unless that is NaN."""
        index = (self.group == group).nonzero()[:, 0]
        if not variance > 0:
            return
        change = 1 / variance - 1 / self.variance[index]
        columns = self.covariance[:, index]
        identity = torch.eye(len(index), dtype=columns.dtype, device=columns.device)
        # Σ (Λ + Δ)⁻¹ = Σ − Σ_S (I + Δ Σ_SS)⁻¹ Δ Σ_Sᵀ, and the mean moves with the pull of Δ.
        gain = torch.linalg.solve(
            identity + change[:, None] * columns[index], change[:, None] * columns.mT
        )
        pull = self.loc[index] - self.prior.loc[index]
        self.loc = self.loc - gain.mT @ pull
        covariance = self.covariance - columns @ gain
        self.covariance = 0.5 * (covariance + covariance.mT)
        self.variance = self.variance.clone()
        self.variance[index] = variance

    def _along(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        index = (self.group == group).nonzero()[:, 0]
        precision = torch.linalg.inv(self.covariance[index][:, index])
        linear = precision @ (self.loc[index] - self.prior.loc[index])
        likelihood = precision - self.variance[index].reciprocal().diag()
        curvature, vectors = torch.linalg.eigh(0.5 * (likelihood + likelihood.mT))
        return curvature, vectors.mT @ linear, self.group[index]


def _pool_independent(factor: IndependentFactor, labels: Mapping[str, Tensor]) -> _Independent:
    prior: Any = factor.priors[factor.site.name].gaussian
    stored = factor.stored
    flat = [
        t.to(stored.loc.device).double().expand(factor.site.shape).reshape(-1)
        for t in (stored.loc, stored.scale, prior.loc, prior.scale)
    ]
    group = labels[factor.site.name].reshape(-1)
    return _Independent(Diagonal(*flat[:2]), Diagonal(*flat[2:]), group)


def _pool_joint(factor: JointFactor, labels: Mapping[str, Tensor]) -> _Correlated:
    posterior = factor.posterior.to(torch.float64)
    if isinstance(posterior, LowRank):
        if len(posterior.loc) > _MOST_CORRELATED:
            msg = (
                f"got a low-rank posterior of {len(posterior.loc):,} elements. Expected at most "
                f"{_MOST_CORRELATED:,}, for whose joint evidence all covariances are computed; "
                "tune a guide with independent elements, such as AutoNormal"
            )
            raise ValueError(msg)
        posterior = posterior.dense()
    like = posterior.loc
    standard = Prior(like, Diagonal(like.new_zeros(()), like.new_ones(())))
    loc, scale, group = {}, {}, {}
    for site in factor.sites:
        gaussian: Any = factor.priors.get(site.name, standard).gaussian
        loc[site.name] = gaussian.loc.to(like).expand(site.shape)
        scale[site.name] = gaussian.scale.to(like).expand(site.shape)
        nothing = torch.full(site.shape, -1, device=like.device)
        group[site.name] = labels.get(site.name, nothing)
    prior = Diagonal(factor.flatten(loc), factor.flatten(scale))
    return _Correlated(
        posterior.loc,
        posterior.covariance,
        prior,
        prior.scale.square(),
        factor.flatten(group),
    )


_POOL: dict[type, Callable[..., _Independent | _Correlated]] = {
    IndependentFactor: _pool_independent,
    JointFactor: _pool_joint,
}
