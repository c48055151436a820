"""The free energy at a range of sparsities: as predicted, and as measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import read_count, read_names, read_seed
from pyro_bmr.display import Tabular
from pyro_bmr.estimators.measurement import common_draws, mean_and_error
from pyro_bmr.guides.reading import read_origin
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import read_data
from pyro_bmr.reduction import reduce_for
from pyro_bmr.selection.groups import Grouping, elements
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import Selection, by_evidence, count_items, top_k

if TYPE_CHECKING:
    import pandas as pd


@alone("measure_sparsities")
def measure_sparsities(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_points: int = 12,
    num_samples: int = 50,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    groups: Grouping | Sequence[Grouping] = elements,
    seed: int = 0,
) -> Sparsities:
    r"""Reduce a guide to a range of sparsities, and measure what becomes of its free energy.

    .. math:: \Delta F(k) = F(\text{the } k \text{ cheapest dropped}) - F(\text{full})

    Elements go in the order of elimination, the cheapest first. The free energies are measured with
    the same random numbers, so that their differences have less noise. Half of the points lie
    where `by_evidence` would still prune, the others between there and nothing left.

    Parameters
    ----------
    guide : callable
        A trained guide, as for `reduce`.
    *args
        Of model and guide: all of the data.
    kwargs : mapping, optional
        Keyword arguments of model and guide.
    num_points : int
        How many sparsities at most; two or more.
    num_samples : int
        Draws to measure each free energy with; two or more.
    model, sites, groups
        As in `reduce`.
    seed : int
        Of the random numbers.

    Returns
    -------
    Sparsities
        ΔF at each sparsity, predicted and realised, in nats.

    Raises
    ------
    ValueError
        If there are too few points or samples, or as `reduce`.

    References
    ----------
    Beckers et al. (2022), arXiv:2210.09134, figs. 3 and 4.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)
    >>> x = torch.randn(30, 4)
    >>> guide = AutoNormal(model)
    >>> _ = guide(x, x[:, 0])
    >>> measure_sparsities(guide, x, x[:, 0], num_points=3, num_samples=2).summary().shape
    (4, 5)
    """
    num_points = read_count("num_points", num_points, 2, expected="2 or more, a whole number")
    num_samples = read_count("num_samples", num_samples, 2)
    seed, names = read_seed(seed), read_names("sites", sites)
    program = read_origin(guide).model if model is None else model
    args, keywords = read_data(program, guide, args, kwargs)

    def reduced(select: Selection) -> Any:
        given = guide, args, keywords, model, names, groups
        return reduce_for("measure_sparsities", *given, select)

    def draws(decision: Any, model: Any, guide: Any) -> Tensor:
        couplings = decision.couplings()
        complexity, accuracy = common_draws(
            model, guide, args, keywords, num_samples, seed=seed, couplings=couplings
        )
        return complexity - accuracy

    automatic = reduced(by_evidence())
    untouched = automatic.decision.restrict([])
    full_model, full_guide, _ = untouched.assemble()
    full = draws(untouched, full_model, full_guide)

    def measured(result: Any) -> Sparsity:
        change = draws(result.decision, result.model, result.guide) - full
        return Sparsity(result.sparsity, result.delta_f, *mean_and_error(change))

    chosen = automatic.decision.masks.values()
    total = sum(mask.numel() for mask in chosen)
    stop = sum(int((~mask).sum()) for mask in chosen) / max(1, total)
    points: dict[float, Sparsity] = {}
    for fraction in _spread(stop, num_points):
        result = reduced(_drop_cheapest(fraction))
        if result.sparsity not in points:
            points[result.sparsity] = measured(result)
    return Sparsities(tuple(points.values()), measured(automatic), *mean_and_error(full))


@dataclass(frozen=True)
class Sparsity:
    """What a reduction to one sparsity does to the free energy.

    Parameters
    ----------
    sparsity : float
        Fraction of all elements of the guide that are pruned.
    predicted : float
        ΔF in nats, in closed form.
    realised, realised_error : float
        Measured ΔF in nats, without any training in between, with its standard error.

    Examples
    --------
    >>> Sparsity(0.9, -150.0, -149.0, 1.0).predicted
    -150.0
    """

    sparsity: float
    predicted: float
    realised: float
    realised_error: float


@dataclass(frozen=True, repr=False)
class Sparsities(Tabular):
    """The free energy at a range of sparsities.

    Parameters
    ----------
    points : tuple of Sparsity
        In ascending order.
    stop : Sparsity
        Where `by_evidence` stops by itself.
    free_energy, free_energy_error : float
        Measured F of the full model in nats, with its standard error.

    Examples
    --------
    >>> stop = Sparsity(0.9, -150.0, -149.0, 1.0)
    >>> print(Sparsities((Sparsity(0.0, 0.0, 0.0, 0.0),), stop, 1600.0, 2.0))
    F = 1600.00 ± 2.00 nats with nothing pruned
    ┏━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━┓
    ┃ pruned ┃ ΔF predicted ┃    ΔF realised ┃                        ┃
    ┡━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━┩
    │   0.0% │        +0.00 │   +0.00 ± 0.00 │                        │
    │  90.0% │      -150.00 │ -149.00 ± 1.00 │ by_evidence stops here │
    └────────┴──────────────┴────────────────┴────────────────────────┘
    """

    points: tuple[Sparsity, ...]
    stop: Sparsity
    free_energy: float
    free_energy_error: float

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per sparsity.

        Returns
        -------
        DataFrame
            The columns are those of `Sparsity`, in nats, and ``stop``, True where `by_evidence`
            stops by itself.
        """
        import pandas as pd

        rows = [{**asdict(point), "stop": False} for point in self.points]
        rows += [{**asdict(self.stop), "stop": True}]
        return pd.DataFrame(rows).sort_values(["sparsity", "stop"], ignore_index=True)

    def __rich__(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        for column in ("pruned", "ΔF predicted", "ΔF realised"):
            table.add_column(column, justify="right")
        table.add_column("")
        for row in self.summary().itertuples():
            table.add_row(
                f"{row.sparsity:.1%}",
                f"{row.predicted:+.2f}",
                f"{row.realised:+.2f} ± {row.realised_error:.2f}",
                "by_evidence stops here" if row.stop else "",
            )
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary().round(3)}

    @property
    def _title(self) -> str:
        return f"F = {self.free_energy:.2f} ± {self.free_energy_error:.2f} nats with nothing pruned"


def _drop_cheapest(fraction: float) -> Callable[[Scores], Mapping[str, Tensor]]:
    def select(scores: Scores) -> Mapping[str, Tensor]:
        total = count_items(scores)
        return top_k(total - round(fraction * total))(scores)

    return select


def _spread(stop: float, count: int) -> list[float]:
    """Half of the fractions to where the evidence stops, the others densely after it."""
    if stop in {0.0, 1.0}:
        return torch.linspace(0, 1, count, dtype=torch.float64, device="cpu").tolist()
    first = torch.linspace(0, stop, count // 2 + 1, dtype=torch.float64, device="cpu")[:-1]
    # Beyond, ΔF grows the faster the less is left: what is left shrinks to a tenth by one factor.
    rest = (1 - stop) * torch.logspace(
        0, -1, count - len(first), dtype=torch.float64, device="cpu"
    )[1:]
    return [*first.tolist(), *(1 - rest).tolist(), 1.0]
