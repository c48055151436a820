"""`reduce` and the `Reduction` that it returns: the face of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import pandas as pd
import torch
from rich.console import Group, RenderableType
from torch import Tensor

from pyro_bmr.compaction import Compaction, compact
from pyro_bmr.diagnostics.auditable import Auditable
from pyro_bmr.diagnostics.viewable import Viewable
from pyro_bmr.display import render
from pyro_bmr.export.costs import Costs, measure_costs
from pyro_bmr.export.portable import Portable
from pyro_bmr.factors.switched import with_reduced_priors
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.mathematics.reduced_priors import ReducedPrior, Spike
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.selection.decision import Decision, decide
from pyro_bmr.selection.flags import count_undecided, naive_delta_f
from pyro_bmr.selection.groups import Grouping, elements, list_groupings
from pyro_bmr.selection.problem import assign, read_problem, read_structure
from pyro_bmr.selection.scores import score
from pyro_bmr.selection.selections import Selection, by_evidence
from pyro_bmr.selection.stages import run_stages
from pyro_bmr.selection.summaries import (
    LayerSummary,
    SiteSummary,
    sum_released,
    summarize,
    summarize_layers,
)
from pyro_bmr.selection.tables import draw_layers, draw_sites, frame_layers


@torch.inference_mode(False)
@torch.no_grad()
def reduce(
    guide: Any,
    *,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    sites: Iterable[str] | None = None,
    groups: Grouping | Sequence[Grouping] = elements,
    select: Selection = by_evidence(),
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior] = Spike(),
) -> Reduction:
    r"""Reduce a trained guide: score every nested sparse prior, and prune what is not worth it.

    .. math:: \Delta F = \ln p(\theta_S = 0) - \ln q(\theta_S = 0)

    is, without any refitting, the change of the free energy when the prior of a set :math:`S` of
    weights becomes a point mass at zero. Negative is better. For any other reduced prior
    :math:`r` it is :math:`-\ln \int q(\theta_S) \, r(\theta_S) / p(\theta_S) \, d\theta_S`.
    Of a unit, what reads it takes spikes; independent weights that produce it have no influence
    then, and add their divergence from a Gaussian prior, :math:`-KL(q \,\|\, p)`.

    The guide, the param store and the random number generators are left as they were. The model is
    run once, at the posterior's location, to read its priors.

    Parameters
    ----------
    guide : callable, MCMC or mapping
        A guide trained by SVI that is Gaussian in unconstrained coordinates: one of Pyro's
        autoguides or messengers, an ``AutoGuideList`` of these, a guide that you wrote, or the
        guide of a reduction. Or a finished ``pyro.infer.MCMC``, or posterior samples by site, of
        which the moments are matched.
    model : callable, optional
        The model that the guide was trained for, if the guide does not know it.
    args, kwargs : optional
        Arguments to run the model with (and a guide that has to be run to be read); those of the
        guide's first call otherwise. Messengers, ``AutoStructured``, ``AutoGaussian``, guides
        that you wrote and samples by site do not remember theirs.
    sites : iterable of str, optional
        Sample sites to reduce; all that can be otherwise.
    groups : callable or list of callable
        What lives or dies together: `elements`; `units` (all that produces or reads a unit of the
        model), `channels`, `heads` or `inputs`, which have options, as in ``units(round_to=8)``; or
        a function from the name and the shape of a site to integer labels that broadcast to the
        shape, or None for one group per element. Elements of the same label, over all sites, are a
        group; those of a negative label stay. Of a list, coarse to fine, each grouping selects
        among what those before have left.
    select : callable
        What to drop: `by_evidence`, `top_k`, `snr`, `spr`, `magnitude`, `random`, or any function
        from `Scores` to a mask per site, True for what is kept; of groups, a mask per layer.
    reduced_prior : Spike, Gaussian, Laplace or mapping
        The prior of what is dropped, or by site. With `Gaussian` and `Laplace` nothing becomes
        zero: the elements that ``select`` does not keep take this prior, and the posterior
        :math:`q \, r / p`; ``masks`` is True where an element keeps its prior. That needs a
        Gaussian prior, and for `Laplace` a posterior of independent elements.

    Returns
    -------
    Reduction
        The pruned model and guide, with the scores and the masks.

    Raises
    ------
    TypeError
        If the guide's family, ``select``, ``groups`` or ``reduced_prior`` is not known.
    ValueError
        If the guide was never called or is not finite, if a named site cannot be reduced or
        cannot take its reduced prior, or if ``select`` returns a mask that does not fit.

    References
    ----------
    Beckers et al. (2022), "Principled Pruning of Bayesian Neural Networks through Variational
    Free Energy Minimization", arXiv:2210.09134; Friston, Parr & Zeidman (2018), arXiv:1805.07092.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 3.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> result = reduce(guide)
    >>> result.masks["w"], round(result.delta_f, 3)
    (tensor([False,  True]), -0.693)
    >>> from pyro_bmr import Gaussian
    >>> print(reduce(guide, reduced_prior=Gaussian(0.0, 0.5)))
    0.0% pruned, 1 of 2 shrunk, ΔF = -0.41 nats
    ...
    """
    _check_options(select, reduced_prior)
    groupings = list_groupings(groups)
    problem = read_problem(guide, model, args, kwargs, sites)
    problem, reduced_priors = assign(problem, reduced_prior, sites)
    problem.warn_if_empty()
    factors = tuple(factor.with_priors(problem.priors) for factor in problem.factors)
    scores = score(with_reduced_priors(factors, reduced_priors))
    _check_stages(groupings, reduced_priors)
    spiked = {name for name, one in reduced_priors.items() if isinstance(one, Spike)}
    find_structure = cache(partial(read_structure, problem, spiked))
    chosen, stages = run_stages(scores, groupings, select, find_structure)
    structure = find_structure() if find_structure.cache_info().currsize else None
    decision = decide(problem.origin, scores.factors, chosen, spiked, structure)
    remaining = decision.remaining()
    model, guide, masks = decision.assemble(remaining)
    rows = summarize(scores, chosen, remaining, problem.reasons, sum_released(stages))
    layers, by_site = summarize_layers(stages), {row.name: row.delta_f for row in rows}
    return Reduction(
        model=model,
        guide=guide,
        masks=masks,
        scores=scores.delta_f,
        sites=rows,
        naive_delta_f=None if layers else naive_delta_f(scores, chosen, by_site),
        layers=layers,
        decision=decision,
    )


@dataclass(frozen=True, eq=False)
class Reduction(Auditable, Portable, Viewable):
    """A pruned model and guide, and what was found on the way.

    Parameters
    ----------
    model : PrunedModel
        The model under masks: same sites and shapes, pruned elements exactly 0, shrunk ones with
        their reduced prior.
    guide : PrunedGuide
        The posterior given that the pruned elements are 0, ready for `pyro.infer.Predictive` and
        for further training.
    masks : mapping
        By site, a boolean tensor, True where kept; where a site was shrunk, True for elements
        that keep their prior. Sites left whole are absent.
    scores : mapping
        By site, ΔF in nats of dropping each element by itself, or of its shrinkage.
    sites : tuple of SiteSummary
        One row per site, those left whole with their reason.
    naive_delta_f : float, optional
        What ``delta_f`` would be, in nats, had every correlated element gone whose own ΔF is at
        most 0, and no other; None if nothing is correlated, or groups were dropped.
    layers : tuple of LayerSummary
        One row per layer of groups; empty where elements stand for themselves.
    decision : Decision, optional
        The posterior before, without a copy of it; None after `load`.

    Examples
    --------
    >>> Reduction(None, None, {}, {}, (SiteSummary("w", (4,), 1, -2.5),)).sparsity
    0.75
    """

    model: PrunedModel
    guide: PrunedGuide
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    sites: tuple[SiteSummary, ...]
    naive_delta_f: float | None = None
    layers: tuple[LayerSummary, ...] = ()
    decision: Decision | None = field(default=None, repr=False)

    @property
    def delta_f(self) -> float:
        """Joint ΔF in nats of all that was dropped; negative means lower free energy."""
        return sum(site.delta_f for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of all elements of the guide that are pruned, here and before."""
        total = sum(site.total for site in self.sites)
        return 1.0 - sum(site.kept for site in self.sites) / total if total else 0.0

    @cached_property
    def undecided(self) -> dict[str, int]:
        r"""By reducible site, how many elements have :math:`|\Delta F| < 0.05` nats.

        As a rule because the data say nothing about them, so that the sign is noise; see
        ``pyro_bmr.selection.flags``.
        """
        return {
            site.name: count_undecided(self.scores[site.name], site.pruned_before)
            for site in self.sites
            if site.name in self.scores
        }

    @property
    def shrunk(self) -> int:
        """How many elements took a reduced prior other than the spike."""
        return sum(site.shrunk for site in self.sites)

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``shape``, ``total``, ``kept``, ``pruned %``, ``shrunk`` if
            any element was, ``delta_f`` (nats), ``undecided``, ``wide``, ``unscored`` (how many
            elements to doubt, see ``undecided`` and ``sites``) and ``note``.
        """
        rows = [
            {
                "site": site.name,
                "shape": site.shape,
                "total": site.total,
                "kept": site.kept,
                "pruned %": 100 * (1 - site.kept / site.total) if site.total else 0.0,
                **({"shrunk": site.shrunk} if self.shrunk else {}),
                "delta_f": site.delta_f,
                "undecided": self.undecided.get(site.name, 0),
                "wide": site.wide,
                "unscored": site.unscored,
                "note": self._note(site),
            }
            for site in self.sites
        ]
        return pd.DataFrame(rows).set_index("site")

    def layer_summary(self) -> pd.DataFrame:
        """Return a table with one row per layer of groups.

        Returns
        -------
        DataFrame
            Indexed by layer; columns ``kind``, ``groups``, ``kept``, ``pruned %`` and ``delta_f``
            (nats). Empty where elements stand for themselves.
        """
        return frame_layers(self.layers)

    def compact(self, *args: Any, inputs: bool = False, **kwargs: Any) -> Compaction:
        """Cut out the units that nothing needs; and nothing changes: the same program, smaller.

        A unit goes when its term is exactly zero wherever it is summed over: when all that produces
        it is pruned, bias included, or all that reads it, or when nothing depends on what reads it.
        Live elements that go with an unread unit are marginalised, and their divergence leaves the
        free energy. Outputs stay, and at least one unit of every layer. The result is checked: at
        the posterior's median and at draws it must compute what the masked model does.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the model, as an example; those of the guide's first call otherwise.
        inputs : bool
            Whether inputs that nothing reads go. The compacted model then takes ``x[..., kept]``;
            see ``Compaction.inputs``.

        Returns
        -------
        Compaction
            The smaller model and guide, which compute the same.

        Raises
        ------
        ValueError
            If a prior cannot be cut.
        RuntimeError
            If the model cannot be captured, or the compacted one does not compute the same.

        Examples
        --------
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        ...     v = pyro.sample("v", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
        ...     pyro.sample("y", dist.Normal(torch.tanh(x @ w) @ v, 1.0).to_event(2), obs=y)
        >>> guide = AutoNormal(model)
        >>> _ = guide(torch.ones(4, 3), torch.ones(4, 1))
        >>> result = reduce(guide, select=lambda _: {"v": torch.tensor([[True], [False]])})
        >>> result.compact().guide.median()["w"].shape
        torch.Size([3, 1])
        """
        return compact(self.model, self.guide, args, kwargs, inputs=inputs)

    def to(self, device: torch.device | str) -> Reduction:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        Reduction
            With masks and scores there. Model and guide are moved in place, as in torch.
        """
        return replace(
            self,
            model=self.model.to(device),
            guide=self.guide.to(device),
            masks={name: mask.to(device) for name, mask in self.masks.items()},
            scores={name: scores.to(device) for name, scores in self.scores.items()},
        )

    def report(self, *args: Any, num_draws: int = 20, **kwargs: Any) -> Costs:
        """Compact, and measure what that saves; see `pyro_bmr.measure_costs`.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the model, of the batch to time; those of the guide's first call otherwise.
        num_draws : int
            Of an ensemble.

        Returns
        -------
        Costs
            Parameters, operations and times of the masked and of the compacted network.
        """
        args, kwargs = self._example(args, kwargs)
        small = self.compact(*args, **kwargs)
        pairs = {"masked": (self.model, self.guide), "compacted": (small.model, small.guide)}
        return measure_costs(pairs, args, kwargs=kwargs, num_draws=num_draws)

    def _plan(self) -> dict[str, Any]:
        return {
            "kind": "reduction",
            "masks": self.masks,
            "scores": self.scores,
            "rows": [asdict(site) for site in self.sites],
            "naive_delta_f": self.naive_delta_f,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __rich__(self) -> RenderableType:
        naive = self.naive_delta_f
        caption = ""
        if naive is not None and abs(naive - self.delta_f) >= 0.005:
            caption = (
                "dropping every element whose own ΔF is at most 0 would have given "
                f"ΔF = {naive:+.2f} nats"
            )
        notes = {site.name: self._note(site) for site in self.sites}
        table = draw_sites(self.sites, notes, self._title, caption)
        return Group(table, draw_layers(self.layers)) if self.layers else table

    def __repr__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        tables = [self.summary(), *([self.layer_summary()] if self.layers else [])]
        html = (table.round({"pruned %": 1, "delta_f": 2}).to_html() for table in tables)
        return f"<p>{self._title}</p>{''.join(html)}"

    @property
    def _title(self) -> str:
        total = sum(site.total for site in self.sites)
        shrunk = f", {self.shrunk:,} of {total:,} shrunk" if self.shrunk else ""
        return f"{self.sparsity:.1%} pruned{shrunk}, ΔF = {self.delta_f:+.2f} nats"

    def _note(self, site: SiteSummary) -> str:
        undecided = self.undecided.get(site.name, 0)
        notes = [site.note, f"{undecided:,} undecided" if undecided else ""]
        return "; ".join(note for note in notes if note)


def _check_options(select: Any, reduced_prior: Any) -> None:
    if not callable(select):
        msg = f"got select={select!r}. Expected a selection, such as pyro_bmr.by_evidence()"
        raise TypeError(msg)
    by_site = reduced_prior if isinstance(reduced_prior, Mapping) else {"": reduced_prior}
    if not all(isinstance(one, ReducedPrior) for one in by_site.values()):
        msg = (
            f"got reduced_prior={reduced_prior!r}. Expected pyro_bmr.Spike(), "
            "Gaussian(loc, scale) or Laplace(scale), or a mapping from sites to these; "
            "pyro_bmr.delta_f scores those of other families"
        )
        raise TypeError(msg)


def _check_stages(
    groupings: tuple[Grouping, ...], reduced_priors: Mapping[str, ReducedPrior]
) -> None:
    if len(groupings) > 1 and not all(isinstance(one, Spike) for one in reduced_priors.values()):
        msg = (
            f"got {len(groupings)} groupings and a reduced prior other than Spike(), after which "
            "nothing is left to shrink again. Expected one grouping: reduce twice, the second time "
            "result.guide"
        )
        raise ValueError(msg)
