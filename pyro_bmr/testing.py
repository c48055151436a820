"""Laws that extensions obey, for use in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_bmr.arguments.checks import check_function, read_count
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.guides.reading import read_guide, read_origin
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import convert_data
from pyro_bmr.programs.distributions import find_element_support
from pyro_bmr.programs.dry_run import dry_run

__all__ = ["check_guide_family"]


@alone("check_guide_family")
def check_guide_family(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    model: Callable[..., Any] | None = None,
    num_samples: int = 400,
) -> None:
    r"""Check that a guide is read as it is, and is left alone.

    Reading what was written gives back what was read: sites, locations and covariances. Draws of
    the guide, whitened by what was read, :math:`z = L^{-1}(\theta - \mu)`, have mean 0 and
    covariance 1, within six standard errors of each: with 400 draws, 0.3 for a mean or a
    correlation, and 0.42 for a variance; and the mean of all variances within six of its own.

    Parameters
    ----------
    guide : callable, MCMC or mapping
        A trained guide. Posterior samples are not drawn from again.
    *args
        Of the guide, if it does not remember those of its first call.
    kwargs : mapping, optional
        Keyword arguments of the guide.
    model : callable, optional
        The model that it is for, if the guide does not know it.
    num_samples : int
        How often the guide is run. Sites in sub-sampling plates are not compared.

    Raises
    ------
    AssertionError
        If a site, a location or a covariance changes on the way, if draws do not agree with them,
        or if the guide, the param store or the random number generator changes.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> check_guide_family(guide)
    """
    num_samples = read_count("num_samples", num_samples, 2)
    if model is not None:
        check_function("model", model, "the Pyro model that the guide is for")
    origin = read_origin(guide)
    args, keywords = convert_data(model or origin.model, guide, args, kwargs)
    if args or keywords:
        origin = replace(origin, args=args, kwargs=keywords)
    if model is not None:
        origin = replace(origin, model=model)
    before = _state(guide)
    factors = tuple(f for f in read_guide(guide, origin) if not isinstance(f, ProgramFactor))
    _check_same(factors, read_guide(PrunedGuide(factors, replace(origin, program=None))))
    if callable(guide):
        _check_draws(guide, origin, factors, num_samples)
    after = _state(guide)
    if before.keys() != after.keys():
        msg = f"reading made or removed {sorted(before.keys() ^ after.keys())}"
        raise AssertionError(msg)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=f"{name} changed")


def _state(guide: Any) -> dict[str, Tensor]:
    state = dict(guide.state_dict()) if isinstance(guide, nn.Module) else {}
    if isinstance(guide, Mapping):
        state = {name: value for name, value in guide.items() if isinstance(value, Tensor)}
    stored = {f"param store: {n}": v for n, v in pyro.get_param_store().items()}
    everything = {**state, **stored, "generator": torch.get_rng_state()}
    return {name: value.detach().clone() for name, value in everything.items()}


def _check_same(first: Sequence[Factor], second: Sequence[Factor]) -> None:
    if len(first) != len(second):
        msg = f"{len(first)} factors were written and {len(second)} were read"
        raise AssertionError(msg)
    for written, read in zip(first, second, strict=True):
        if written.sites != read.sites:
            msg = f"sites {written.sites} were written and {read.sites} were read"
            raise AssertionError(msg)
        old, new = _dense(written), _dense(read)
        torch.testing.assert_close(new.loc, old.loc, rtol=1e-5, atol=1e-6)
        error = torch.linalg.solve_triangular(old.scale_tril, new.scale_tril, upper=False)
        torch.testing.assert_close(
            error @ error.mT, torch.eye(len(error), device="cpu").to(error), rtol=0, atol=1e-3
        )


def _check_draws(
    guide: Callable[..., Any], origin: Origin, factors: Sequence[Factor], num_samples: int
) -> None:
    draws: dict[str, list[Tensor]] = {site.name: [] for f in factors for site in f.sites}
    with dry_run(guide, origin.model), torch.no_grad():
        pyro.set_rng_seed(0)
        for _ in range(num_samples):
            trace = poutine.trace(guide).get_trace(*origin.args, **origin.kwargs)
            for name, values in draws.items():
                values.append(trace.nodes[name]["value"])
    white = torch.cat([_whiten(f, draws) for f in factors], -1)
    if not white.numel():
        return
    error = 6 / num_samples**0.5
    identity = torch.eye(white.shape[-1], dtype=white.dtype, device="cpu")
    excess = white.mT @ white / num_samples - identity
    checks = {
        "mean": (white.mean(0).abs().max(), error),
        "variance": (excess.diagonal().abs().max(), error * 2**0.5),
        "mean of all variances": (
            excess.diagonal().mean().abs(),
            error * (2 / white.shape[-1]) ** 0.5,
        ),
        "correlation": ((excess * (1 - identity)).abs().max(), error),
    }
    for what, (found, allowed) in checks.items():
        if not found <= allowed:
            msg = (
                f"{num_samples} draws of the guide do not agree with what was read: the {what} of "
                f"whitened draws is off by {float(found):.2f}. Expected at most {allowed:.2f}"
            )
            raise AssertionError(msg)


def _whiten(factor: Factor, draws: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Return draws in units of a factor's posterior, one row per draw, without what is pruned."""
    rows, kept = [], factor.kept()
    for site in factor.sites:
        values = torch.stack([*draws[site.name]])
        unconstrained = biject_to(find_element_support(site.support)).inv(values).double()
        if unconstrained[0].shape != site.shape:
            return torch.zeros(len(values), 0, dtype=torch.float64, device="cpu")
        if not (unconstrained[:, ~kept[site.name]] == 0).all():
            msg = (
                f"draws of pruned elements of the site {site.name!r} are not 0 in unconstrained "
                "coordinates"
            )
            raise AssertionError(msg)
        rows.append(unconstrained[:, kept[site.name]].reshape(len(values), -1))
    posterior = _dense(factor)
    centred = torch.cat(rows, -1) - posterior.loc
    return torch.linalg.solve_triangular(posterior.scale_tril, centred.mT, upper=False).mT.cpu()


def _dense(factor: Factor) -> Dense:
    """Return the posterior of what is kept, in float64 and with all covariances."""
    if isinstance(factor, JointFactor):
        posterior = factor.posterior.to(torch.float64)
        return posterior.dense() if isinstance(posterior, LowRank) else posterior
    marginals, kept = factor.marginals(), factor.kept()
    loc, scale = (
        torch.cat([getattr(marginals[s.name], what)[kept[s.name]].double() for s in factor.sites])
        for what in ("loc", "scale")
    )
    return Dense(loc, scale.diag())


def __dir__() -> list[str]:
    return __all__
