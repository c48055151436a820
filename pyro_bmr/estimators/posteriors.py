"""The posterior of each latent site, read from a trace of the guide.

An autoguide draws a site in two statements: a Normal over the unconstrained value, and a point
mass at its image. These are put together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro.distributions import Delta, Distribution, LogNormal, Normal
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.programs.distributions import PrunedDistribution, find_core


@dataclass(frozen=True)
class SitePosterior:
    """What a guide says of one latent site, in the sample statements ``nodes``.

    ``fn`` is None if only draws are known.
    """

    fn: Any
    draw: Tensor
    nodes: tuple[Any, ...]

    @property
    def normal(self) -> Any:
        """The independent normal elements of the site, some of them pruned; None if it has none."""
        core = find_core(self.fn) if self.fn is not None else None
        inner = core.base_dist if isinstance(core, PrunedDistribution) else core
        return core if isinstance(inner, Normal) else None


def read_posteriors(
    guide_trace: Trace, supports: Mapping[str, constraints.Constraint]
) -> dict[str, SitePosterior]:
    """Read the posterior of every latent site, given its support in the model."""
    return {name: _read(guide_trace, name, support) for name, support in supports.items()}


def _read(trace: Trace, name: str, support: Any) -> SitePosterior:
    node = trace.nodes[name]
    auxiliary = trace.nodes.get(f"{name}_unconstrained")
    if not isinstance(find_core(node["fn"]), Delta):
        return SitePosterior(node["fn"], node["value"], (node,))
    if auxiliary is None:
        return SitePosterior(None, node["value"], (node,))
    fn = _transformed(auxiliary["fn"], support, node["fn"].event_dim)
    return SitePosterior(fn, node["value"], (auxiliary, node))


def _transformed(fn: Distribution, support: Any, event_dim: int) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    core = find_core(fn)
    if support is constraints.real or support is constraints.real_vector:
        return fn
    if isinstance(core, PrunedDistribution):
        kept = _transformed(core.base_dist, support, 0)
        pruned = kept and PrunedDistribution(find_core(kept), core.mask, core.center)
        return pruned and pruned.to_event(event_dim)
    if support in (constraints.positive, constraints.nonnegative) and isinstance(core, Normal):
        return LogNormal(core.loc, core.scale).to_event(event_dim)
    return None
