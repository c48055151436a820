r"""The audit: what a reduction predicted, and what came true.

:math:`\Delta F` is exact for an exact posterior. A guide is an approximation, so that the free
energy of the reduced model with the reduced guide may change by something else, which can be
measured: both are estimated with the same random numbers, and subtracted draw by draw.

A reduction is a success where F fell, whatever the verdict on its prediction: a realised ΔF of
-127 nats where -159 were predicted is "optimistic by 32 nats", and still a much better model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.diagnostics.audit_steps import take_steps
from pyro_bmr.diagnostics.refits import Refit, trained_copy
from pyro_bmr.display import Tabular, progress_bar
from pyro_bmr.estimators.measurement import common_draws, mean_and_error
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import check_call
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.flags import NOISE
from pyro_bmr.selection.realised import ROWS, make_meter
from pyro_bmr.selection.scores import score
from pyro_bmr.selection.training_state import describe_training

if TYPE_CHECKING:
    import pandas as pd

_ERRORS = 3.0


@alone("audit")
@torch.inference_mode(False)
def run_audit(
    decision: Decision | None,
    pair: tuple[Any, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_samples: int = 100,
    refit: Refit | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    r"""Measure what a reduction did to the free energy, in all and site by site.

    .. math:: \Delta F_\text{realised} = F[q_\text{reduced}, p_\text{reduced}] - F[q, p]

    Both are estimated by the same random numbers, with the divergence from the prior in closed form
    where there is one. Site by site: one after the other is reduced, in an order in which the
    predicted parts add up as well, and each has the difference to the one before. Correlated sites
    are taken as they were conditioned on, and what produces a unit after what reads it.

    ``pair`` is the reduced model and guide; if it has been trained since, it is measured as well as
    what the reduction had made of it. ``refit`` gets copies.
    """  # noqa: DOC201, DOC501
    if decision is None:
        msg = (
            "a result that was loaded does not know the posterior before the reduction. Expected "
            "one that reduce returned: reduce the trained guide again"
        )
        raise ValueError(msg)
    decision.check_unchanged()
    predicted = decision.predicted
    check_call(pair[0], args, kwargs)
    steps = take_steps(decision, *pair)
    locations = [x for factor in decision.factors for x in factor.locations().values()]
    rounding = max((torch.finfo(x.dtype).eps for x in locations), default=0.0)
    total = num_samples * (len(steps.sites) + steps.trained + (refit is not None))
    with progress_bar("draws", progress) as bar:
        task = bar.add_task("measuring", total=total, note="")
        options: dict[str, Any] = {"seed": seed, "advance": partial(bar.advance, task)}

        def measure(model: Any, guide: Any, sites: tuple[str, ...]) -> Tensor:
            couplings = steps.couplings(sites)
            complexity, accuracy = common_draws(
                model, guide, args, kwargs, num_samples, couplings=couplings, **options
            )
            return complexity - accuracy

        def check(name: str, part: float, before: Tensor, after: Tensor) -> Check:
            mean, error = mean_and_error(after - before)
            return Check(name, part, mean, error, _bound(error, after, rounding))

        with decision.as_it_was():
            draws = [measure(*steps.pair(sites), sites) for sites in steps.sites]
            remarks = _describe_training(decision, args, kwargs, seed)
        rows = tuple(
            check(sites[-1], predicted.get(sites[-1], 0.0), before, after)
            for sites, before, after in zip(steps.sites[1:], draws, draws[1:], strict=False)
        )
        whole = partial(check, part=sum(predicted.values()), before=draws[0])
        later = []
        if steps.trained:
            now = measure(*pair, steps.sites[-1])
            later.append(whole("after training", after=now))
        if refit is not None:
            with trained_copy(refit, *pair, seed) as refitted:
                now = measure(*refitted, steps.sites[-1])
            later.append(whole("after refit", after=now))
    return Audit(rows, whole("total", after=draws[-1]), tuple(later), steps.notes(), remarks)


@dataclass(frozen=True)
class Check:
    """A predicted ΔF beside the one that came true.

    Parameters
    ----------
    name : str
        A site, ``"total"``, or what happened since.
    predicted : float
        ΔF in nats, as the reduction had it.
    realised, error : float
        Measured, with its standard error.
    bound : float
        In nats: what the error may be to blame for. Three standard errors (with few draws more, by
        Student's t), 0.05 nats, which decide nothing, and the rounding of F.

    Examples
    --------
    >>> Check("w", -2.0, -1.2, 0.1, 0.3).verdict
    'optimistic by 0.80 nats'
    >>> Check("w", -2.0, 1.2, 0.1, 0.3).verdict
    'wrong sign'
    """

    name: str
    predicted: float
    realised: float
    error: float
    bound: float

    @property
    def excess(self) -> float:
        """By how much the realised ΔF is higher, in nats."""
        return self.realised - self.predicted

    @property
    def verdict(self) -> str:
        """What to say of the prediction.

        ``"within error"``; ``"optimistic by x nats"`` where F did not fall as far as predicted, or
        rose more; ``"pessimistic by x nats"``; ``"wrong sign"`` where it was to fall and rose, or
        the other way round.
        """
        if abs(self.excess) <= self.bound:
            return "within error"
        if self.predicted * self.realised < 0 and abs(self.realised) > self.bound:
            return "wrong sign"
        direction = "optimistic" if self.excess > 0 else "pessimistic"
        return f"{direction} by {abs(self.excess):.2f} nats"


@dataclass(frozen=True, repr=False)
class Audit(Tabular):
    """What a reduction predicted, and what came true.

    Parameters
    ----------
    sites : tuple of Check
        One row per site that was reduced, in the order in which they were; right after masking.
    total : Check
        Of all together, right after masking.
    later : tuple of Check
        The same after training, if the guide was trained since, and after the refit, if there was
        one: F should be lower still. The prediction was not about these, and has no verdict.
    notes : tuple of str
        What is not as the reduction had it.
    remarks : tuple of str
        Whether the guide that was reduced had been trained to its end; a common cause of failure.

    Examples
    --------
    >>> check = Check("w", -2.0, -1.95, 0.1, 0.3)
    >>> print(Audit((check,), check).total.verdict)
    within error
    """

    sites: tuple[Check, ...]
    total: Check
    later: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """That of the total; see `Check.verdict`."""
        return self.total.verdict

    @property
    def conclusion(self) -> str:
        """What became of F, right after masking: whether the reduction was a success."""
        if abs(self.total.realised) <= self.total.bound:
            return "F changed by no more than its error."
        fell = self.total.realised < 0
        return (
            f"F {'fell' if fell else 'rose'}: the {'reduced' if fell else 'full'} model is better."
        )

    @property
    def passed(self) -> bool:
        """Whether all that was predicted, in total and of each site, is within error.

        Approximate posteriors, as of networks, seldom pass; see `conclusion` for whether F fell.
        """
        return not self.notes and all(
            check.verdict == "within error" for check in (*self.sites, self.total)
        )

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site, one for all, and one for what happened later.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``predicted``, ``realised``, ``error``, ``excess`` and
            ``bound`` (nats), and ``verdict``, which is empty of what happened later.
        """
        import pandas as pd

        names = ["predicted", "realised", "error", "excess", "bound", "verdict"]
        rows = [{"site": c.name} | {name: getattr(c, name) for name in names} for c in self._all]
        table = pd.DataFrame(rows).set_index("site")
        table.loc[[check.name for check in self.later], "verdict"] = ""
        return table

    def __rich__(self) -> Table:
        table = Table("site", title=self._title, title_justify="left")
        table.caption, table.caption_justify = "\n".join(self._notes) or None, "left"
        for column in ("ΔF predicted", "ΔF realised"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for check in self._all:
            if check is self.total:
                table.add_section()
            judged = check not in self.later
            table.add_row(
                check.name,
                f"{check.predicted:+.2f}" if judged else "",
                f"{check.realised:+.2f} ± {check.error:.2f}",
                check.verdict if judged else "",
            )
        return table

    @property
    def _notes(self) -> tuple[str, ...]:
        return (*self.notes, *self.remarks)

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary().drop(columns=["excess", "bound"]).round(2)}

    @property
    def _all(self) -> tuple[Check, ...]:
        return (*self.sites, self.total, *self.later)

    @property
    def _title(self) -> str:
        total = self.total
        return (
            f"ΔF predicted {total.predicted:+.2f}, realised {total.realised:+.2f} ± "
            f"{total.error:.2f} nats\n{self.conclusion}"
        )


def _bound(error: float, draws: Tensor, rounding: float) -> float:
    # As far out for the few draws that there are as three errors are for many.
    from scipy.special import ndtr, stdtrit

    errors = stdtrit(len(draws) - 1, ndtr(_ERRORS))
    return float(errors * error + NOISE + 4 * rounding * draws.abs().max())


def _describe_training(
    decision: Decision, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int
) -> tuple[str, ...]:
    origin = replace(decision.origin, args=args, kwargs=kwargs)
    told = replace(decision, origin=origin).restrict(())
    try:
        meter = make_meter(told, ROWS, seed)
    except ValueError:  # a model that observes nothing has nothing to be trained on
        return ()
    return describe_training(score(told.factors), told, meter)
