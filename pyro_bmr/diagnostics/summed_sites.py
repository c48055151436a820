"""What a model that sums out discrete sites tells of its observations."""

from __future__ import annotations

from collections.abc import Iterator

from pyro.distributions import Unit
from pyro.poutine import Trace
from torch import Tensor

from pyro_bmr.diagnostics.drawn_sites import describe
from pyro_bmr.display import warn
from pyro_bmr.programs.enumeration import Enumeration, SummedSites, find_mixtures


def find_couplings(trace: Trace, enumeration: Enumeration) -> dict[str, str]:
    """By observed site, say why its rows are not independent given θ, where they are not."""
    found = {
        name: mixture.describe_coupling(name) for name, mixture in _observed(trace, enumeration)
    }
    return {name: reason for name, reason in found.items() if reason}


def warn_of_prior_draws(trace: Trace, enumeration: Enumeration) -> None:
    """Warn if a guide knows more of the discrete sites that predictions are drawn with."""
    for name, mixture in _observed(trace, enumeration):
        hidden = {n: term for n, term in mixture.terms.items() if not term.is_observed}
        telling = [n for n, term in hidden.items() if not term.is_enumerated]
        if telling:
            drawn = [n for n in hidden if n not in telling]
            warn(
                f"draws of {name!r} take {drawn} from their prior, though {telling}, which the "
                "guide holds, tell of them; log likelihoods and means take that into account"
            )


def sum_out(trace: Trace, enumeration: Enumeration) -> dict[str, Tensor]:
    r"""Sum what `describe` tells of observations over the values of discrete sites.

    .. math:: p(y_i \mid \theta) = \sum_k p(k \mid \theta) \, p(y_i \mid k, \theta)

    By site and what it is; of draws nothing. Axes of length 1 may come first.
    """
    found = {}
    for name, mixture in _observed(trace, enumeration):
        node, weights = trace.nodes[name], mixture.log_weights(name)
        told = describe(node["fn"], node["value"], node["mask"])
        joint = weights + told["log_prob"]
        found[f"{name} log_prob"] = joint.logsumexp(_leading(joint, enumeration.nesting))
        event_dim = node["fn"].event_dim
        for what, trailing in (("mean", event_dim), ("probabilities", event_dim + 1)):
            if what in told:
                chances = weights.exp().reshape(weights.shape + (1,) * trailing)
                parts = chances * told[what]
                found[f"{name} {what}"] = parts.sum(_leading(parts, enumeration.nesting + trailing))
    return found


def _leading(tensor: Tensor, others: int) -> tuple[int, ...]:
    return tuple(range(tensor.dim() - others))


def _observed(trace: Trace, enumeration: Enumeration) -> Iterator[tuple[str, SummedSites]]:
    for mixture in find_mixtures(trace, enumeration):
        for name, term in mixture.terms.items():
            if term.is_observed and not isinstance(trace.nodes[name]["fn"], Unit):
                yield name, mixture
