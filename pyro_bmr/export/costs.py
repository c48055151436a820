"""What a network costs: parameters, operations, and the time that predictions take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmr.arguments.checks import read_count, read_number
from pyro_bmr.display import Tabular
from pyro_bmr.export.modules import export_program
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.pairs import read_pairs

if TYPE_CHECKING:
    import pandas as pd


@alone("measure_costs")
def measure_costs(
    pairs: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 20,
    output: str | None = None,
    seconds: float = 1.0,
) -> Costs:
    """Count and time the networks of some models and guides beside each other.

    What is timed is what `to_module` returns: one forward at the posterior's location, and the
    batched forward of an ensemble of draws. All take turns, so that what else the machine does
    falls on all of them; the medians are kept.

    Parameters
    ----------
    pairs : mapping, Reduction or tuple
        By name, what `reduce` or `prune` returned, or ``(model, guide)``; or one of these alone.
        The first is what the others are compared with.
    *args
        Of the models; the batch is theirs.
    kwargs : mapping, optional
        Keyword arguments of the models.
    num_samples : int
        Of an ensemble.
    output : str, optional
        As in `to_module`.
    seconds : float
        How long to measure, at least; at most 1000 turns, at least 5.

    Returns
    -------
    Costs
        One row per program.

    Raises
    ------
    TypeError
        If something is no pair.
    ValueError
        If there are none.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     return x @ pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    >>> guide = AutoNormal(model)
    >>> x = torch.zeros(5, 3)
    >>> _ = guide(x)
    >>> costs = measure_costs({"full": (model, guide)}, x, num_samples=2, seconds=0.0)
    >>> costs.rows[0].parameters, costs.rows[0].flops
    (6, 60)
    """
    programs = read_pairs(pairs)
    num_samples = read_count("num_samples", num_samples)
    seconds = read_number("seconds", seconds, lambda time: time >= 0, "a number, 0 or more")
    options: dict[str, Any] = {"kwargs": kwargs, "output": output}
    forwards, ensembles = (
        [export_program(*pair, args, num_samples=n, **options) for pair in programs.values()]
        for n in (None, num_samples)
    )
    times = _time_in_turn([*forwards, *ensembles], seconds)
    rows = []
    for i, (name, (_, guide)) in enumerate(programs.items()):
        kept = [kept for factor in read_guide(guide) for kept in factor.kept().values()]
        rows.append(
            Cost(
                name,
                parameters=sum(mask.numel() for mask in kept),
                nonzero=sum(int(mask.sum()) for mask in kept),
                flops=_count_flops(*forwards[i]),
                forward=times[i],
                predictive=times[len(programs) + i],
            )
        )
    return Costs(tuple(rows), num_samples, _batch(forwards))


@dataclass(frozen=True)
class Cost:
    """What one network costs.

    Parameters
    ----------
    name : str
        Of the network.
    parameters : int
        Elements of its latent sites.
    nonzero : int
        Those that are not pruned.
    flops : int
        Floating-point operations of a forward, as `torch.utils.flop_counter` counts them: those
        of matrix products and convolutions.
    forward, predictive : float
        Seconds that one forward takes, and that of an ensemble of draws.

    Examples
    --------
    >>> Cost("full", 10, 4, 20, 0.001, 0.002).nonzero
    4
    """

    name: str
    parameters: int
    nonzero: int
    flops: int
    forward: float
    predictive: float


@dataclass(frozen=True, repr=False)
class Costs(Tabular):
    """What some networks cost beside each other.

    Parameters
    ----------
    rows : tuple of Cost
        The first is what the others are compared with.
    num_samples : int
        Draws of a predictive.
    batch : int, optional
        How many data they were given.

    Examples
    --------
    >>> full = Cost("full", 10, 10, 20, 0.004, 0.04)
    >>> print(Costs((full, Cost("compacted", 2, 2, 4, 0.001, 0.004)), 20, 64))
    costs at 64 data
    ...
    """

    rows: tuple[Cost, ...]
    num_samples: int
    batch: int | None = None

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per network.

        Returns
        -------
        DataFrame
            Indexed by network; columns ``parameters``, ``parameters %`` of the first network's,
            ``non-zero`` (how many), ``non-zero %`` of the network's own, ``FLOPs``, and in
            milliseconds and as ratio to the first network's ``forward (ms)``, ``forward speed-up``,
            ``predictive (ms)``, ``predictive speed-up``.
        """
        import pandas as pd

        first = self.rows[0]
        rows = [
            {
                "network": row.name,
                "parameters": row.parameters,
                "parameters %": 100 * row.parameters / max(first.parameters, 1),
                "non-zero": row.nonzero,
                "non-zero %": 100 * row.nonzero / max(row.parameters, 1),
                "FLOPs": row.flops,
                "forward (ms)": 1e3 * row.forward,
                "forward speed-up": first.forward / row.forward,
                "predictive (ms)": 1e3 * row.predictive,
                "predictive speed-up": first.predictive / row.predictive,
            }
            for row in self.rows
        ]
        return pd.DataFrame(rows).set_index("network")

    def __rich__(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        table.add_column("network")
        for column in ("parameters", "non-zero", "FLOPs", "forward", f"{self.num_samples} draws"):
            table.add_column(column, justify="right")
        for name, row in self.summary().iterrows():
            table.add_row(
                str(name),
                f"{row['parameters']:,.0f} ({row['parameters %']:.1f}%)",
                f"{row['non-zero']:,.0f} ({row['non-zero %']:.1f}%)",
                f"{row['FLOPs']:,.0f}",
                *(
                    f"{row[f'{key} (ms)']:.3g} ms ({row[f'{key} speed-up']:.2g}x)"
                    for key in ("forward", "predictive")
                ),
            )
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        table = self.summary()
        names = map(str, table.columns)
        digits = {name: 1 if "%" in name else 2 if "speed-up" in name else 3 for name in names}
        return {self._title: table.round(digits)}

    @property
    def _title(self) -> str:
        return "costs" if self.batch is None else f"costs at {self.batch:,} data"


_TURNS = (5, 1000)


@torch.inference_mode()
def _time_in_turn(
    calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]], seconds: float
) -> list[float]:
    """Return the median seconds of each call."""
    for module, inputs in [*calls, *calls]:
        module(*inputs)
    times: list[list[float]] = [[] for _ in calls]
    begin = perf_counter()
    for turn in range(_TURNS[1]):
        for (module, inputs), taken in zip(calls, times, strict=True):
            taken.append(_time(module, inputs))
        if turn + 1 >= _TURNS[0] and perf_counter() - begin > seconds:
            break
    return [median(taken) for taken in times]


def _time(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    _wait(inputs)
    start = perf_counter()
    module(*inputs)
    _wait(inputs)
    return perf_counter() - start


def _wait(inputs: tuple[Tensor, ...]) -> None:
    if any(t.is_cuda for t in inputs):
        torch.cuda.synchronize()


@torch.no_grad()
def _count_flops(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def _batch(calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> int | None:
    return next((len(t) for _, inputs in calls for t in inputs if t.dim()), None)
