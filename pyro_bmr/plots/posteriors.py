"""What figures read of a reduction: each site as it was before, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.reduction import Reduction
from pyro_bmr.selection.decision import Decision


def find_decision(result: Reduction) -> Decision:
    """Return what a result remembers of the posterior before.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned.

    Returns
    -------
    Decision
        Of a guide that has not been trained since.

    Raises
    ------
    TypeError
        If it is not a reduction.
    ValueError
        If it came from a file, or the guide was trained since.

    Examples
    --------
    >>> find_decision(Reduction(None, None, {}, {}, ()))
    Traceback (most recent call last):
        ...
    ValueError: this result does not know the posterior before the reduction, as one from a file...
    """
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
    """Look whether something is what `reduce` returns.

    Parameters
    ----------
    result : object
        What a user passed.

    Raises
    ------
    TypeError
        If not.

    Examples
    --------
    >>> check_reduction(Reduction(None, None, {}, {}, ()))
    """
    if not isinstance(result, Reduction):
        inside = isinstance(getattr(result, "reduction", None), Reduction)
        remedy = "Pass its .reduction" if inside else "Pass what pyro_bmr.reduce(guide) returned"
        msg = f"got a {type(result).__name__}. Expected a Reduction. {remedy}"
        raise TypeError(msg)


@dataclass(frozen=True)
class SitePosterior:
    """A site before a reduction and after, in unconstrained coordinates and on the CPU.

    Parameters
    ----------
    name : str
        The site.
    loc, scale : Tensor
        Posterior means and standard deviations before, in float64 and of the site's shape; 0 where
        it was pruned before.
    after : Tensor
        Posterior means now; 0 where pruned.
    alive, kept : Tensor
        Boolean: what was not pruned before, and what of it the reduction keeps.
    factor : Factor
        The posterior that it is of, with its priors.
    prior : Prior, optional
        None where the site was left whole.
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
def read_sites(result: Reduction) -> dict[str, SitePosterior]:
    """Read all sites of a reduction.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned.

    Returns
    -------
    dict of SitePosterior
        By name, in the order of the guide.

    Raises
    ------
    TypeError
        As `find_decision`.
    ValueError
        As `find_decision`.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr.reduction import reduce
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> read_sites(reduce(guide))["w"].scale
    tensor(0.1000, dtype=torch.float64)
    """
    decision = find_decision(result)
    after = {
        name: loc for part in result.guide.parts for name, loc in part.factor().locations().items()
    }
    pruned = {name: mask.detach().cpu() for name, mask in result.model.masks.by_site().items()}
    sites = {}
    for factor in decision.factors:
        kept = factor.kept()
        for name, marginal in factor.marginals().items():
            alive = kept[name].cpu()
            sites[name] = SitePosterior(
                name,
                marginal.loc.detach().cpu().double(),
                marginal.scale.detach().cpu().double(),
                after[name].detach().cpu().double(),
                alive,
                alive & pruned.get(name, torch.tensor(True)).expand(alive.shape),
                factor,
                factor.priors.get(name),
            )
    return sites


def choose_site(sites: dict[str, SitePosterior], name: str) -> SitePosterior:
    """Return a site by its name.

    Parameters
    ----------
    sites : dict of SitePosterior
        Of a reduction.
    name : str
        What a user passed.

    Returns
    -------
    SitePosterior
        Of that name.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> choose_site({}, "w")
    Traceback (most recent call last):
        ...
    ValueError: got site='w'. Expected one of []
    """
    if name not in sites:
        msg = f"got site={name!r}. Expected one of {sorted(sites)}"
        raise ValueError(msg)
    return sites[name]
