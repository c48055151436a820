"""Autoguides that are affine maps of standard normals: ``AutoStructured`` and ``AutoGaussian``."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from pyro.infer.autoguide import AutoStructured
from pyro.infer.autoguide.gaussian import AutoGaussianDense

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.autoguides import check_called, read_parameter, read_value, read_whole_site
from pyro_bmr.guides.linear_gaussian import Conditional, connected, join
from pyro_bmr.guides.statements import NotGaussianError
from pyro_bmr.mathematics.gaussian import Dense, Diagonal


def read_structured(guide: AutoStructured) -> tuple[Factor, ...]:
    """Read an ``AutoStructured`` that is linear and Gaussian: a `Conditional` per site."""
    check_called(guide)
    return join([_conditional(guide, name, node) for name, node in guide._sorted_sites])


@torch.no_grad()
def read_gaussian(guide: AutoGaussianDense) -> tuple[Factor, ...]:
    r"""Read an ``AutoGaussian``, whose precision is sparse.

    .. math:: \theta = \mu + D z, \qquad z \sim N(m, LL^\top)
    """
    check_called(guide)
    for path in dict(guide.named_parameters()):
        read_parameter(guide, path)
    base = guide._dense_get_mvn()
    latent = {name: node for name, node in guide._factors.items() if not node["is_observed"]}
    loc, scale = (
        torch.cat([attrgetter(name)(home).reshape(-1) for name in latent])
        for home in (guide.locs, guide.scales)
    )
    loc, tril = loc + scale * base.mean, scale[:, None] * base.scale_tril
    sites = {
        name: read_whole_site(guide, latent[name], batch + event, len(event))
        for name, (batch, event) in guide._dense_shapes.items()
    }
    places = torch.arange(len(loc), device="cpu").split(
        [site.shape.numel() for site in sites.values()]
    )
    factors = []
    # Sites that share no factor of the precision are independent, and so are their rows of L.
    for group in connected(latent.keys() & up for up in guide.dependencies.values()):
        index = torch.cat([p for name, p in zip(sites, places, strict=True) if name in group])
        members = tuple(site for name, site in sites.items() if name in group)
        factors.append(JointFactor(members, Dense(loc[index], tril[index][:, index])))
    return tuple(factors)


def _conditional(guide: AutoStructured, name: str, node: Any) -> Conditional:
    event = guide._unconstrained_event_shapes[name]
    site = read_whole_site(guide, node, guide._batch_shapes[name] + event, len(event))
    kind, upstream = guide.conditionals[name], guide.dependencies.get(name, {})
    other = [c for c in [kind] if c not in ("normal", "mvn")]
    other += [d for d in upstream.values() if d != "linear"]
    if other:
        msg = (
            f"cannot reduce an AutoStructured that has {other[0]!r} among the conditionals and "
            f"dependencies of the site {name!r}. Expected the conditionals 'normal' or 'mvn' and "
            "the dependencies 'linear', with which the posterior is Gaussian: train it so, or "
            "train AutoNormal"
        )
        raise NotGaussianError(msg)
    loc = read_parameter(guide, f"locs.{name}")
    scale = read_value(guide, f"scales.{name}", guide.scale_constraint)
    gaussian: Diagonal | Dense = Diagonal(loc.view(site.shape), scale.view(site.shape))
    if kind == "mvn":
        tril = read_value(guide, f"scale_trils.{name}", guide.scale_tril_constraint)
        gaussian = Dense(loc, scale[:, None] * tril)
    weights = {u: read_parameter(guide, f"deps.{name}.{u}.weight") for u in upstream}
    return Conditional(site, gaussian, weights)
