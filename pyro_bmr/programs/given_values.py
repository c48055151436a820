"""Latent sites at given values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to


class ValueMessenger(Messenger):
    """Effect handler that gives latent sites values on their support.

    ``fit`` makes a value of another shape than its site fit, from the value and the message, or
    refuses it; as a default such values are taken as they are.
    """

    def __init__(
        self, values: Mapping[str, Tensor], fit: Callable[[Tensor, Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.values, self.fit = values, fit

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value = self.values[msg["name"]]
        if self.fit is not None and value.shape != msg["fn"].shape():
            value = self.fit(value, msg)
        msg["value"], msg["done"] = value, True


class PriorMessenger(Messenger):
    """Effect handler that draws latent sites, also where a prior, if flat, has no draws."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        self.device = next((tensor.device for tensor in tensors), None)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None:
            return
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            msg["value"] = _draw_supported(msg["fn"], self.device)
        msg["done"] = True


def _draw_supported(prior: Any, device: torch.device | None) -> Tensor:
    """Draw on the support, as `pyro.infer.autoguide.init_to_uniform` starts guides."""
    transform = biject_to(prior.support)
    shape = transform.inverse_shape(prior.shape())
    return transform(torch.empty(shape, device=device).uniform_(-2, 2))


class RowMessenger(Messenger):
    """Effect handler that chooses the rows of sub-sampling plates that nothing else chooses."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.rows and msg["value"] is None:
            msg["value"] = self.rows[msg["name"]].to(msg["fn"].device)


class LocalSiteError(ValueError):
    """The posterior of a site belongs to the data that the guide was trained on."""


def take_rows(value: Tensor, msg: Any) -> Tensor:
    """Take of a value at the full size of its plates what a sub-sampling plate takes."""
    return pyro.subsample(value, event_dim=msg["fn"].event_dim)


def refuse(expected: str) -> Callable[[Tensor, Any], Tensor]:
    """Refuse a value of another shape than its site by a `LocalSiteError`."""

    def fit(value: Tensor, msg: Any) -> Tensor:
        what = (
            f"the site {msg['name']!r} has the shape {tuple(msg['fn'].shape())} in the model and "
            f"{tuple(value.shape)} in the guide. Expected {expected}: the posterior of what "
            "belongs to single data says nothing of others"
        )
        raise LocalSiteError(what)

    return fit
