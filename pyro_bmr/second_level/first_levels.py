"""Posteriors of subjects, the parameters that they share, and what their data say about these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, read_names, refuse, refuse_kind
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.mathematics.likelihoods import Likelihoods, exchange_marginal, read_likelihood
from pyro_bmr.moments.posterior import Posterior

# Of a correlation matrix, the eigenvalues that count as zero.
_SINGULAR = 1e-9


@dataclass(frozen=True)
class FirstLevels:
    """Subjects, and k parameters of theirs that vary between them.

    ``places`` ``(N, k)`` has where each is in the subject's posterior, ``free`` ``(N, k)`` where it
    is free. ``basis`` ``(k, d)`` spans what the priors let vary; ``units`` are the likelihoods in
    its coordinates. ``prior_mean`` and ``prior_covariance`` are averages over subjects.
    """

    posteriors: Mapping[str, Posterior]
    parameters: tuple[str, ...]
    places: Tensor
    free: Tensor
    basis: Tensor
    units: Likelihoods
    prior_mean: Tensor
    prior_covariance: Tensor

    @property
    def subjects(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.posteriors)

    @property
    def wide(self) -> tuple[str, ...]:
        """Subjects whose posterior is wider than the prior in some direction, beyond rounding."""
        scale = (self.basis.mT @ self.prior_covariance @ self.basis).diagonal().sqrt()
        values = torch.linalg.eigvalsh(scale[:, None] * self.units.curvature * scale)
        low = values[:, 0] < -1e-6 - 1e-12 * values[:, -1].abs()
        return tuple(name for name, is_low in zip(self.subjects, low, strict=True) if is_low)

    @property
    def unlike(self) -> tuple[str, ...]:
        """Parameters whose prior variances differ between subjects by more than a factor of 10."""
        pairs = zip(self.places, self.posteriors.values(), strict=True)
        device = self.free.device
        variances = torch.stack([one.prior_variance.to(device)[at] for at, one in pairs])
        least = torch.where(self.free, variances, torch.inf).amin(0)
        most = torch.where(self.free, variances, 0.0).amax(0)
        differ = most > 10 * least
        return tuple(name for name, is_so in zip(self.parameters, differ, strict=True) if is_so)

    def under_prior(self, unit: int, mean: Tensor, covariance: Tensor) -> tuple[Posterior, Tensor]:
        """Exchange the prior of a subject's parameters for one in the coordinates of the basis.

        The others keep their prior given these. The second result is the change of F, in nats.
        """
        posterior = tuple(self.posteriors.values())[unit]
        at, curvature = self.units.at[unit], self.units.curvature[unit]
        linear = self.units.linear[unit]
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        shrunk = torch.cholesky_inverse(torch.linalg.cholesky(curvature + precision))
        updated = at + shrunk @ (linear + precision @ (mean - at))
        basis, inner = self._own_basis(unit, len(posterior.mean))
        device = posterior.mean.device

        def exchange(*moments: Tensor) -> tuple[Tensor, Tensor]:
            first, second, new, spread = (one.to(basis.device) for one in moments)
            within = inner.mT @ spread @ inner
            first, second = exchange_marginal(first, second, basis, inner.mT @ new, within)
            return first.to(device), second.to(device)

        own = exchange(posterior.mean, posterior.covariance, updated, shrunk)
        prior = exchange(posterior.prior_mean, _prior(posterior), mean, covariance)
        delta_f = -self.units.log_evidence(unit, mean, covariance)
        level = None
        if posterior.free_energy is not None:
            level = posterior.free_energy + float(delta_f)
        return _with_moments(posterior, own, prior, level), delta_f

    def _own_basis(self, unit: int, size: int) -> tuple[Tensor, Tensor]:
        """Embed the basis in a subject's parameters, and say which coordinates it spans."""
        rows, coordinates = self.basis.shape
        inner = torch.eye(coordinates, device=self.basis.device, dtype=self.basis.dtype)
        if rows == coordinates:
            inner = inner[:, self.free[unit]]
        whole = inner.new_zeros(size, inner.shape[1])
        whole[self.places[unit]] = self.basis @ inner
        return whole, inner


