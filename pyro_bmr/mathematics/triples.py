"""A posterior, a prior and a reduced prior that go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_bmr.display import a_or_an
from pyro_bmr.mathematics.gaussian import Dense, Diagonal

Family = TypeVar("Family", Diagonal, Dense, Distribution)


def common_kind(known: Iterable[type], posterior: Any, prior: Any, reduced: Any) -> type:
    """Return the family, of those ``known``, that three densities have in common.

    An unknown one is a TypeError; different families or shapes are a ValueError, but shapes of
    distributions may broadcast; so is a `Dense` of anything but a Cholesky factor.
    """
    three = (posterior, prior, reduced)
    kinds = [_kind(tuple(known), one) for one in three]
    for one in three:
        if isinstance(one, Dense):
            _check_factor(one)
    shapes = {_shape(one) for one in three}
    if len(set(kinds)) == 1 and (len(shapes) == 1 or _broadcast(*three)):
        return kinds[0]
    names = [type(one).__name__ for one in three]
    msg = (
        f"got a {names[0]} posterior, {names[1]} prior and {names[2]} reduced prior of shapes "
        f"{sorted(shapes)}. Expected three of one family and one shape"
    )
    raise ValueError(msg)


def check_proper(improper: Tensor) -> None:
    """Raise ValueError if a reduced posterior cannot be normalised."""
    count = int(improper.sum())
    if count:
        msg = (
            f"the reduced prior leaves {count} of {improper.numel()} posteriors improper: "
            "posterior precision + reduced precision - prior precision must be positive, and so "
            "must each parameter of a Gamma, Beta or Dirichlet. Expected a reduced prior at most "
            "as wide as the prior, or a posterior narrower than the prior"
        )
        raise ValueError(msg)


def dtype_of(family: Any) -> torch.dtype:
    """Return the floating-point type of a density's parameters."""
    if isinstance(family, Independent):
        return dtype_of(family.base_dist)
    return (family.mean if isinstance(family, Distribution) else family.loc).dtype


def _kind(known: tuple[type, ...], family: Any) -> type:
    for kind in known:
        if isinstance(family, kind):
            return kind
    names = ", ".join(kind.__name__ for kind in known)
    msg = f"got {a_or_an(family)}. Expected one of {names}"
    if hasattr(family, "prior_covariance"):
        msg += (
            "; of a Posterior, reduce(posterior) and compare_models(posterior, {'without': "
            "{'A(2,1)': False}}) score what is off"
        )
    raise TypeError(msg)


def _check_factor(dense: Dense) -> None:
    tril, size = dense.scale_tril, len(dense.loc)
    if tril.shape != (size, size) or bool(tril.triu(1).any() | (tril.diagonal() < 0).any()):
        msg = (
            f"got Dense with a scale_tril of shape {tuple(tril.shape)} that is no Cholesky factor "
            f"of {size} elements. Expected one that is lower triangular with a positive diagonal: "
            "of a covariance, torch.linalg.cholesky(covariance)"
        )
        raise ValueError(msg)
    if (tril.diagonal() == 0).any():
        msg = (
            "got a Dense Gaussian with a scale of zero. Expected positive scales; "
            "delta_f_spike_chain scores point masses of correlated elements"
        )
        raise ValueError(msg)


def _shape(family: Any) -> tuple[int, ...]:
    if isinstance(family, Distribution):
        return tuple(family.batch_shape + family.event_shape)
    return tuple(family.loc.shape)


def _broadcast(*families: Any) -> bool:
    if not all(isinstance(family, Distribution) for family in families):
        return False
    try:
        torch.broadcast_shapes(*(family.batch_shape for family in families))
    except RuntimeError:
        return False
    return len({family.event_shape for family in families}) == 1
