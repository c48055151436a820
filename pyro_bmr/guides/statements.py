"""Sample statements of a guide, read as Gaussians in unconstrained coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import (
    Gamma,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
)
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
    _InverseTransform,
)

from pyro_bmr.display import a_or_an
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.programs.distributions import POSITIVE, find_core, find_element_support
from pyro_bmr.programs.sites import Site


class NotGaussianError(TypeError):
    """A guide whose posterior is not Gaussian in unconstrained coordinates.

    ``why`` says it of one site, for a table.
    """

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why


class PartialRowsError(ValueError):
    """A posterior of which only some rows were drawn; ``why`` says it of one site, for a table."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Statement:
    """A sample statement of a guide: what it draws from, given what was drawn before.

    ``loc`` is the mean in unconstrained coordinates of the rows that were drawn, with gradients to
    what was drawn before; for a Gamma site, the logarithm of its mean. ``spread`` are its other
    parameters, which have to be constant. ``posterior`` is the same at the full size of plates,
    without gradients; None for a Gamma site.
    """

    site: Site
    loc: Tensor
    spread: tuple[Tensor, ...]
    posterior: Diagonal | Dense | LowRank | None

    @property
    def step(self) -> Tensor:
        """Standard deviation of what is drawn, of the shape of ``loc``."""
        if self.posterior is None:
            return torch.polygamma(1, self.spread[0].detach()).sqrt()
        if isinstance(self.posterior, Diagonal):
            return self.spread[0].detach()
        return self.posterior.marginals().scale.reshape(self.loc.shape)


def read_statement(
    msg: Any,
    support: constraints.Constraint,
    full_rows: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None,
) -> Statement:
    """Read a sample statement, inside the plates that it is in; ``support`` is the model's.

    ``full_rows`` maps a site in a sub-sampling plate to its mean and standard deviation at full
    size. What is neither Gaussian in unconstrained coordinates nor Gamma is a `NotGaussianError`.
    """
    name, fn = msg["name"], msg["fn"]
    core, transforms = _unwrap(fn)
    family = next((_FAMILIES[t] for t in type(core).__mro__ if t in _FAMILIES), None)
    if family is None:
        raise site_refusal(name, _kind(core))
    if isinstance(core, Gamma) and find_element_support(support) not in POSITIVE:
        raise site_refusal(name, f"it is a Gamma on the support {support}")
    if isinstance(core, Gamma):
        ahead = transforms
    else:
        ahead = _simplify([*transforms, *_parts(biject_to(support).inv)])
    if isinstance(core, Normal):
        core, ahead = _apply_affine(core, ahead)
    if ahead:
        chain = ", ".join(type(t).__name__ for t in (transforms or ahead))
        why = f"it is {a_or_an(core)} seen through {chain} on the support {support}"
        raise site_refusal(name, why)
    loc, spread, posterior = family(core)
    event_dim = fn.event_dim + loc.dim() - len(fn.shape())
    frames = tuple(frame for frame in msg["cond_indep_stack"] if frame.vectorized)
    shape = list(loc.shape)
    for frame in frames:
        shape[frame.dim - event_dim] = frame.full_size or frame.size
    site = Site(name, torch.Size(shape), event_dim, support, frames)
    if site.shape != loc.shape:
        posterior = _at_full_size(site, loc, spread, full_rows(name))
    return Statement(site, loc, spread, posterior)


def site_refusal(name: str, why: str) -> NotGaussianError:
    """Say why a site is not Gaussian in unconstrained coordinates, and what to do."""
    msg = (
        f"cannot reduce a guide whose site {name!r} is not Gaussian in unconstrained coordinates: "
        f"{why}. Expected Normal, LogNormal, MultivariateNormal, LowRankMultivariateNormal or "
        "Gamma, or any of the first four through biject_to(support). Train such a guide, for "
        "example AutoNormal or AutoMultivariateNormal, or register this one with "
        "@pyro_bmr.extend.read_factors.register"
    )
    return NotGaussianError(msg, f"left to the guide: {why}")


def _kind(core: Any) -> str:
    if getattr(core.support, "is_discrete", False):
        return f"it is {a_or_an(core)}, which is discrete; sum it out (TraceEnum_ELBO)"
    if isinstance(core, dist.Delta):
        return "it is a point mass (Delta), which has no variance"
    return f"it is {a_or_an(core)}"


def _unwrap(fn: Any) -> tuple[Any, list[Transform]]:
    transforms: list[Transform] = []
    fn = find_core(fn)
    while isinstance(fn, TransformedDistribution):
        transforms = [part for t in fn.transforms for part in _parts(t)] + transforms
        fn = find_core(fn.base_dist)
    return fn, transforms


