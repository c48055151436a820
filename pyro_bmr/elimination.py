"""The order in which the elements of a correlated posterior should go."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.gaussian import LOG_2PI, Dense


def eliminate(posterior: Dense, log_prior: Tensor, stop: float) -> Tensor:
    r"""Remove one element at a time, the cheapest first, given all that went before.

    Of two redundant weights each may be worth dropping while both together are a disaster, so
    after each removal the rest is conditioned on it,
    :math:`\Sigma \leftarrow \Sigma - \Sigma_{\cdot i} \Sigma_{i \cdot} / \Sigma_{ii}`, and scored
    again. An element that becomes cheap only after a dear one went costs what the dear one cost:
    the result is the running maximum of :math:`\Delta F` along the path, so that comparing it with
    a threshold stops the search there.

    Parameters
    ----------
    posterior : Dense
        Posterior of ``n`` elements.
    log_prior : Tensor
        :math:`\ln p(\theta_i = 0)` in nats, of shape ``(n,)``; ``inf`` for an element that stays.
    stop : float
        The search ends before the first removal that would cost more, in nats.

    Returns
    -------
    Tensor
        In nats, of shape ``(n,)``; ``inf`` for elements that the search did not remove.

    Examples
    --------
    >>> twins = torch.tensor([[1.0, 0.0], [-0.99, 0.1411]])
    >>> eliminate(Dense(torch.tensor([1.0, 1.0]), twins), torch.tensor([-1.0, -1.0]), 0.6)
    tensor([0.4189,    inf])
    """
    loc, covariance = posterior.loc.clone(), posterior.covariance
    shift = log_prior + 0.5 * LOG_2PI
    candidate = shift.isfinite()
    path = torch.full_like(loc, torch.inf)
    dearest = torch.tensor(-torch.inf, dtype=loc.dtype, device=loc.device)
    for _ in range(int(candidate.sum())):
        variance = covariance.diagonal().clamp_min(torch.finfo(loc.dtype).tiny)
        scores = shift + 0.5 * (variance.log() + loc.square() / variance)
        best = torch.where(candidate, scores, torch.inf).argmin()
        dearest = torch.maximum(dearest, scores[best])
        if dearest > stop:
            break
        path[best] = dearest
        candidate[best] = False
        direction = covariance[:, best] / variance[best].sqrt()
        loc -= direction * (loc[best] / variance[best].sqrt())
        covariance -= torch.outer(direction, direction)
    return path
