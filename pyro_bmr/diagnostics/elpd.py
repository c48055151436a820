"""Leave-one-out cross-validation of draws, by whichever ArviZ is installed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.diagnostics.arviz_data import is_arviz_1, join_groups


def leave_one_out(log_likelihood: Tensor) -> LeaveOneOut:
    r"""Estimate how well each datum is predicted by the others, by ``arviz.loo``.

    .. math:: \text{elpd}_i = \ln p(y_i \mid y_{-i})

    ``log_likelihood`` is in nats, at independent draws: ``(S, n)``, of 25 draws or more.
    Source: Vehtari et al. (2024), "Pareto smoothed importance sampling", arXiv:1507.02646.
    """
    import xarray as xr

    if len(log_likelihood) < _FEWEST:
        msg = (
            f"got {len(log_likelihood)} draws for elpd_loo. Expected {_FEWEST} or more, so that "
            "there is a tail to smooth; or leave it out, as in compare(..., loo=False)"
        )
        raise ValueError(msg)
    values = log_likelihood.detach().cpu().double().numpy()[None]
    data = join_groups({"log_likelihood": xr.Dataset({"y": (("chain", "draw", "datum"), values)})})
    with warnings.catch_warnings():
        # Of high k, which are counted.
        warnings.simplefilter("ignore")
        found: Any = import_module("arviz").loo(data, pointwise=True, reff=1.0)
    terms = found.elpd_i if is_arviz_1() else found.loo_i
    k = torch.from_numpy(found.pareto_k.values.copy())
    limit = min(_LIMIT, 1 - 1 / math.log10(max(len(log_likelihood), 11)))
    bad, high = (int((k > threshold).sum()) for threshold in (limit, _LIMIT))
    return LeaveOneOut(torch.from_numpy(terms.values.copy()).reshape(-1), bad, high)


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Leave-one-out predictive densities: ``terms``, one per datum in nats, add up to elpd_loo.

    ``bad`` of them are not to be trusted, as their Pareto k is above min(0.7, 1 - 1 / log10 S);
    ``high`` of these have one above 0.7, and the others may be right with more draws.
    """

    terms: Tensor
    bad: int
    high: int

    @property
    def note(self) -> str | None:
        """What to know before use, if there is something."""
        total = f"{len(self.terms):,} data"
        few = self.bad - self.high
        many = f"do not trust elpd_loo, Pareto k is above 0.7 for {self.high:,} of {total}"
        if not few:
            return many if self.high else None
        more = f"num_samples={_ENOUGH} or more would do, as Pareto k is below 0.7"
        if not self.high:
            return f"too few draws for elpd_loo at {few:,} of {total}; {more}"
        return f"{many}; for {few:,} there are only too few draws, num_samples={_ENOUGH} may do"


# Of Pareto k, and the draws from which on it is the limit: 1 - 1 / log10 S = 0.7.
_LIMIT, _ENOUGH = 0.7, 2200
# A fifth of them are the tail, which is five or more.
_FEWEST = 25
