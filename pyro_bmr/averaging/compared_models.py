"""What `compare_models` returns: named sub-models, families of them, and averages over both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, read_number, refuse
from pyro_bmr.arguments.patterns import refuse_name
from pyro_bmr.averaging.model_table import Families
from pyro_bmr.display import Tabular
from pyro_bmr.mathematics.normal_mixtures import quantiles
from pyro_bmr.moments.names import Layout

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ModelComparison(Tabular):
    """Named sub-models of a posterior, how probable each is, and what they say together.

    Moments are in unconstrained coordinates and in float64.

    Parameters
    ----------
    names : tuple of str
        Of the models.
    delta_f : Tensor
        ΔF of each, in nats, ``(models,)``; negative is better than the full model.
    log_prior : Tensor
        Logarithm of the prior probability of each, ``(models,)``.
    families : mapping
        By partition and family, the names of the models in it.
    kept : mapping
        By reducible site, ``(models, *site)``, True where an element is present.
    means, variances : mapping
        By site, ``(models, *site)``: of every element in each model, 0 where it is off.
    full_mean, full_variance : mapping
        By site, the same of the full model.
    layout : Layout
        The names of the elements.

    Examples
    --------
    >>> from pyro_bmr import Posterior, compare_models
    >>> q = Posterior([0.1, 2.0], scale=[0.5, 0.5], prior_scale=1.0, names=["a", "b"])
    >>> found = compare_models(
    ...     q,
    ...     {"both": {}, "only a": {"b": False}, "only b": {"a": False}},
    ...     families={"several": ["both"], "one": "only *"},
    ... )
    >>> found.best_family, found.presence["a"].round(decimals=3)
    ({'family': 'several'}, tensor(0.5050, dtype=torch.float64))
    """

    names: tuple[str, ...]
    delta_f: Tensor
    log_prior: Tensor
    families: Families
    kept: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    variances: Mapping[str, Tensor]
    full_mean: Mapping[str, Tensor]
    full_variance: Mapping[str, Tensor]
    layout: Layout

    def __len__(self) -> int:
        return len(self.names)

    @property
    def prior(self) -> Tensor:
        """Prior probability of each model, of shape ``(models,)``."""
        return self.log_prior.exp()

    @cached_property
    def probability(self) -> Tensor:
        """Posterior probability of each model, of shape ``(models,)``."""
        return (self.log_prior - self.delta_f).softmax(0)

    @property
    def best(self) -> str:
        """The name of the most probable model."""
        return self.names[int(self.probability.argmax())]

    @cached_property
    def family_probability(self) -> dict[str, dict[str, float]]:
        """By partition and family, its posterior probability."""
        return self._sum_families(self.probability)

    @property
    def best_family(self) -> dict[str, str]:
        """By partition, the name of the most probable family."""
        found = self.family_probability.items()
        return {name: max(families, key=families.__getitem__) for name, families in found}

    @cached_property
    def presence(self) -> dict[str, Tensor]:
        """By reducible site, the probability under the average that an element is present."""
        return {n: _average(self.probability, kept.double()) for n, kept in self.kept.items()}

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        """By site, of every element under the average over the models."""
        return {name: _average(self.probability, means) for name, means in self.means.items()}

    @cached_property
    def variance(self) -> dict[str, Tensor]:
        """By site, under the average: within the models, and of their means."""
        return {
            name: _average(self.probability, self.variances[name] + (means - mean).square())
            for (name, means), mean in zip(self.means.items(), self.mean.values(), strict=True)
        }

    def interval(self, mass: float = 0.9) -> dict[str, Tensor]:
        """Return the central credible interval of every element under the average.

        Where zero has a probability of its own, an end can be exactly 0.

        Parameters
        ----------
        mass : float
            The probability inside, between 0 and 1.

        Returns
        -------
        dict of Tensor
            By site, of shape ``(2, *site)``: the lower and the upper ends.

        Raises
        ------
        ValueError
            If ``mass`` is not between 0 and 1.
        """
        expected = "a probability between 0 and 1 and neither of them"
        mass = read_number("mass", mass, lambda part: 0 < part < 1, expected)
        some = self.probability > _NEGLIGIBLE
        weight = self.probability[some] / self.probability[some].sum()
        levels = ((1 - mass) / 2, (1 + mass) / 2)
        found = {}
        for name, means in self.means.items():
            parts = means[some], self.variances[name][some].sqrt()
            loc, scale = (part.reshape(len(weight), -1) for part in parts)
            ends = torch.stack([quantiles(weight, loc, scale, level) for level in levels])
            found[name] = ends.reshape(2, *means.shape[1:])
        return found

    def within(self, family: str | Mapping[str, str]) -> ModelComparison:
        """Return the comparison of the models of a family alone, with the average over them.

        Parameters
        ----------
        family : str or mapping
            Its name; or by partition, as `best_family` has it, for what is in several at once.

        Returns
        -------
        ModelComparison
            Their priors add up to 1, in the proportions that they had.

        Raises
        ------
        ValueError
            If there is no such family or partition, or nothing is in all of several.
        """
        chosen = {self._partition_of(family): family} if isinstance(family, str) else family
        check_kind("family", chosen, Mapping, "the name of a family, or such names by partition")
        inside = dict.fromkeys(self.names)
        for partition, name in chosen.items():
            if partition not in self.families:
                refuse_name("family", partition, self.families, "a partition,")
            check_kind("family", name, str, "names of families by partition")
            if name not in self.families[partition]:
                refuse_name(f"family[{partition!r}]", name, self.families[partition], "a family,")
            mine = set(self.families[partition][name])
            inside = {model: None for model in inside if model in mine}
        if not inside:
            refuse("family", family, "families that have a model in common")
        index = [i for i, name in enumerate(self.names) if name in inside]
        families = {
            partition: {f: left for f, m in one.items() if (left := _only(m, inside))}
            for partition, one in self.families.items()
        }
        return replace(
            self,
            names=tuple(inside),
            delta_f=self.delta_f[index],
            log_prior=self.log_prior[index].log_softmax(0),
            families=families,
            kept={name: t[index] for name, t in self.kept.items()},
            means={name: t[index] for name, t in self.means.items()},
            variances={name: t[index] for name, t in self.variances.items()},
        )

    def masks(self, model: str) -> dict[str, Tensor]:
        """Return what a model keeps, by site, as a selection of `reduce` would.

        Parameters
        ----------
        model : str
            Its name.

        Returns
        -------
        dict of Tensor
            Boolean: ``reduce(guide, select=lambda scores: found.masks(found.best))``.
        """
        i = self._find(model)
        return {name: kept[i] for name, kept in self.kept.items()}

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per model, the most probable ones first.

        Returns
        -------
        DataFrame
            Indexed by model; columns ``kept`` (how many elements), ``delta_f`` in nats, ``prior``,
            ``probability``, and one per partition with the family of the model.
        """
        import pandas as pd

        count = sum(
            (k.reshape(len(k), -1).sum(1) for k in self.kept.values()), torch.zeros_like(self.prior)
        )
        columns = {
            "kept": count.long(),
            "delta_f": self.delta_f,
            "prior": self.prior,
            "probability": self.probability,
        }
        data: dict[str, Any] = {name: column.cpu().numpy() for name, column in columns.items()}
        for partition, families in self.families.items():
            of_model = {model: family for family, models in families.items() for model in models}
            data[partition] = [of_model[model] for model in self.names]
        frame = pd.DataFrame(data, index=pd.Index(self.names, name="model"))
        return frame.sort_values("probability", ascending=False, kind="stable")

    def family_summary(self) -> pd.DataFrame:
        """Return a table with one row per family.

        Returns
        -------
        DataFrame
            Indexed by partition and family; columns ``models`` (how many), ``prior`` and
            ``probability``.
        """
        import pandas as pd

        prior = self._sum_families(self.prior)
        rows = [
            (partition, family, len(models), prior[partition][family], probability)
            for partition, families in self.families.items()
            for (family, models), probability in zip(
                families.items(), self.family_probability[partition].values(), strict=True
            )
        ]
        columns = ["partition", "family", "models", "prior", "probability"]
        return pd.DataFrame(rows, columns=columns).set_index(["partition", "family"])

    def parameters(self, model: str | None = None) -> pd.DataFrame:
        """Return a table with one row per element of the sites that can be reduced.

        Parameters
        ----------
        model : str, optional
            Of which to list the moments; the average over all of them by default.

        Returns
        -------
        DataFrame
            Indexed by element; columns ``full mean`` and ``full sd``, ``mean`` and ``sd``, and
            ``presence``, the probability that it is present.
        """
        import pandas as pd

        mean, variance, presence = self.mean, self.variance, self.presence
        if model is not None:
            i = self._find(model)
            mean = {name: t[i] for name, t in self.means.items()}
            variance = {name: t[i] for name, t in self.variances.items()}
            presence = {name: t[i].double() for name, t in self.kept.items()}
        columns = {
            "full mean": self.full_mean,
            "full sd": {name: t.sqrt() for name, t in self.full_variance.items()},
            "mean": mean,
            "sd": {name: t.sqrt() for name, t in variance.items()},
            "presence": presence,
        }
        index = pd.Index(self.elements, name="element")
        data = {name: self.flatten(column).cpu().numpy() for name, column in columns.items()}
        return pd.DataFrame(data, index=index)

    @cached_property
    def elements(self) -> list[str]:
        """The names of the elements of the sites that can be reduced, in order."""
        shapes = {n: shape for n, shape in self.layout.shapes.items() if n in self.kept}
        return list(Layout(shapes, self.layout.labels).elements())

    def flatten(self, by_site: Mapping[str, Tensor]) -> Tensor:
        """Bring tensors by site into the order of `elements`.

        Parameters
        ----------
        by_site : mapping
            By site, of its shape, maybe with leading dimensions.

        Returns
        -------
        Tensor
            With the elements along the last dimension.
        """
        names = [name for name in self.layout.shapes if name in self.kept]
        lead = {n: by_site[n].dim() - len(self.layout.shapes[n]) for n in names}
        parts = [by_site[n].reshape(*by_site[n].shape[: lead[n]], -1) for n in names]
        return torch.cat(parts, -1) if parts else torch.zeros_like(self.prior[:0])

    def __rich__(self) -> Group:
        table = Table("model", title=self._title, title_justify="left", caption=self._rest)
        for column in ("kept", "ΔF (nats)", "prior", "P"):
            table.add_column(column, justify="right")
        for partition in self.families:
            table.add_column(partition)
        for name, row in self.summary().head(_ROWS).iterrows():
            numbers = f"{row['delta_f']:+,.2f}", f"{row['prior']:.3g}", f"{row['probability']:.3f}"
            families = [str(row[partition]) for partition in self.families]
            table.add_row(str(name), f"{row['kept']:,.0f}", *numbers, *families)
        if not self.families:
            return Group(table)
        below = Table("partition", "family")
        for column in ("models", "prior", "P"):
            below.add_column(column, justify="right")
        for one in self.family_summary().reset_index().itertuples():
            numbers = f"{one.models:,}", f"{one.prior:.3g}", f"{one.probability:.3f}"
            below.add_row(str(one.partition), str(one.family), *numbers)
        return Group(table, below)

    def _frames(self) -> dict[str, pd.DataFrame]:
        frames = {self._title: self.summary().head(_ROWS).round({"delta_f": 2, "probability": 3})}
        return frames | ({"families": self.family_summary().round(3)} if self.families else {})

    @property
    def _notes(self) -> tuple[str, ...]:
        return (self._rest,) if self._rest else ()

    @property
    def _title(self) -> str:
        probable = float(self.probability.max())
        return f"{len(self):,} models, of which {self.best!r} has P = {probable:.3f}"

    @property
    def _rest(self) -> str | None:
        rest = len(self) - _ROWS
        return f"and {rest:,} less probable ones" if rest > 0 else None

    def _find(self, model: str) -> int:
        check_kind("model", model, str, "the name of a model")
        if model not in self.names:
            refuse_name("model", model, self.names, "a model,")
        return self.names.index(model)

    def _partition_of(self, family: str) -> str:
        found = [name for name, families in self.families.items() if family in families]
        if not found:
            known = dict.fromkeys(f for families in self.families.values() for f in families)
            refuse_name("family", family, known, "a family,")
        if len(found) > 1:
            refuse("family", family, f"of which partition, as in {{{found[0]!r}: {family!r}}}")
        return found[0]

    def _sum_families(self, weight: Tensor) -> dict[str, dict[str, float]]:
        of_model = dict(zip(self.names, weight.tolist(), strict=True))
        return {
            partition: {
                family: sum(of_model[one] for one in models) for family, models in families.items()
            }
            for partition, families in self.families.items()
        }


# Models that are printed, and what the probability of one may be that has no say in an interval.
_ROWS, _NEGLIGIBLE = 20, 1e-12


def _average(weight: Tensor, values: Tensor) -> Tensor:
    return torch.tensordot(weight, values, 1)


def _only(models: tuple[str, ...], inside: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(model for model in models if model in inside)
