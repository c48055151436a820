"""How far positive posteriors are from their priors, and what that says of setting them to zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Gamma, LogNormal
from typing_extensions import override

from pyro_bmr.factors.centering import value_locations
from pyro_bmr.factors.factor import Divergence, Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.mathematics.first_order import accuracy_of_gamma, accuracy_of_log_normal
from pyro_bmr.priors.all_rows import read_in_all_rows, take_seen
from pyro_bmr.priors.expected_priors import draw_parents
from pyro_bmr.priors.families import UnreadablePriorError
from pyro_bmr.programs.distributions import find_core
from pyro_bmr.programs.model_runs import ModelRuns
from pyro_bmr.programs.positive_divergences import divergence


def read_divergences(
    runs: ModelRuns, factors: Sequence[Factor], parents: Mapping[str, Collection[str]]
) -> tuple[dict[str, Divergence], dict[str, str]]:
    """Measure posteriors from their priors, in expectation over the posterior of their parents.

    ``parents`` are, by site, those that its prior depends on. Also returned is, by site, why it has
    no divergence.
    """
    if not parents:
        return {}, {}
    holders = {f.sites[0].name: _HELD[type(f)](f) for f in factors if f.sites[0].name in parents}
    places = list(draw_parents(factors, parents)) or [{}]
    totals: dict[str, list[Tensor]] = {}
    zero = torch.zeros((), dtype=torch.float64)
    failures: dict[str, str] = {}
    with runs.elsewhere() as run:
        for place in places:
            nodes = run(place)
            for name in holders.keys() - failures.keys():
                read = partial(holders[name].differentiate, name)
                try:
                    terms = read_in_all_rows(name, nodes, partial(run, place), read)
                except (NotImplementedError, UnreadablePriorError) as error:
                    failures[name] = str(error)
                    continue
                totals[name] = [
                    total + one / len(places)
                    for total, one in zip(totals.get(name, [zero] * 3), terms, strict=True)
                ]
    found = {
        name: Divergence(total[0], holders[name].accuracy(*total[1:]))
        for name, total in totals.items()
        if name not in failures
    }
    return found, failures


class _Held(ABC):
    """A posterior as a function of two parameters, which it is differentiated by."""

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = [one.detach().double() for one in parameters]

    @abstractmethod
    def posterior(self, first: Tensor, second: Tensor, /) -> LogNormal | Gamma:
        """Return the posterior at other parameters."""

    @abstractmethod
    def accuracy(self, first: Tensor, second: Tensor, /) -> Tensor:
        """Return what the log likelihood falls by without an element, from its slopes."""

    def differentiate(self, name: str, nodes: Mapping[str, Any]) -> list[Tensor]:
        """Return KL(q ‖ p) of each element in a run, and its slopes by the parameters."""
        with torch.enable_grad():
            seen = (take_seen(one, name, nodes) for one in self.parameters)
            leaves = [one.clone().requires_grad_() for one in seen]
            value = divergence(self.posterior(*leaves), find_core(nodes[name]["fn"]))
            slopes = torch.autograd.grad(value.sum(), leaves)
        return [value.detach(), *slopes]


class _LogNormal(_Held):
    def __init__(self, factor: IndependentFactor) -> None:
        name = factor.site.name
        loc, kept = value_locations(factor)[name], factor.kept()[name]
        super().__init__(loc.where(kept, 0), factor.stored.scale)

    @override
    def posterior(self, loc: Tensor, scale: Tensor) -> LogNormal:
        return LogNormal(loc, scale)

    @override
    def accuracy(self, d_loc: Tensor, d_scale: Tensor) -> Tensor:
        return accuracy_of_log_normal(d_loc, d_scale, self.parameters[1])


class _Gamma(_Held):
    def __init__(self, factor: GammaFactor) -> None:
        super().__init__(factor.mean.log(), factor.concentration.log())

    @override
    def posterior(self, log_mean: Tensor, log_concentration: Tensor) -> Gamma:
        concentration = log_concentration.exp()
        return Gamma(concentration, (log_concentration - log_mean).exp())

    @override
    def accuracy(self, d_log_mean: Tensor, d_log_concentration: Tensor) -> Tensor:
        return accuracy_of_gamma(d_log_mean, d_log_concentration, self.parameters[1].exp())


_HELD: Any = {IndependentFactor: _LogNormal, GammaFactor: _Gamma}
