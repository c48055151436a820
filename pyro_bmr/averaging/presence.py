"""How probable it is that each element is present, given the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.averaging.element_names import read_names_of
from pyro_bmr.averaging.model_priors import LearnedPrior, check_options, find_log_odds
from pyro_bmr.averaging.model_space import read_spaces
from pyro_bmr.display import Tabular
from pyro_bmr.mathematics.reduced_priors import Spike
from pyro_bmr.programs.alone import alone
from pyro_bmr.selection.problem import read_scores, read_spike

if TYPE_CHECKING:
    import pandas as pd


@alone("presence")
@torch.inference_mode(False)
@torch.no_grad()
def presence(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    prior: float | Mapping[str, Any] | LearnedPrior = 0.5,
    expected: float | None = None,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    reduced_prior: Spike = Spike(),
    num_samples: int = 2000,
    seed: int = 0,
) -> Presence:
    r"""Return the posterior probability that each element is there, rather than exactly zero.

    Under the prior that each element is there with the probability :math:`\pi_i`, independently,
    and then has the prior of the model, a set :math:`S` of absent elements has the posterior
    probability

    .. math:: P(S) \propto e^{-\Delta F_S} \prod_{i \in S} \frac{1 - \pi_i}{\pi_i}

    which for independent elements is
    :math:`P(i) = 1 / (1 + e^{-\Delta F_i - \operatorname{logit} \pi_i})`. For up to 16 correlated
    elements it is summed over all subsets; for more, a random walk over subsets estimates it
    (see ``pyro_bmr.averaging.subset_sampling``), and ``standard_error`` says how well.

    The guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    guide : callable
        A trained guide, as in `reduce`.
    *args
        Of the model, as in `reduce`.
    kwargs : mapping, optional
        Keyword arguments of the model.
    prior : float, mapping or LearnedPrior
        :math:`\pi`, the probability before the data: one for all; by site, a number or an array
        that broadcasts to the site, so that a row or a column may have one of its own; by element
        or pattern, a number, as in ``{"A*": 0.9, "A[2,1]": 0.1}``, of which the later one holds
        (1/2 without any); or how to learn it from them.
    expected : float, optional
        In place of ``prior``, how many elements are present on average before the data: of ``n``
        that can go, each has :math:`\pi =` ``expected`` :math:`/ n`.
    model, sites : optional
        As in `reduce`.
    reduced_prior : Spike
        At zero; its ``rest`` says what a correlated prior leaves of what stays.
    num_samples : int
        Steps of each of the 4 chains where there are more than 16 correlated elements.
    seed : int
        Of their random numbers.

    Returns
    -------
    Presence
        Probabilities by site.

    Raises
    ------
    ValueError
        If a probability is not between 0 and 1, or ``expected`` not between 0 and the number of
        elements, or ``num_samples`` is too small.

    References
    ----------
    Mitchell & Beauchamp (1988), "Bayesian variable selection in linear regression", JASA 83;
    Marković, Friston & Kiebel (2023), arXiv:2309.12095, for the learned prior.

    Examples
    --------
    >>> import pyro.distributions as dist, pyro
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 1.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> presence(guide).probability["w"]
    tensor([0.3333, 0.7870])
    >>> presence(guide, prior={"w": torch.tensor([0.5, 0.1])}).probability["w"]
    tensor([0.3333, 0.2910])
    """
    check_options(prior, expected, num_samples, seed)
    _, scores = read_scores(
        "presence", guide, args, kwargs, model, sites, read_spike(reduced_prior)
    )
    spaces = read_spaces(scores, num_samples, seed)
    names = read_names_of(guide, {name: one.shape for name, one in scores.delta_f.items()})
    log_odds = find_log_odds(spaces, scores, prior, expected, names)
    probability: dict[str, Tensor] = {}
    standard_error: dict[str, Tensor] = {}
    methods: dict[str, str] = {}
    for space in spaces:
        found = space.presences(log_odds)
        probability |= found.probability
        standard_error |= found.standard_error
        methods |= dict.fromkeys(found.probability, found.method)
    return Presence(probability, standard_error, log_odds, methods)


@dataclass(frozen=True, eq=False, repr=False)
class Presence(Tabular):
    """The posterior probability that each element is present.

    Parameters
    ----------
    probability : mapping
        By reducible site, a tensor of its shape; 0 where an element was pruned before, 1 where it
        cannot go because it has no prior density at zero.
    standard_error : mapping
        The Monte Carlo standard error of that, by site; absent where the probability is exact.
    log_odds : mapping
        By site, the prior log odds: given, a tensor where they differ between elements; or ζ as it
        was learned.
    methods : mapping
        By site, how the probability was found.

    Examples
    --------
    >>> Presence({"w": torch.tensor([0.25, 0.75])}, {}, {"w": 0.0}).expected_kept
    1.0
    """

    probability: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    log_odds: Mapping[str, float | Tensor]
    methods: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def expected_kept(self) -> float:
        """How many elements are present on average."""
        return sum(float(p.sum(dtype=torch.float64)) for p in self.probability.values())

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``total``, ``prior`` (π, its mean), ``expected`` (elements
            present on average), ``P > 1/2`` and ``P > 0.95`` (how many), ``standard_error`` (the
            largest; 0 where exact) and ``found by``.
        """
        import pandas as pd

        rows = []
        for name, p in self.probability.items():
            error = self.standard_error.get(name)
            log_odds = torch.as_tensor(self.log_odds[name], dtype=torch.float64, device="cpu")
            largest = float(error.max()) if error is not None and error.numel() else 0.0
            prior = {"prior": float(log_odds.sigmoid().mean())}
            found = {"standard_error": largest, "found by": self.methods.get(name, "")}
            rows.append({"site": name, **prior, **count_present(p), **found})
        columns = ("total", "prior", "expected", "P > 1/2", "P > 0.95")
        names = ["site", *columns, "standard_error", "found by"]
        return pd.DataFrame(rows, columns=names).set_index("site")

    def parameters(self) -> pd.DataFrame:
        """Return a table with one row per element of sites of one element, as SPM's are.

        Returns
        -------
        DataFrame
            Indexed by element; columns ``P``, the probability that it is present, ``prior``, what
            that was before the data, and ``standard_error``, 0 where exact.
        """
        import pandas as pd

        single = [name for name, p in self.probability.items() if p.numel() == 1]
        index = pd.Index(single, name="element")
        summary = self.summary().loc[single]
        columns = {
            "P": summary["expected"],
            "prior": summary["prior"],
            "standard_error": summary["standard_error"],
        }
        return pd.DataFrame({name: one.to_numpy() for name, one in columns.items()}, index=index)

    def __rich__(self) -> Table:
        if are_single(self.probability):
            return draw_elements(self.parameters(), self._title)
        table = Table("site", title=self._title, title_justify="left")
        columns = ("total", "prior π", "expected", "P > 1/2", "P > 0.95", "largest std. error")
        for column in columns:
            table.add_column(column, justify="right")
        table.add_column("found by")
        for name, row in self.summary().iterrows():
            table.add_row(
                str(name),
                f"{row['total']:,}",
                f"{row['prior']:.3g}",
                f"{row['expected']:,.1f}",
                f"{row['P > 1/2']:,}",
                f"{row['P > 0.95']:,}",
                f"{row['standard_error']:.1g}" if name in self.standard_error else "",
                row["found by"],
            )
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        single = are_single(self.probability)
        return {self._title: (self.parameters() if single else self.summary()).round(3)}

    @property
    def _title(self) -> str:
        total = sum(p.numel() for p in self.probability.values())
        return f"{self.expected_kept:,.1f} of {total:,} elements expected to be present"


def are_single(by_site: Mapping[str, Tensor]) -> bool:
    """Tell whether each site is one element, as those of a vector with names are."""
    return bool(by_site) and all(one.numel() == 1 for one in by_site.values())


def draw_elements(frame: pd.DataFrame, title: str) -> Table:
    """Make a table with a row per element; what is not known, or is exact, stays empty."""
    table = Table("element", title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(_HEADS.get(column, column), justify="right")
    for name, row in frame.iterrows():
        cells = (_write(column, row[column]) for column in frame.columns)
        table.add_row(str(name), *cells)
    return table


_HEADS = {"prior": "prior π", "standard_error": "std. error"}


def _write(column: str, value: float) -> str:
    if value != value or (column == "standard_error" and not value):
        return ""
    return f"{value:.3f}" if column == "P" else f"{value:.4g}"


def count_present(probability: Tensor) -> dict[str, float]:
    """Count the elements of a site: all, expected to be present, and probably so."""
    return {
        "total": probability.numel(),
        "expected": float(probability.sum(dtype=torch.float64)),
        "P > 1/2": int((probability > 0.5).sum()),
        "P > 0.95": int((probability > 0.95).sum()),
    }
