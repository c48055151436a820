"""`reduce`: the face of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_function, refuse_kind
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.factors.joint import meet_priors
from pyro_bmr.factors.switched import with_reduced_priors
from pyro_bmr.mathematics.reduced_priors import ReducedPrior, Spike
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.ranks import ONE, Ranks, read_ranks
from pyro_bmr.programs.site_kinds import DataShapeError
from pyro_bmr.results import Reduction
from pyro_bmr.selection.by_free_energy import by_free_energy
from pyro_bmr.selection.decision import Decision, decide
from pyro_bmr.selection.flags import flag_scales, naive_delta_f
from pyro_bmr.selection.groups import Grouping, elements, list_groupings
from pyro_bmr.selection.model_units import UnitsOnDemand
from pyro_bmr.selection.problem import Problem, assign, read_problem
from pyro_bmr.selection.realised import ROWS, make_meter, measure_realised
from pyro_bmr.selection.scores import ElementScores, Scores, score
from pyro_bmr.selection.selections import Selection, by_evidence
from pyro_bmr.selection.stages import Stage, checked_masks, run_stages
from pyro_bmr.selection.summaries import note_held, sum_released, summarize, summarize_layers
from pyro_bmr.selection.training_state import describe_scales, describe_training
from pyro_bmr.selection.unread import find_unread

if TYPE_CHECKING:
    # Of which a build of torch may have none.
    from torch.distributed.device_mesh import DeviceMesh


@alone("reduce")
@torch.inference_mode(False)
@torch.no_grad()
def reduce(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    groups: Grouping | Sequence[Grouping] = elements,
    select: Selection | None = None,
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior] = Spike(),
    mesh: DeviceMesh | None = None,
) -> Reduction:
    r"""Reduce a trained guide: score every nested sparse prior, and prune what is not worth it.

    .. math:: \Delta F = \ln p(\theta_S = 0) - \ln q(\theta_S = 0)

    is, without any refitting, the change of the free energy when the prior of a set :math:`S` of
    weights becomes a point mass at zero. Negative is better. For any other reduced prior
    :math:`r` it is :math:`-\ln \int q(\theta_S) \, r(\theta_S) / p(\theta_S) \, d\theta_S`.
    Of a unit, what reads it takes spikes; independent weights that produce it have no influence
    then, and add their divergence from a Gaussian prior, :math:`-KL(q \,\|\, p)`.

    Given the model's arguments, of which it observes something, the free energy is measured, and
    does not rise: see `by_free_energy`. Without, all is predicted: the model is run once, at the
    posterior's location, to read its priors. The guide, the param store and the random number
    generators are left as they were.

    Parameters
    ----------
    guide : callable, MCMC or mapping
        A guide trained by SVI that is Gaussian in unconstrained coordinates: one of Pyro's
        autoguides or messengers, an ``AutoGuideList`` of these, a guide that you wrote, or the
        guide of a reduction; also inside ``functools.partial`` or ``poutine.block``. Or a finished
        ``pyro.infer.MCMC``, or posterior samples by site, of which the moments are matched. An
        autoguide that was never called is read with ``*args``, if the param store was loaded.
    *args
        Of the model: all of the data, to measure F on; to run the model (and a guide that has to
        be run to be read), those of the guide's first call otherwise. Messengers,
        ``AutoStructured``, ``AutoGaussian``, guides that you wrote and samples by site do not
        remember theirs.
    kwargs : mapping, optional
        Keyword arguments of the model.
    model : callable, optional
        The model that the guide was trained for, if the guide does not know it.
    sites : iterable of str, optional
        Sample sites to reduce; all that can be otherwise. By name; by field, as ``"A"`` of the
        sites ``A(1,2)`` and ``A(2,1)``; or by a pattern such as ``"A*"``; of the last two, those
        that can be reduced. With the data, elements of positive sites that are named here, or that
        ``groups`` labels, may be set to zero.
    groups : callable or list of callable
        What lives or dies together: `elements`; `units` (all that produces or reads a unit of the
        model), `channels`, `heads` or `inputs`, which have options, as in ``units(round_to=8)``; or
        a function from the name and the shape of a site to integer labels that broadcast to the
        shape, or None for one group per element. Elements of the same label, over all sites, are a
        group; those of a negative label stay. Of a list, coarse to fine, each grouping selects
        among what those before have left.
    select : callable, optional
        What to drop: `by_free_energy` (the default with data), `by_evidence` (the default without),
        `top_k`, one of ``pyro_bmr.baselines``, or any function from ``pyro_bmr.extend.Scores`` to a
        mask per site, True for what is kept; of groups, a mask per layer.
    reduced_prior : Spike, Gaussian, Laplace or mapping
        The prior of what is dropped, or by site. ``Spike(loc=...)`` is elsewhere than at zero, such
        as at the mean of the prior. With `Gaussian` and `Laplace` nothing becomes zero: the
        elements that ``select`` does not keep take this prior, and the posterior
        :math:`q \, r / p`; ``masks`` is True where an element keeps its prior. That needs a
        Gaussian prior, and for `Laplace` a posterior of independent elements.
    mesh : DeviceMesh, optional
        Of the processes that reduce the guide together, as in `fit`: each gives rows of its own,
        the free energy is that of all rows, and all come to the same result.

    Returns
    -------
    Reduction
        The pruned model and guide, with the scores and the masks, ΔF as predicted and, with data,
        as realised.

    Raises
    ------
    TypeError
        If the guide's family, ``select``, ``groups`` or ``reduced_prior`` is not known, or if the
        guide is the model, or one that many processes train.
    ValueError
        If the guide was never called, is not finite, or stands inside ``poutine.scale`` or
        ``poutine.mask``, if a named site cannot be reduced or cannot take its reduced prior, or if
        ``select`` returns a mask that does not fit.
    RuntimeError
        If ranks of a mesh have different posteriors, or priors that depend on their rows. What goes
        wrong in one of them is raised in all, with its number.

    Warns
    -----
    UserWarning
        If no site can be reduced; if this is one of many processes, and measures by itself.

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
    ranks = ONE if mesh is None and not (args or kwargs) else read_ranks(mesh, verb="reduce")
    given = guide, args, kwargs, model, sites, groups, select, reduced_prior
    return reduce_for("reduce", *given, ranks)


