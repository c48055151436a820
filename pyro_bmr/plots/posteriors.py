"""What figures read of a reduction: each site as it was before, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.arguments.columns import find_axis
from pyro_bmr.display import a_or_an
from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.results import Reduction
from pyro_bmr.selection.decision import Decision


def find_decision(result: Reduction) -> Decision:
    """Return what a result remembers of the posterior before; a ``ValueError`` if it cannot."""
    check_reduction(result)
    if result.decision is None:
        msg = (
            "this result does not know the posterior before the reduction, as one from a file. "
            "Expected what reduce() returned: reduce the full guide again"
        )
        raise ValueError(msg)
    result.decision.check_unchanged()
    return result.decision


def check_reduction(result: Any) -> None:
    """Raise a ``TypeError`` if something is not what `reduce` returns."""
    if not isinstance(result, Reduction):
        msg = (
            f"got {a_or_an(result)}. Expected a Reduction. Pass what "
            "pyro_bmr.reduce(guide) or prune returned; of a fitted estimator that is its result_, "
            "of a pipeline pipeline[-1].result_"
        )
        raise TypeError(msg)


Columns = tuple[int, tuple[str, ...]]


@dataclass(frozen=True)
class ReducedSite:
    """A site before a reduction and after, in unconstrained coordinates and on the CPU.

    ``loc`` and ``scale`` are of the posterior before, in float64, 0 where pruned before; ``after``
    is its mean now. ``alive``: not pruned before; ``kept``: nor now. Left whole, it has no prior.
    """

    name: str
    loc: Tensor
    scale: Tensor
    after: Tensor
    alive: Tensor
    kept: Tensor
    factor: Factor
    prior: Prior | None

    @property
    def log_prior(self) -> Tensor:
        """Ln p(θ = 0) of each element in nats; ``inf`` where there is no prior."""
        if self.prior is None:
            return torch.full_like(self.loc, torch.inf)
        return self.prior.log_density_at_zero.detach().cpu().double().expand(self.loc.shape)


@torch.no_grad()
def read_sites(result: Reduction) -> dict[str, ReducedSite]:
    """Read all sites of a reduction, in the order of the guide."""
    decision = find_decision(result)
    after, pruned = _read_after(result)
    sites = {}
    for factor in decision.factors:
        kept = factor.kept()
        for name, marginal in factor.marginals().items():
            alive = kept[name].cpu()
            sites[name] = ReducedSite(
                name,
                marginal.loc.detach().cpu().double(),
                marginal.scale.detach().cpu().double(),
                after[name].detach().cpu().double(),
                alive,
                alive & pruned.get(name, alive).cpu().expand(alive.shape),
                factor,
                factor.priors.get(name),
            )
    return sites


def _read_after(result: Reduction) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By site, its location now and, if something of it is pruned, what is kept."""
    guide: Any = result.guide
    if isinstance(guide, Posterior):
        return guide.layout.split(guide.mean), guide.layout.split(guide.kept)
    factors = (part.factor() for part in guide.parts)
    after = {name: loc for factor in factors for name, loc in factor.locations().items()}
    return after, result.model.masks.by_site()


def name_columns(result: Reduction, sites: Mapping[str, ReducedSite]) -> dict[str, Columns]:
    """By the site of which one axis runs along the columns of a table, that axis and names."""
    columns = find_decision(result).origin.columns
    shapes = {name: one.loc.shape for name, one in sites.items()}
    parts = {site.name: site for one in sites.values() for site in one.factor.sites}
    plates = {name: parts[name].axes() for name in shapes}
    found = find_axis(shapes, columns, plates)
    return {} if found is None else {found[0]: (found[1], columns)}


def choose_site(sites: dict[str, ReducedSite], name: str) -> ReducedSite:
    """Return a site by its name."""
    if not (isinstance(name, str) and name in sites):
        refuse("site", name, f"one of {sorted(sites)}")
    return sites[name]
