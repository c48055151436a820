"""A `Posterior` without a prior of its own, read as that of the sites of a Pyro model."""

from __future__ import annotations

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.latent_sites import find_latent_nodes, make_site
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.moments.posterior import Posterior


def name_moments(posterior: Posterior, origin: Origin) -> tuple[Factor, ...]:
    """Give the moments, in unconstrained coordinates, the sites of a model that has all of them."""
    if posterior.prior_spread is not None:
        msg = (
            "got a Posterior with a prior of its own, and a Pyro model. Expected one or the other: "
            "leave out model=, or prior_covariance= and its like"
        )
        raise ValueError(msg)
    shapes = posterior.layout.shapes
    nodes, _ = find_latent_nodes(shapes, origin, "a Posterior")
    fixed = [n for n, free in posterior.layout.split(posterior.free).items() if not free.all()]
    if nodes.keys() != shapes.keys() or fixed:
        msg = (
            f"got a Posterior of {sorted(shapes)}, of which {sorted(nodes)} are continuous latent "
            f"sites of the model, and {fixed} have a variance of zero. Expected sites of the "
            "model, and positive variances"
        )
        raise ValueError(msg)
    sites = [make_site(name, nodes[name], shapes[name]) for name in shapes]
    dtype = next(iter(nodes.values()))["value"].dtype
    if posterior.spread.dim() == 2:
        dense = Moments(posterior.mean, posterior.spread).dense()
        return (JointFactor(tuple(sites), dense.to(dtype)),)
    mean, scale = (
        posterior.layout.split(t.to(dtype)) for t in (posterior.mean, posterior.variance.sqrt())
    )
    return tuple(IndependentFactor(site, mean[site.name], scale[site.name]) for site in sites)
