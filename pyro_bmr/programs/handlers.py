"""A model under masks: the same program, with the pruned elements at exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bmr.arguments.checks import check_function, read_mapping, read_names, refuse_kind
from pyro_bmr.programs.centers import Center, take_center
from pyro_bmr.programs.distributions import find_core, is_pruned, prune_distribution
from pyro_bmr.programs.wrappers import ModelWrapper


class _PruneMessenger(Messenger):
    """Effect handler that puts the pruned elements of latent sites at zero, or at their centers.

    Masks and centers have the shape of their site at the full size of its plates; True keeps.

    The distribution of a site is changed before it is sampled, so that draws, replayed values and
    log densities agree wherever a trace is taken; a value that comes from elsewhere (a guide that
    knows nothing of the masks) is zeroed before the model uses it.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        centers: Mapping[str, Center],
        marginal: Collection[str],
    ) -> None:
        super().__init__()
        self.masks, self.centers, self.marginal = masks, centers, marginal

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.masks and not msg["is_observed"]:
            center = self.centers.get(msg["name"])
            rows = None if center is None else take_center(center, msg)
            marginal = msg["name"] in self.marginal
            msg["fn"] = prune_distribution(msg["fn"], self._mask(msg), rows, marginal=marginal)

    def _pyro_post_sample(self, msg: Any) -> None:
        # Handlers outside may by now have called the site observed (poutine.condition, Predictive).
        if msg["name"] in self.masks and is_pruned(msg["fn"]):
            msg["value"] = find_core(msg["fn"]).put_at_origin(msg["value"])

    def _mask(self, msg: Any) -> Tensor:
        return pyro.subsample(self.masks[msg["name"]], event_dim=msg["fn"].event_dim)


class SiteBuffers(nn.Module):
    """Tensors by site name, which move and are saved with the module that holds them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(module_key(name), tensor)

    def by_site(self) -> dict[str, Tensor]:
        """Return the tensors by site, on the device where they are now."""
        return {name: self.get_buffer(module_key(name)) for name in self.names}


class PrunedModel(ModelWrapper):
    """A Pyro model whose pruned elements are exactly zero.

    Called like the model that it wraps. The model itself is shared, not copied; attributes that
    are not of this module are read from it.

    Parameters
    ----------
    model : callable
        Any Pyro model.
    masks : mapping
        By site, a boolean tensor of the site's shape; True keeps.
    centers : mapping, optional
        By site whose pruned elements are elsewhere than at zero, where they are.
    marginal : collection of str, optional
        Sites with a correlated prior of which what is kept has its marginal prior; elsewhere it
        has the prior given that the rest is zero.

    Raises
    ------
    ValueError
        On the first call, if a mask does not have the shape of its site.

    Examples
    --------
    >>> import torch, pyro.distributions as dist
    >>> model = lambda: pyro.sample("w", dist.Normal(torch.ones(2), 1.0).to_event(1))
    >>> bool(PrunedModel(model, {"w": torch.tensor([True, False])})()[1] == 0)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        masks: Mapping[str, Tensor],
        centers: Mapping[str, Center] | None = None,
        marginal: Collection[str] = (),
    ) -> None:
        check_function("model", model, "a Pyro model")
        expected = "masks by site, torch.bool tensors, True for what is kept"
        by_site = read_mapping("masks", masks, expected)
        for mask in by_site.values():
            if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
                refuse_kind("masks", masks, expected)
        super().__init__(model)
        self.masks = SiteBuffers(by_site)
        self.centers = read_mapping("centers", centers, "centers by site")
        self.marginal = tuple(read_names("marginal", marginal) or ())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Parameters
        ----------
        *args, **kwargs
            Those of the model.

        Returns
        -------
        object
            What the model returns.
        """
        with _PruneMessenger(self.masks.by_site(), self.centers, self.marginal):
            return self.model(*args, **kwargs)


def module_key(site: str) -> str:
    """Return a site's key, as ``/fc1/weight``, that `torch.nn.Module` accepts and does not use."""
    escaped = site.replace("~", "~0").replace("/", "~1").replace("+", "~2")
    return "/" + escaped.replace(".", "/")
