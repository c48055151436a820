"""Reduced priors: what a reduction may put in the place of a prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_choice, show

PRIOR_MEAN = "prior"
RESTS = ("conditional", "marginal")


@dataclass(frozen=True)
class Spike:
    r"""The reduced prior that is a point mass, :math:`\delta(\theta - c)`, at zero or elsewhere.

    Parameters
    ----------
    loc : float, Tensor or str
        :math:`c`: a number, a tensor that broadcasts to the shape of a site, or ``"prior"`` for the
        mean of the site's prior (its median, if that is a LogNormal). Where that mean is computed
        from the values of other sites, as that of a group, a pruned element is equal to it in every
        draw.
    rest : str
        What the elements that are left have where the prior is correlated: the prior given that
        the others are zero, ``"conditional"``, of which the precision is the block of what is left
        (Savage and Dickey; of a g-prior, the g-prior of the smaller regression); or their
        ``"marginal"`` prior, of which the covariance is (SPM). Where elements are independent a
        priori, these are the same.

    Raises
    ------
    ValueError
        If a location is not finite, or another word than ``"prior"``; or ``rest`` is neither.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import reduce
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0))
    >>> guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor(0.1), init_scale=0.5)
    >>> _ = guide()
    >>> reduce(guide, reduced_prior=Spike()).guide.median()
    {'w': tensor(0.)}
    >>> reduce(guide, reduced_prior=Spike(loc=0.2)).guide.median()
    {'w': tensor(0.2000)}
    """

    loc: float | Tensor | str = 0.0
    rest: str = "conditional"

    def __post_init__(self) -> None:
        check_choice("rest", self.rest, RESTS)
        if isinstance(self.loc, str) and self.loc == PRIOR_MEAN:
            return
        expected = 'finite locations, or "prior" for the mean of the prior'
        _check_values("Spike", "loc", self.loc, torch.isfinite, expected)


@dataclass(frozen=True)
class Gaussian:
    r"""The reduced prior :math:`N(m_r, \sigma_r^2)`: shrinkage towards a value, without pruning.

    Parameters
    ----------
    loc : float or Tensor
        Its mean; broadcasts to the shape of a site.
    scale : float or Tensor
        Its standard deviation; positive, broadcasts to the shape of a site.

    Raises
    ------
    ValueError
        If a location is not finite, or a scale not positive and finite.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import reduce, top_k
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = torch.tensor([0.1, 3.0])
    >>> guide = AutoNormal(model, init_loc_fn=lambda site: start, init_scale=0.2)
    >>> _ = guide()
    >>> reduce(guide, reduced_prior=Gaussian(0.0, 0.1), select=top_k(0)).guide.median()["w"]
    tensor([0.0202, 0.6048])
    """

    loc: float | Tensor
    scale: float | Tensor

    def __post_init__(self) -> None:
        _check_values("Gaussian", "loc", self.loc, torch.isfinite, "finite locations")
        _check_scale("Gaussian", self.scale)


@dataclass(frozen=True)
class Laplace:
    r"""The reduced prior :math:`\exp(-|\theta| / b) / 2b`: shrinkage that spares what is large.

    The reduced posterior is two halves of Gaussians that meet at zero. A guide of Gaussians holds
    the Normal of its mean and variance instead; :math:`\Delta F` is that of the exact one.

    Parameters
    ----------
    scale : float or Tensor
        :math:`b`; positive, broadcasts to the shape of a site.

    Raises
    ------
    ValueError
        If a scale is not positive and finite.

    Examples
    --------
    With the guide of the example of `Gaussian`, where 3.0 shrinks to 0.6048:

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import reduce, top_k
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = torch.tensor([0.1, 3.0])
    >>> guide = AutoNormal(model, init_loc_fn=lambda site: start, init_scale=0.2)
    >>> _ = guide()
    >>> reduce(guide, reduced_prior=Laplace(0.1), select=top_k(0)).guide.median()["w"]
    tensor([0.0262, 2.7083])
    """

    scale: float | Tensor

    def __post_init__(self) -> None:
        _check_scale("Laplace", self.scale)


ReducedPrior = Spike | Gaussian | Laplace


def _read(value: float | Tensor) -> Tensor:
    """Return a tensor where it is, and a number on the CPU, whatever torch's default device is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _check_scale(name: str, scale: float | Tensor) -> None:
    expected = "positive and finite scales; Spike() is the limit of a scale of zero"
    _check_values(name, "scale", scale, lambda t: (t > 0) & t.isfinite(), expected)


def _check_values(
    name: str, what: str, value: Any, fits: Callable[[Tensor], Tensor], expected: str
) -> None:
    """Raise a ValueError if something is no real number, or tensor of such, that fits."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_complex()
    number = float(value) if real else value
    try:
        fitting = (real or dense) and bool(fits(_read(number)).all())
    except RuntimeError:  # of tensors without numbers
        fitting = False
    if not fitting:
        msg = f"got {name}({what}={show(value)}). Expected {expected}, numbers or tensors"
        raise ValueError(msg)