def reduce_for(
    verb: str,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    model: Callable[..., Any] | None,
    sites: Iterable[str] | None,
    groups: Grouping | Sequence[Grouping],
    select: Selection | None,
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior] = Spike(),
    ranks: Ranks = ONE,
) -> Reduction:
    """Reduce a guide, as `reduce` does; errors name the verb that the user called."""
    with ranks.together():
        _check_options(select, reduced_prior)
        groupings = list_groupings(groups)
        problem = read_problem(verb, guide, args, kwargs, model, sites, reduced_prior, groupings)
        ranks.check_no_loader(problem.origin.stream)
        problem, reduced_priors = assign(problem, reduced_prior)
        problem.warn_if_empty()
        _check_stages(groupings, reduced_priors)
        factors = meet_priors(problem.factors, problem.priors)
        scores = score(with_reduced_priors(factors, reduced_priors))
        spiked = {name for name, one in reduced_priors.items() if isinstance(one, Spike)}
        whole = decide(problem.origin, scores.factors, scores.kept, spiked)
        meter, notes = _find_meter(whole, ranks) if args or kwargs else (None, ())
        units = UnitsOnDemand(problem, spiked)
        releasable = [n for f in scores.factors for n in f.releasable if n in spiked]
        scores = replace(scores, decision=None if meter is None else replace(whole, meter=meter))
        if problem.origin.moments is None:
            find = partial(find_unread, releasable=releasable, known=units)
            scores = replace(scores, find_unread=find)
        if select is None:
            select = by_evidence() if meter is None else by_free_energy(progress=ranks.is_first)
        agreed = partial(_select_alike, select=select, ranks=ranks)
        chosen, stages = run_stages(scores, groupings, agreed, units.structure)
        decision = whole.and_drop(chosen).in_order(units.structure_if_read())
        flags = flag_scales(scores.factors)
        training = (
            describe_scales(scores, flags)
            if meter is None
            else describe_training(scores, whole, meter)
        )
        notes += (*note_held(stages), *units.notes, *training)
        result = _conclude(problem, scores, stages, decision, meter, flags.wide, notes)
        ranks.check_values(_take_numbers(result), "parts of the result")
    return result