def _parts(transform: Transform) -> list[Transform]:
    if isinstance(transform, ComposeTransform):
        return [part for t in transform.parts for part in _parts(t)]
    if isinstance(transform, IndependentTransform):
        return _parts(transform.base_transform)
    if transform == AffineTransform(0, 1):
        return []
    if isinstance(transform, _InverseTransform):
        inner = _parts(transform.inv)
        return [transform] if inner == [transform.inv] else [t.inv for t in reversed(inner)]
    return [transform]


def _simplify(chain: list[Transform]) -> list[Transform]:
    """Cancel what undoes the transform before it."""
    left: list[Transform] = []
    for transform in chain:
        if left and _same(left[-1].inv, transform):
            left.pop()
        else:
            left.append(transform)
    return left


def _same(first: Transform, second: Transform) -> bool:
    if isinstance(first, _InverseTransform) and isinstance(second, _InverseTransform):
        return _same(first.inv, second.inv)
    # Some transforms without parameters do not define equality.
    plain = all(not isinstance(t, torch.nn.Module) and _is_plain(t) for t in (first, second))
    return first == second or (type(first) is type(second) and plain)


def _is_plain(transform: Transform) -> bool:
    return all(name.startswith("_") for name in vars(transform))


def _apply_affine(core: Any, chain: list[Transform]) -> tuple[Any, list[Transform]]:
    loc, scale = core.loc, core.scale
    for i, transform in enumerate(chain):
        affine = transform.inv if isinstance(transform, _InverseTransform) else transform
        if not isinstance(affine, AffineTransform):
            return core, chain[i:]
        loc = transform(loc)
        factor = torch.as_tensor(affine.scale, device=loc.device).abs()
        scale = scale * factor if transform is affine else scale / factor
    return Normal(loc, scale, validate_args=False), []


def _read_normal(core: Any) -> tuple[Tensor, tuple[Tensor, ...], Diagonal]:
    return core.loc, (core.scale,), Diagonal(core.loc.detach(), core.scale.detach())


def _read_dense(core: Any) -> tuple[Tensor, tuple[Tensor, ...], Dense]:
    tril = core.scale_tril.detach()
    return core.loc, (core.scale_tril,), _blocks(core.loc, tril)


def _read_low_rank(core: Any) -> tuple[Tensor, tuple[Tensor, ...], Dense | LowRank]:
    loc, spread = core.loc, (core.cov_factor, core.cov_diag)
    if loc.numel() > loc.shape[-1]:
        return loc, spread, _blocks(loc, torch.linalg.cholesky(core.covariance_matrix.detach()))
    rank = core.cov_factor.shape[-1]
    factor = core.cov_factor.detach().reshape(-1, rank)
    return loc, spread, LowRank(loc.detach().reshape(-1), factor, core.cov_diag.detach().flatten())


def _read_gamma(core: Any) -> tuple[Tensor, tuple[Tensor, ...], None]:
    return (core.concentration / core.rate).log(), (core.concentration,), None


_FAMILIES: dict[type, Callable[[Any], tuple[Tensor, tuple[Tensor, ...], Any]]] = {
    Normal: _read_normal,
    MultivariateNormal: _read_dense,
    LowRankMultivariateNormal: _read_low_rank,
    Gamma: _read_gamma,
}


def _blocks(loc: Tensor, tril: Tensor) -> Dense:
    """Put a batch of Gaussian vectors into one, independent of each other."""
    size = tril.shape[-1]
    return Dense(loc.detach().reshape(-1), torch.block_diag(*tril.reshape(-1, size, size)))


def _at_full_size(
    site: Site, loc: Tensor, spread: tuple[Tensor, ...], full: tuple[Tensor, Tensor] | None
) -> Diagonal:
    if full is not None:
        rows = [pyro.subsample(t, event_dim=site.event_dim) for t in full]
        if all(bool((row == seen).all()) for row, seen in zip(rows, (loc, *spread), strict=True)):
            return Diagonal(*(t.detach().expand(site.shape) for t in full))
    plates = ", ".join(
        f"{f.name!r} ({f.size} of {f.full_size} rows)"
        for f in site.plates
        if f.full_size not in (None, f.size)
    )
    msg = (
        f"cannot read the posterior of the site {site.name!r} at full size, because the guide drew "
        f"only some rows of the plate {plates}. Expected arguments with which it draws all rows, "
        "or a guide that holds them, such as AutoNormal"
    )
    raise PartialRowsError(msg, f"left to the guide: it drew only some rows of the plate {plates}")
