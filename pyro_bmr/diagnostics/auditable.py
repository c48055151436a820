"""What a reduction can do to be checked against the data."""

from __future__ import annotations

from abc import ABC
from typing import Any

from pyro_bmr.diagnostics.audit import Audit, run_audit
from pyro_bmr.diagnostics.refits import Refit
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.summaries import SiteSummary


class Auditable(ABC):
    """A pruned model with its guide, what they were decided on, and what was predicted."""

    model: PrunedModel
    guide: PrunedGuide
    sites: tuple[SiteSummary, ...]
    decision: Decision | None

    def audit(
        self,
        *args: Any,
        num_samples: int = 100,
        refit: Refit | None = None,
        seed: int = 0,
        progress: bool = True,
        **kwargs: Any,
    ) -> Audit:
        """Measure whether what was predicted comes true; see `pyro_bmr.diagnostics.audit`.

        Parameters
        ----------
        *args, **kwargs
            Of the model: all of the data.
        num_samples : int
            Draws of each measurement.
        refit : callable, optional
            Trains the model and the guide that it is given, which are copies, as in
            ``lambda model, guide: pyro_bmr.fit(model, guide, x, y, num_epochs=50)``.
        seed : int
            Of all random numbers.
        progress : bool
            Show a progress bar, if there is a terminal or a notebook.

        Returns
        -------
        Audit
            Predicted and realised ΔF, with a verdict in words on the prediction, in total and per
            site. The reduction was a success if F fell, which is its ``conclusion``: a realised ΔF
            of -127 nats of -159 predicted is "optimistic by 32 nats", and a success.

        Raises
        ------
        ValueError
            If the result came from a file, if the guide that was reduced has been trained since, or
            if a free energy is not finite.
        TypeError
            If the model cannot be called with these arguments.
        """
        predicted = {site.name: site.delta_f for site in self.sites}
        options: dict[str, Any] = {"num_samples": num_samples, "refit": refit, "seed": seed}
        pair = self.model, self.guide
        return run_audit(self.decision, pair, predicted, args, kwargs, progress=progress, **options)