def _conclude(
    problem: Problem,
    scores: ElementScores,
    stages: tuple[Stage, ...],
    decision: Decision,
    meter: Meter | None,
    wide: Mapping[str, int],
    notes: tuple[str, ...],
) -> Reduction:
    """Carry out what was decided, and write down what it does."""
    remaining = decision.remaining()
    model, guide, masks = decision.assemble(remaining)
    realised = None if meter is None else measure_realised(decision, meter)
    rows = summarize(
        *(scores, decision.masks, remaining, problem.reasons, problem.absent),
        released=sum_released(stages),
        wide=wide,
        realised=None if realised is None else realised.by_site,
    )
    if isinstance(guide, Posterior):
        guide = guide.after(sum(row.delta_f for row in rows))
    layers, by_site = summarize_layers(stages), {row.name: row.delta_f for row in rows}
    naive = None if layers else naive_delta_f(scores, decision.masks, by_site)
    return Reduction(
        model=model,
        guide=guide,
        masks=masks,
        scores=scores.delta_f,
        sites=rows,
        naive_delta_f=naive,
        layers=layers,
        realised=None if realised is None else realised.total,
        realised_error=None if realised is None else realised.error,
        notes=notes,
        decision=replace(decision, predicted=by_site),
    )


def _find_meter(decision: Decision, ranks: Ranks) -> tuple[Meter | None, tuple[str, ...]]:
    """Make a meter if the model observes something; else a note says why there is none."""
    try:
        return make_meter(decision, ROWS, 1, ranks), ()
    except DataShapeError:
        raise
    except ValueError as reason:
        if ranks.are_many:
            raise
        return None, (f"not measured: {reason}",)


def _select_alike(scores: Scores, select: Selection, ranks: Ranks) -> Mapping[str, Tensor]:
    """Select, and check that all ranks come to the same masks."""
    masks = checked_masks(select, scores)
    ranks.check_values(masks, "masks of")
    return masks


def _take_numbers(result: Reduction) -> dict[str, Any]:
    """Take what has to be the same in all ranks: masks, parameters, and what was measured."""
    guide = result.guide
    parameters = guide.named_parameters() if isinstance(guide, torch.nn.Module) else ()
    masks = {f"mask of {name}": mask for name, mask in result.masks.items()}
    scores = {f"scores of {name}": one for name, one in result.scores.items()}
    measured = {"realised": result.realised, "delta_f": result.delta_f}
    return {**masks, **scores, **measured, **dict(parameters)}


def _check_options(select: Any, reduced_prior: Any) -> None:
    if select is not None:
        check_function("select", select, "a selection, such as pyro_bmr.by_evidence()")
    by_site = reduced_prior if isinstance(reduced_prior, Mapping) else {"": reduced_prior}
    if not all(isinstance(one, ReducedPrior) for one in by_site.values()):
        expected = (
            "pyro_bmr.Spike(), Gaussian(loc, scale) or Laplace(scale), or a mapping from sites to "
            "these; pyro_bmr.delta_f scores those of other families"
        )
        refuse_kind("reduced_prior", reduced_prior, expected)


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
