"""Sites that are Gaussian given one another, joined into independent factors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.programs.sites import Site


def join(conditionals: Sequence[Conditional]) -> tuple[Factor, ...]:
    """Multiply Gaussian conditionals, each after its parents, and keep independent ones apart."""
    by_name = {c.site.name: c for c in conditionals}
    groups = connected({name, *c.weights} for name, c in by_name.items())
    parts = [[c for name, c in by_name.items() if name in group] for group in groups]
    return tuple(_alone(part[0]) if len(part) == 1 else _joint(part) for part in parts)


@dataclass(frozen=True)
class Conditional:
    r"""A site :math:`\theta_i = \mu_i + \sum_j W_{ij} (\theta_j - \mu_j) + L_i \epsilon_i`.

    Over flattened elements, but a `Diagonal` has the shape of the site.
    """

    site: Site
    gaussian: Diagonal | Dense | LowRank
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def connected(groups: Iterable[Collection[str]]) -> list[set[str]]:
    """Merge groups of names that have a name in common, in the order of the first of each."""
    merged: list[set[str]] = []
    for group in map(set, groups):
        apart = [other for other in merged if not other & group]
        touching = [other for other in merged if other & group]
        at = merged.index(touching[0]) if touching else len(merged)
        apart.insert(at, group.union(*touching))
        merged = apart
    return merged


def _alone(conditional: Conditional) -> Factor:
    site, gaussian = conditional.site, conditional.gaussian
    if isinstance(gaussian, Diagonal):
        return IndependentFactor(site, gaussian.loc, gaussian.scale)
    return JointFactor((site,), gaussian)


def _joint(conditionals: Sequence[Conditional]) -> Factor:
    r"""Multiply conditionals in the order of sampling.

    With :math:`\theta = \mu + A\epsilon`, the rows of :math:`A` that belong to a site are
    :math:`A_i = \sum_j W_{ij} A_j + L_i` (:math:`L_i` in its own columns), so that :math:`A` is
    lower triangular: the Cholesky factor of the joint covariance.
    """
    loc = torch.cat([c.gaussian.loc.reshape(-1) for c in conditionals])
    tril = loc.new_zeros(len(loc), len(loc))
    rows: dict[str, slice] = {}
    end = 0
    for c in conditionals:
        here = rows[c.site.name] = slice(end, end + c.gaussian.loc.numel())
        for name, weight in c.weights.items():
            tril[here] += weight @ tril[rows[name]]
        tril[here, here] = _scale_tril(c.gaussian)
        end = here.stop
    return JointFactor(tuple(c.site for c in conditionals), Dense(loc, tril))


def _scale_tril(gaussian: Diagonal | Dense | LowRank) -> Tensor:
    if isinstance(gaussian, Diagonal):
        return gaussian.scale.reshape(-1).diag()
    return (gaussian.dense() if isinstance(gaussian, LowRank) else gaussian).scale_tril
