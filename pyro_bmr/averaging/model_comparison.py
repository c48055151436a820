"""`compare_models`: a table of named sub-models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.averaging.compared_models import ModelComparison
from pyro_bmr.averaging.element_names import ElementNames
from pyro_bmr.averaging.model_table import PriorReader, read_families
from pyro_bmr.averaging.named_models import ModelGrid, list_models, read_reader
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.chosen_sets import drop_sets
from pyro_bmr.mathematics.reduced_priors import Spike
from pyro_bmr.moments.names import Layout
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.alone import alone
from pyro_bmr.selection.problem import read_scores, read_spike
from pyro_bmr.selection.scores import ElementScores


@alone("compare_models")
@torch.inference_mode(False)
@torch.no_grad()
def compare_models(
    guide: Any,
    models: Mapping[str, Any],
    *args: Any,
    families: Mapping[str, Any] | None = None,
    prior: float | Mapping[str, Any] | None = None,
    expected: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    reduced_prior: Spike = Spike(),
) -> ModelComparison:
    r"""Compare named sub-models of a guide or a posterior, and average over them.

    .. math:: P(m) \propto e^{-\Delta F_m} \, \pi_m, \quad P(f) = \sum_{m \in f} P(m), \quad
              \Delta F_m = \ln p(\theta_S = 0) - \ln q(\theta_S = 0),

    where :math:`S` is what is off in the model :math:`m`, jointly in a correlated posterior;
    nothing is fitted again. A sub-model says what it keeps; what it does not name stays:

    - a mapping by name, in which True keeps and False, or 0, is off. A name is that of a site, with
      a mask that broadcasts to it or one value for all; of an element, such as ``"A(2,1)"`` or
      ``"w[3,1]"``; or a pattern over both, in which ``*`` stands for any text and ``?`` for one
      letter. Of an element that is named twice, the last counts: ``{"*": False, "A*": True}`` has
      only A, and ``{}`` is the full model;
    - a mask of all elements in order (of those of a `Posterior`, or of the sites that can be
      reduced), a pandas Series of such by name, a result of `reduce`;
    - a selection, such as `by_evidence`, or any function from ``pyro_bmr.extend.Scores`` to masks.

    The guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    guide : callable or Posterior
        As in `reduce`.
    models : mapping or DataFrame
        Sub-models by name; what `model_grid` returned; or a table of masks with a row per model and
        a column per site or element.
    *args
        Of the model, as in `reduce`; only to run it, nothing is measured.
    families : mapping, optional
        By family, the names of its models, or patterns of names: each model is in one. Or several
        such partitions by name. Those of a grid are known.
    prior : float or mapping, optional
        :math:`\pi_m`. By model, probabilities or weights, which are normalised. Or, for all or by
        site, element or pattern, the probability :math:`\pi_i` that an element is present, 1/2
        where none is given: :math:`\pi_m \propto \prod_{i \in m} \pi_i / (1 - \pi_i)`. By default
        all models are equal, and with families, all families are: :math:`\pi_m = 1 / (F n_f)` of
        :math:`F` families of :math:`n_f` models; of several partitions, a family is what has the
        same place in all.
    expected : float, optional
        In place of ``prior``, how many elements are present on average, of those that some models
        have and others have not, before the data and if all combinations of these were in the
        table: of ``n`` each has :math:`\pi_i =` ``expected`` :math:`/ n`.
    kwargs, model, sites : optional
        As in `reduce`. What is not among ``sites`` stays.
    reduced_prior : Spike
        At zero; its ``rest`` says what a correlated prior leaves of what stays.

    Returns
    -------
    ModelComparison
        ΔF and probabilities of models and families, probabilities and moments of elements.

    Raises
    ------
    ValueError
        If a name is not known, a mask does not fit, an element that is off cannot go, a model is in
        no family or in two, or a prior is not possible.
    TypeError
        If something is no sub-model.

    References
    ----------
    Penny et al. (2010), "Comparing families of dynamic causal models", PLoS Comput. Biol. 6(3),
    for families and averages; Friston et al. (2016), "Bayesian model reduction and empirical Bayes
    for group (DCM) studies", NeuroImage 128: SPM's ``spm_dcm_peb_bmc``.

    Examples
    --------
    >>> from pyro_bmr import Posterior
    >>> q = Posterior([0.1, 2.0], scale=[0.5, 0.5], prior_scale=1.0, names=["A(1,2)", "A(2,1)"])
    >>> found = compare_models(
    ...     q, {"full": {}, "forward": {"A(1,2)": False}, "backward": {"A(2,1)": False}}
    ... )
    >>> found.best, found.summary()["probability"].round(3).tolist()
    ('forward', [0.662, 0.338, 0.0])
    """
    spike = read_spike(reduced_prior)
    listed = list_models(models)
    if families is None and isinstance(models, ModelGrid):
        families = models.families
    partitions = read_families(families, tuple(listed))
    problem, scores = read_scores("compare_models", guide, args, kwargs, model, sites, spike)
    layout = _read_layout(guide, scores)
    names = ElementNames(layout)
    reader = read_reader(scores, names, problem.reasons)
    kept = reader.read(listed)
    log_prior = PriorReader(tuple(listed), partitions, names, kept & reader.open).read(
        prior, expected
    )
    masks = {
        name: left
        & torch.from_numpy(kept[:, names.sites[name]]).to(left.device).reshape(-1, *left.shape)
        for name, left in scores.kept.items()
    }
    parts = [_reduce_factor(factor, scores, masks, len(listed)) for factor in scores.factors]
    device = next((m.device for m in masks.values()), torch.device("cpu"))
    start = torch.zeros(len(listed), dtype=torch.float64, device=device)
    delta_f = sum((part.delta_f for part in parts), start)
    if not delta_f.isfinite().any():
        msg = (
            f"got models={list(listed)[:5]}, none of which is possible: what is off cannot be zero "
            "under the prior. Expected one or more that are, such as {'full': {}}"
        )
        raise ValueError(msg)
    return ModelComparison(
        names=tuple(listed),
        delta_f=delta_f,
        log_prior=torch.from_numpy(log_prior).to(device),
        families=partitions,
        kept=masks,
        means={name: t for part in parts for name, t in part.mean.items()},
        variances={name: t for part in parts for name, t in part.variance.items()},
        full_mean={n: t.double().clone() for f in scores.factors for n, t in f.locations().items()},
        full_variance={
            n: one.scale.double().square()
            for f in scores.factors
            for n, one in f.marginals().items()
        },
        layout=layout,
    )


@dataclass(frozen=True)
class _FactorModels:
    delta_f: Tensor
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


def _reduce_factor(
    factor: Factor, scores: ElementScores, masks: Mapping[str, Tensor], count: int
) -> _FactorModels:
    """Find ΔF and the moments of a factor in each of the models."""
    if isinstance(factor, JointFactor):
        posterior, log_prior = factor.left()
        whole = torch.ones(count, 1, dtype=torch.bool, device=log_prior.device)
        sizes = {site.name: site.shape.numel() for site in factor.sites}
        flat = [
            masks[name].reshape(count, -1) if name in masks else whole.expand(count, size)
            for name, size in sizes.items()
        ]
        drop = ~torch.cat(flat, 1)[:, factor.flat_mask]
        found = drop_sets(posterior, log_prior, drop)
        mean, variance = factor.spread(found.loc, 0.0), factor.spread(found.variance, 0.0)
        return _FactorModels(found.delta_f, mean, variance)
    (name,) = (site.name for site in factor.sites)
    loc = factor.locations()[name].double()
    square = factor.marginals()[name].scale.double().square()
    if name not in masks:
        moments = ({name: one.clone().expand(count, *one.shape)} for one in (loc, square))
        return _FactorModels(loc.new_zeros(count), *moments)
    kept = masks[name]
    cost = torch.where(factor.kept()[name] & ~kept, scores.delta_f[name].double(), 0)
    delta_f = cost.reshape(count, -1).sum(1)
    return _FactorModels(delta_f, {name: kept * loc}, {name: kept * square})


def _read_layout(guide: Any, scores: ElementScores) -> Layout:
    if isinstance(guide, Posterior):
        return guide.layout
    return Layout({name: one.shape for name, one in scores.delta_f.items()}, {})
