"""What a reduction can do to be looked at: draws for ArviZ, with what is known of each element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.diagnostics.arviz_data import convert
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.programs.handlers import PrunedModel


class Viewable(ABC):
    """A pruned model with its guide, and the scores and masks that led to them."""

    model: PrunedModel
    guide: PrunedGuide
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]

    def to_arviz(
        self,
        *args: Any,
        num_samples: int = 1000,
        seed: int = 0,
        prior: bool = True,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str | None]] | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""Draw from the reduced guide, for ArviZ; see `pyro_bmr.to_arviz`.

        Shapes and dimensions are those of the full model. A group ``bmr`` is added, with these
        variables for each site that could be reduced, whose dimensions are those of the site:

        - ``{site}_delta_f``: ΔF in nats of dropping each element by itself, or of its shrinkage;
        - ``{site}_inclusion_probability``: :math:`1 / (1 + e^{-\Delta F})`, that the element is
          there, if before the data that was as probable as not and all others are; 0 where it was
          pruned before, 1 where it cannot go. `pyro_bmr.presence` does better where elements are
          correlated;
        - ``{site}_mask``: True for what is not pruned;
        - ``{site}_keeps_prior``: for a site that was shrunk, True for elements whose prior is the
          old one.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the model: all of the data; those that it was made with otherwise.
        num_samples, seed, prior, coords, dims
            As of `pyro_bmr.to_arviz`.

        Returns
        -------
        InferenceData or DataTree
            ``arviz.InferenceData`` with ArviZ before 1.0, ``xarray.DataTree`` since.

        Raises
        ------
        TypeError
            If the model cannot be called with these arguments, or needs some and there are none.

        Notes
        -----
        The ridge plot of ArviZ 0.23 fails for point masses: leave out pruned elements by
        ``coords=``.
        """
        args, kwargs = self._example(args, kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "prior": prior}
        known = {name: self._elements(name) for name in self.scores}
        totals = {"delta_f": self.delta_f, "sparsity": self.sparsity}
        options |= {"coords": coords, "dims": dims, "elements": known, "attributes": totals}
        return convert(self.model, self.guide, args, kwargs, **options)

    @property
    @abstractmethod
    def delta_f(self) -> float:
        """Joint ΔF in nats of all that was dropped."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction of all elements that are pruned."""

    @abstractmethod
    def _example(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the model."""

    def _elements(self, name: str) -> dict[str, Tensor]:
        delta_f = self.scores[name]
        whole = torch.ones_like(delta_f, dtype=torch.bool)
        mask, kept = (
            by_site.get(name, whole) for by_site in (self.model.masks.by_site(), self.masks)
        )
        # What was pruned before has the score 0.
        present = torch.where(~mask & (delta_f == 0), 0.0, torch.sigmoid(delta_f))
        known = {"delta_f": delta_f, "inclusion_probability": present, "mask": mask}
        return known if torch.equal(mask, kept) else known | {"keeps_prior": kept}
