"""The mean and covariance of posterior draws, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

_DRAWS_PER_ELEMENT = 10
# What a Gaussian has neither of; beyond these, and five standard errors, a warning tells.
_SKEWNESS, _KURTOSIS, _ERRORS = 1.0, 2.0, 5.0


@dataclass(frozen=True)
class SampleMoments:
    r"""Moments of ``total`` draws, of which ``effective`` in the worst of :math:`n` elements.

    The covariance is that of ``root``, :math:`R^\top R` with :math:`R` of shape ``(draws, n)``. It
    needs at least :math:`10 n` effective draws: with :math:`S` draws, the quadratic form
    :math:`\mu^\top \Sigma^{-1} \mu` of a ΔF comes out too large by a factor of about
    :math:`S / (S - n)`. With fewer, the elements are taken as independent.
    """

    mean: Tensor
    root: Tensor
    effective: int
    odd: tuple[int, ...]

    @property
    def total(self) -> int:
        """How many draws there are, of all chains."""
        return len(self.root)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return len(self.mean)

    @property
    def correlated(self) -> bool:
        """Whether the draws are enough for a covariance."""
        return self.effective >= _DRAWS_PER_ELEMENT * self.size

    @property
    def scale(self) -> Tensor:
        """Standard deviations."""
        return self.root.square().sum(0).sqrt()

    def describe(self, names: Callable[[], Sequence[str]]) -> str:
        """Say what of the draws is kept, and what in them is not Gaussian."""
        by_what = "mean and covariance" if self.correlated else "means and variances"
        told = f"{by_what} ({self.total} draws, of which {self.effective} effective in the worst "
        told += "element)"
        if not self.correlated:
            told += (
                f"; all {self.size} elements are taken as independent, because their covariance "
                f"needs {_DRAWS_PER_ELEMENT} effective draws per element"
            )
        if self.odd:
            listed = names()
            some = ", ".join(listed[i] for i in self.odd[:5])
            more = f" and {len(self.odd) - 5} more" if len(self.odd) > 5 else ""
            told += f"; strongly skewed or heavy-tailed, so far from a Gaussian, are {some}{more}"
        return told


def measure_moments(draws: Tensor) -> SampleMoments:
    """Measure the moments of draws of shape ``(chains, draws, n)``."""
    total, size = draws.shape[:-1].numel(), draws.shape[-1]
    finite = draws.isfinite()
    if total < 4 or not finite.all():
        msg = (
            f"got {total} draws, of which {int((~finite).any(-1).sum())} are not finite, in "
            "unconstrained coordinates if these are known. Expected at least 4 finite draws inside "
            "the support"
        )
        raise ValueError(msg)
    flat = draws.reshape(total, size)
    mean = flat.mean(0)
    centred = flat - mean
    varying = draws[..., (flat != flat[0]).any(0)]
    sizes = (
        effective_sample_size(varying).nan_to_num(0.0) if varying.numel() else draws.new_zeros(1)
    )
    effective = min(int(sizes.min()), total)
    return SampleMoments(mean, centred / (total - 1) ** 0.5, effective, _odd(centred, effective))


def _odd(centred: Tensor, effective: int) -> tuple[int, ...]:
    """Find elements with skewness :math:`m_3 / m_2^{3/2}`, or excess kurtosis, beyond chance."""
    count = max(effective, 1)
    second, third, fourth = (centred.pow(power).mean(0) for power in (2, 3, 4))
    skewness = (third / second.pow(1.5)).nan_to_num(0.0).abs()
    kurtosis = (fourth / second.square() - 3).nan_to_num(0.0).abs()
    odd = skewness > max(_SKEWNESS, _ERRORS * (6 / count) ** 0.5)
    odd |= kurtosis > max(_KURTOSIS, _ERRORS * (24 / count) ** 0.5)
    return tuple(torch.nonzero(odd)[:, 0].tolist())