def read_subjects(posteriors: Any) -> dict[str, Posterior]:
    """Read posteriors by subject: a mapping, a Series, or a sequence."""
    import pandas as pd

    if isinstance(posteriors, pd.Series):
        posteriors = posteriors.to_dict()
    if isinstance(posteriors, Posterior):
        refuse_kind("posteriors", posteriors, "one for each of several subjects, in a list")
    if isinstance(posteriors, Mapping):
        found = {str(name): one for name, one in posteriors.items()}
        if len(found) < len(posteriors):
            refuse("posteriors", posteriors, "names of subjects that differ as words")
    elif isinstance(posteriors, Iterable) and not isinstance(posteriors, str | bytes | Tensor):
        found = {f"subject {i}": one for i, one in enumerate(posteriors, 1)}
    else:
        refuse_kind(
            "posteriors", posteriors, "a list of Posterior, or a mapping to these by subject"
        )
    if not found:
        refuse("posteriors", posteriors, "at least one subject")
    for subject, one in found.items():
        check_kind(f"the posterior of {subject!r}", one, Posterior, "a pyro_bmr.Posterior")
        if one.prior_covariance is None:
            refuse(
                f"the posterior of {subject!r}, prior_covariance",
                None,
                "the prior it was estimated with: Posterior(..., prior_covariance=...)",
            )
    return found


def read_first_levels(posteriors: Mapping[str, Posterior], parameters: Any) -> FirstLevels:
    """Find the parameters in every subject, and read the likelihoods."""
    chosen = choose_parameters(posteriors, parameters)
    device = next(iter(posteriors.values())).mean.device
    places = torch.stack(
        [_find(subject, one, chosen).to(device) for subject, one in posteriors.items()]
    )
    pairs = list(zip(places, posteriors.values(), strict=True))
    free = torch.stack([one.free.to(device)[at] for at, one in pairs])
    means, spreads = [], []
    for at, one in pairs:
        means.append(one.prior_mean.to(device)[at])
        spreads.append(_prior(one).to(device)[at][:, at])
    held = free[:, :, None] & free[:, None, :]
    count = free.sum(0).double()
    prior_mean = torch.where(free, torch.stack(means), 0.0).sum(0) / count
    total = torch.where(held, torch.stack(spreads), 0.0).sum(0)
    prior_covariance = total / (count[:, None] * count).sqrt()
    basis = _find_basis(prior_covariance)
    units = [
        _read_unit(subject, one, at, is_free, basis)
        for (subject, one), at, is_free in zip(posteriors.items(), places, free, strict=True)
    ]
    likelihoods = Likelihoods(*map(torch.stack, zip(*units, strict=True)))
    return FirstLevels(
        posteriors, chosen, places, free, basis, likelihoods, prior_mean, prior_covariance
    )


def choose_parameters(posteriors: Mapping[str, Posterior], parameters: Any) -> tuple[str, ...]:
    """Choose names by name, field or glob; those that are fixed in every subject stay out."""
    known = tuple(dict.fromkeys(name for one in posteriors.values() for name in one.names))
    free: set[str] = set()
    for one in posteriors.values():
        free.update(name for name, is_free in zip(one.names, one.free, strict=True) if is_free)
    patterns = read_names("parameters", parameters, "names of parameters")
    if patterns is None:
        chosen = [name for name in known if name in free]
        if not chosen:
            refuse("posteriors", list(posteriors), "a parameter with a variance in some subject")
        return tuple(chosen)
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = find_names(pattern, known)
        if not matches:
            refuse("parameters", pattern, f"a name, a field or a pattern of {_list(known)}")
        varied = [name for name in matches if name in free]
        if not varied:
            refuse(
                "parameters",
                pattern,
                "parameters with a variance in some subject; this is fixed in all of them: leave "
                "it out",
            )
        found |= dict.fromkeys(varied)
    if not found:
        refuse("parameters", parameters, "at least one name")
    return tuple(name for name in known if name in found)


