"""`tune_prior`: empirical Bayes without training again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import check_choice, read_device
from pyro_bmr.display import Tabular
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import meet_priors
from pyro_bmr.factors.prior_scales import choose_variances
from pyro_bmr.factors.switched import SwitchedFactor, with_reduced_priors
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.mathematics.reduced_priors import Gaussian, ReducedPrior
from pyro_bmr.mathematics.scale_search import Tuned
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.switching import NewPrior
from pyro_bmr.selection.decision import assemble
from pyro_bmr.selection.groups import Labelling, read_labels
from pyro_bmr.selection.problem import assign, read_problem

if TYPE_CHECKING:
    import pandas as pd


@alone("tune_prior")
@torch.inference_mode(False)
@torch.no_grad()
def tune_prior(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    shared: str | Labelling = "site",
) -> TunedPrior:
    r"""Choose the scale of the prior that has the highest evidence, without training again.

    .. math:: \hat\sigma_g = \arg\max_\sigma \; \ln \int q(\theta_g)
              \prod_{i \in g} \frac{N(\theta_i; \mu_{0i}, \sigma^2)}{p(\theta_i)} \, d\theta_g

    for every group :math:`g` of elements, in closed form; their prior means stay. Independent
    elements are summed. In a correlated posterior the evidence is the joint one, and groups take
    turns until no scale moves. The posterior becomes :math:`q \, r / p`.

    A scale is searched up to 100 times that of the widest prior of its group. Where the evidence
    rises all the way to a scale of zero, the spike wins: the scale is then 1 % of the smallest
    standard deviation of the likelihood of an element, or of the widest prior if that is less, and
    the note says so. Independent elements whose posterior is wider than their prior keep it.

    Parameters
    ----------
    guide : callable
        As for `reduce`.
    *args
        Of the model, if the guide does not remember those of its first call.
    kwargs, model : optional
        As for `reduce`.
    sites : iterable of str, optional
        Sample sites whose prior is tuned; all with a Gaussian prior otherwise.
    shared : str or callable
        What shares a scale: ``"site"``; ``"layer"``, the sites that share all that stands before
        the last dot of their names; or a function from the name and the shape of a site to integer
        labels that broadcast to it, or to None where every element has a scale of its own, as
        `elements` (ARD). Sites do not share the labels of a function.

    Returns
    -------
    TunedPrior
        The model with the tuned prior, its posterior, and the scales.

    Raises
    ------
    ValueError
        If ``shared`` is unknown, if a named site has no Gaussian prior, if labels do not fit, or if
        a low-rank posterior is too large for its joint evidence.

    References
    ----------
    MacKay (1992), "Bayesian interpolation", Neural Comput. 4(3); Tipping (2001), "Sparse Bayesian
    learning and the relevance vector machine", JMLR 1; Friston, Parr & Zeidman (2018),
    arXiv:1805.07092.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([-1.0, 0.5, 2.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.1)
    >>> _ = guide()
    >>> tune_prior(guide).scales["w"]
    tensor([1.3192, 1.3192, 1.3192])
    """
    if not callable(shared) or isinstance(shared, type):
        also = (
            "or a function from the name and the shape of a site to labels, such as "
            "pyro_bmr.elements"
        )
        check_choice("shared", shared, ("site", "layer"), also)
    wide = Gaussian(0.0, 1.0)
    problem = read_problem("tune_prior", guide, args, kwargs, model, sites, wide)
    problem, _ = assign(problem, wide)
    problem.warn_if_empty()
    factors = meet_priors(problem.factors, problem.priors)
    labels = _label(factors, shared)
    chosen = choose_variances(factors, labels)
    reduced: dict[str, ReducedPrior] = {}
    masks: dict[str, Tensor] = {}
    for name, label in labels.items():
        gaussian: Any = problem.priors[name].gaussian
        variance = torch.full(label.shape, torch.nan, dtype=torch.float64, device=label.device)
        variance[label >= 0] = chosen.variance.to(label.device)[label[label >= 0]]
        masks[name] = variance.isnan()
        scale = torch.where(masks[name], gaussian.scale.to(label.device), variance.sqrt())
        reduced[name] = Gaussian(gaussian.loc.to(label.device), scale)
    delta_f, remaining = 0.0, []
    new_priors: dict[str, NewPrior] = {}
    for factor in with_reduced_priors(factors, reduced):
        if isinstance(factor, SwitchedFactor):
            change, after = factor.switch(masks)
            delta_f += change
            remaining.append(after)
            new_priors |= factor.new_priors(masks)
        else:
            remaining.append(factor)
    tuned_model, tuned_guide, _ = assemble(problem.origin, tuple(remaining), new_priors)
    scales = {
        name: new.parameters["scale"].to(_dtype(factors, name)) for name, new in new_priors.items()
    }
    return TunedPrior(
        model=tuned_model,
        guide=tuned_guide,
        scales=scales,
        delta_f=delta_f,
        shared=shared if isinstance(shared, str) else "group",
        sites=_summarize(factors, labels, chosen, masks, reduced, problem.reasons),
    )


@dataclass(frozen=True)
class TunedSite:
    """What became of the prior of one site, of which ``tuned`` elements have another one.

    ``before`` and ``after`` are the smallest and the largest scale of their prior, None if none is
    tuned; ``note`` says why some elements keep theirs, and where a search met its end.
    """

    name: str
    shape: tuple[int, ...]
    tuned: int
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class TunedPrior(Tabular):
    """A model with a tuned prior, and its posterior.

    Parameters
    ----------
    model : PrunedModel
        The model with the tuned prior.
    guide : PrunedGuide
        Its posterior, ready for `pyro.infer.Predictive`, further training and `reduce`.
    scales : mapping
        By site, the scale of the prior of each element, of the site's shape.
    delta_f : float
        Free energy of the tuned model minus that of the model before, in nats.
    shared : str
        What shares a scale: ``"site"``, ``"layer"`` or ``"group"``.
    sites : tuple of TunedSite
        One row per site.

    Examples
    --------
    >>> rows = (TunedSite("w", (3,), 3, (1.0, 1.0), (0.1, 0.1)),)
    >>> print(TunedPrior(None, None, {}, -2.5, "site", rows))
    prior tuned per site, ΔF = -2.50 nats
    ...
    """

    model: PrunedModel
    guide: PrunedGuide
    scales: Mapping[str, Tensor]
    delta_f: float
    shared: str
    sites: tuple[TunedSite, ...]

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``shape``, ``tuned`` (elements), ``before``, ``after`` (the
            smallest and largest scale) and ``note``.
        """
        import pandas as pd

        columns = ("shape", "tuned", "before", "after", "note")
        rows = [{"site": s.name, **{c: getattr(s, c) for c in columns}} for s in self.sites]
        return pd.DataFrame(rows, columns=["site", *columns]).set_index("site")

    def to(self, device: torch.device | str) -> TunedPrior:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        TunedPrior
            With scales there. Model and guide are moved in place, as in torch.
        """
        device = read_device(device)
        return replace(
            self,
            model=self.model.to(device),
            guide=self.guide.to(device),
            scales={name: scale.to(device) for name, scale in self.scales.items()},
        )

    def __rich__(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        table.add_column("site")
        for column in ("shape", "tuned", "scale before", "scale after"):
            table.add_column(column, justify="right")
        table.add_column("note")
        for site in self.sites:
            shape = " × ".join(map(str, site.shape))
            spans = (_span(site.before), _span(site.after))
            table.add_row(site.name, shape, f"{site.tuned:,}", *spans, site.note)
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary()}

    @property
    def _title(self) -> str:
        return f"prior tuned per {self.shared}, ΔF = {self.delta_f:+.2f} nats"


def _span(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    low, high = (f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _label(factors: tuple[Factor, ...], shared: str | Labelling) -> dict[str, Tensor]:
    """By site, the group of every element; -1 for those that keep their prior."""
    labels: dict[str, Tensor] = {}
    layers: dict[str, int] = {}
    count = 0
    for factor in factors:
        shapes = {site.name: site.shape for site in factor.sites}
        kept = factor.kept()
        for name, prior in factor.priors.items():
            shape, device = shapes[name], kept[name].device
            own: Tensor | None = torch.zeros(shape, dtype=torch.long, device="cpu")
            if not isinstance(shared, str):
                own = read_labels(shared, name, shape, "shared")
            if own is None:
                own = torch.arange(shape.numel(), device="cpu").reshape(shape)
            own = own.unique(return_inverse=True)[1]
            key = name.rpartition(".")[0] or name if shared == "layer" else name
            start = layers.setdefault(key, count)
            count = max(count, start + int(own.max()) + 1 if own.numel() else count)
            able = kept[name] & prior.log_density_at_zero.isfinite().to(device)
            if isinstance(factor, IndependentFactor):
                able &= ~_wide(factor, prior)
            labels[name] = torch.where(able, own.to(device) + start, -1)
    return labels


def _wide(factor: IndependentFactor, prior: Any) -> Tensor:
    return factor.stored.scale >= prior.gaussian.scale.to(factor.loc.device)


def _dtype(factors: tuple[Factor, ...], name: str) -> torch.dtype:
    return next(f.locations()[name].dtype for f in factors if name in f.priors)


def _summarize(
    factors: tuple[Factor, ...],
    labels: Mapping[str, Tensor],
    chosen: Tuned,
    masks: Mapping[str, Tensor],
    reduced: Mapping[str, Any],
    reasons: Mapping[str, str],
) -> tuple[TunedSite, ...]:
    rows = []
    kept = {name: t for factor in factors for name, t in factor.kept().items()}
    for site in (site for factor in factors for site in factor.sites):
        name, shape = site.name, tuple(site.shape)
        if name not in labels:
            rows.append(TunedSite(name, shape, 0, note=f"not tuned: {reasons[name]}"))
            continue
        prior: Any = next(f.priors[name].gaussian for f in factors if name in f.priors)
        tuned = ~masks[name]
        used = labels[name][tuned].unique().cpu()
        rows.append(
            TunedSite(
                name,
                shape,
                int(tuned.sum()),
                _ends(prior.scale.to(tuned.device).expand(site.shape)[tuned]),
                _ends(reduced[name].scale[tuned]),
                _note(chosen, used, int((masks[name] & kept[name]).sum())),
            )
        )
    return tuple(rows)


def _ends(values: Tensor) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.numel() else None


def _note(chosen: Tuned, groups: Tensor, silent: int) -> str:
    spiked, capped = (int(flags[groups].sum()) for flags in (chosen.spiked, chosen.capped))
    scales = "the scale" if len(groups) == 1 else "{} scales"
    notes = [
        f"{scales.format(spiked)} at the lower end, where the spike wins" if spiked else "",
        f"{scales.format(capped)} at the upper end of the search" if capped else "",
        f"{silent} without a prior, or wider than it, as they were" if silent else "",
    ]
    return "; ".join(note for note in notes if note)