def _find(subject: str, posterior: Posterior, chosen: Sequence[str]) -> Tensor:
    places = {name: i for i, name in enumerate(posterior.names)}
    missing = [name for name in chosen if name not in places]
    if missing:
        msg = (
            f"got posteriors of which that of {subject!r} has no {_list(missing)}. Expected the "
            "parameters in every subject, fixed (with zero variance) where the model has them not; "
            "or parameters= that all subjects have"
        )
        raise ValueError(msg)
    return torch.tensor([places[name] for name in chosen], device="cpu")


def _find_basis(covariance: Tensor) -> Tensor:
    """Span what a covariance lets vary: the identity where it is regular."""
    scale = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance / (scale[:, None] * scale))
    within = values > _SINGULAR
    if within.all():
        return torch.eye(len(scale), device=scale.device, dtype=scale.dtype)
    return torch.linalg.qr(scale[:, None] * vectors[:, within]).Q.contiguous()


def _read_unit(
    subject: str, posterior: Posterior, at: Tensor, free: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the likelihood of a subject, in the coordinates of the basis."""
    device, size = basis.device, basis.shape[1]
    regular = len(basis) == size
    here = at[free] if regular else at
    inner = torch.eye(len(here), device=device).double() if regular else basis
    means = [one.to(device)[here] @ inner for one in (posterior.mean, posterior.prior_mean)]
    spreads = [
        inner.mT @ one.to(device)[here][:, here] @ inner
        for one in (posterior.covariance, _prior(posterior))
    ]
    outside = 0.0 if regular else float((spreads[1].trace() - _trace(posterior, here)).abs())
    for name, one in zip(("posterior", "prior"), spreads, strict=True):
        if outside > 1e-6 * float(spreads[1].trace()) or not _is_regular(one):
            msg = (
                f"the {name} covariance of {subject!r} is singular in another way than the priors "
                "of all subjects are on average. Expected parameters that vary in the same "
                "directions in every subject: choose others by parameters="
            )
            raise ValueError(msg)
    curvature, linear, constant = read_likelihood(means[0], spreads[0], means[1], spreads[1])
    if not regular:
        return means[0], curvature, linear, constant
    whole = basis.new_zeros(size, size)
    whole[free.nonzero(), free.nonzero().mT] = curvature
    vectors = basis.new_zeros(2, size)
    vectors[:, free] = torch.stack([means[0], linear])
    return vectors[0], whole, vectors[1], constant


def _trace(posterior: Posterior, here: Tensor) -> Tensor:
    return _prior(posterior).diagonal().to(here.device)[here].sum()


def _is_regular(covariance: Tensor) -> bool:
    scale = covariance.diagonal().sqrt()
    if not len(scale):
        return True
    if not bool((scale > 0).all()):
        return False
    correlation = covariance / (scale[:, None] * scale)
    return bool(torch.linalg.eigvalsh(correlation)[0] > _SINGULAR / 10)


def _prior(posterior: Posterior) -> Tensor:
    if posterior.prior_covariance is None:
        msg = "got a posterior without a prior. Expected prior_covariance="
        raise ValueError(msg)
    return posterior.prior_covariance


def _with_moments(
    posterior: Posterior,
    own: tuple[Tensor, Tensor],
    prior: tuple[Tensor, Tensor],
    free_energy: float | None,
) -> Posterior:
    """Give another posterior the names and shapes of this one."""
    import xarray as xr

    layout = posterior.layout
    mean: dict[str, Any] = dict(layout.split(own[0]))
    for name, labels in layout.labels.items():
        axes = [(f"axis {i}", list(along)) for i, along in enumerate(labels)]
        mean[name] = xr.DataArray(mean[name].cpu().numpy(), coords=axes)
    return Posterior(
        mean,
        covariance=own[1],
        prior_mean=prior[0],
        prior_covariance=prior[1],
        free_energy=free_energy,
    )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8:,} more"
