"""Draws of a model and its guide: what they hold to be true, and what they predict."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.arguments.checks import read_count, read_seed
from pyro_bmr.diagnostics.drawn_sites import (
    SiteKinds,
    check_whole,
    describe,
    find_counted,
    read_axes,
    read_values,
    sort_sites,
)
from pyro_bmr.diagnostics.summed_sites import find_couplings, sum_out, warn_of_prior_draws
from pyro_bmr.display import warn
from pyro_bmr.guides.guide_reader import left_alone
from pyro_bmr.programs.batched_draws import LargestTensor, evaluate
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.enumeration import Enumeration, find_enumerated, refuse_by_name
from pyro_bmr.programs.given_values import ValueMessenger, refuse
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.site_kinds import check_data_shapes, is_latent


@torch.inference_mode(False)
@torch.no_grad()
def draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    *,
    seed: int = 0,
) -> Draws:
    r"""Draw from the guide, and run the model at each draw.

    .. math:: \theta_s \sim q(\theta), \quad \ln p(y_i \mid \theta_s), \quad
              \tilde y_s \sim p(y \mid \theta_s)

    All draws are taken at once, by `torch.vmap`, in chunks that bound the memory. The model, the
    guide, the param store and the random number generators are left as they were. The draws of the
    guide do not depend on the model. A latent site that it does not hold is drawn from the model,
    with a warning if there are data, unless the model marks it by ``infer={"enumerate":
    "parallel"}``: then log probabilities, means and probabilities of classes are summed over it.

    A guide that was never called, or has no site of the model or one of another shape, is a
    ValueError, as is a plate that takes a part of the data.

    The scale of `poutine.scale` is not in the log probabilities, nor are `pyro.factor` statements,
    which have no data. Where a mask is False, a log probability is 0.
    """
    num_samples, seed = read_count("num_samples", num_samples), read_seed(seed)
    kwargs = dict(kwargs or {})

    def run_guide(_: Any = None) -> Trace:
        return poutine.trace(guide).get_trace(*args, **kwargs)

    def run_model(values: Mapping[str, Tensor]) -> Trace:
        with ValueMessenger(values, refuse("the same, so pass the data of the training")):
            return poutine.trace(model).get_trace(*args, **kwargs)

    def run_enumerated(enumeration: Enumeration, values: Mapping[str, Tensor]) -> Trace:
        with ValueMessenger(values):
            return poutine.trace(enumeration(model)).get_trace(*args, **kwargs)

    with dry_run(model, guide), torch.no_grad():
        torch.manual_seed(seed)
        with left_alone(guide, model):
            with explained_refusals(model, guide, args, kwargs):
                held = _values(run_guide())
                with LargestTensor() as seen:
                    first = run_model(held)
                    check_data_shapes(first.nodes)
                    enumeration = find_enumerated(first, held)
                    with refuse_by_name(enumeration):
                        summed = run_enumerated(enumeration, held)
                        sum_out(summed, enumeration)
            kinds = sort_sites(first, held.keys())
            _check(kinds, first, held, enumeration.sites)
            warn_of_prior_draws(summed, enumeration)
            values = evaluate(
                lambda _: read_values(run_guide(), kinds.latent),
                {"draw": torch.arange(num_samples, device="cpu")},
                largest=sum(held[name].numel() for name in kinds.latent),
                seed=seed,
                what="guide",
            )
        # What the model makes of a value that was not drawn under its masks.
        changed = [n for n in kinds.latent if not torch.equal(first.nodes[n]["value"], held[n])]

        def read(drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
            one = _read(run_model(drawn), kinds, changed)
            if enumeration.sites:
                summed = sum_out(run_enumerated(enumeration, drawn), enumeration)
                one |= {key: tensor.reshape(one[key].shape) for key, tensor in summed.items()}
            return one

        found = evaluate(
            read,
            values,
            largest=seen.elements,
            seed=seed + 1,
            what="model",
        )
    return _assemble(first, kinds, values, found, find_couplings(summed, enumeration))


@dataclass(frozen=True, eq=False)
class Observed:
    """An observed site at S draws.

    The data ``value`` have the shape ``(*batch, *event)``, and so has ``counted``, False what a
    mask leaves out; ``log_prob`` in nats ``(S, *batch)``; ``mean``, None if there is none, and
    ``draws`` from the posterior predictive distribution ``(S, *batch, *event)``;
    ``probabilities`` of K classes ``(S, *batch, K)``, if it is Categorical or Bernoulli.
    ``coupling`` says why its rows are not independent given the draws, where they are not:
    ``log_prob`` is then of each by itself.
    """

    value: Tensor
    log_prob: Tensor
    mean: Tensor | None
    probabilities: Tensor | None
    draws: Tensor
    counted: Tensor | None = None
    coupling: str | None = None

    @property
    def rows(self) -> Tensor:
        """By datum, on the CPU, whether a mask leaves any of it."""
        size = self.log_prob[0].numel()
        if self.counted is None:
            return torch.ones(size, dtype=torch.bool, device="cpu")
        return self.counted.reshape(size, -1).any(-1).cpu()


@dataclass(frozen=True, eq=False)
class Draws:
    """The sites of a model at S draws, by name and in its order, of shape ``(S, *site)``.

    ``predicted`` ones, without data or posterior, are drawn from the model. ``axes`` has the
    plate of each axis of a site, None for an axis without one.
    """

    latent: Mapping[str, Tensor]
    observed: Mapping[str, Observed]
    deterministic: Mapping[str, Tensor] = field(default_factory=dict)
    predicted: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    supports: Mapping[str, constraints.Constraint] = field(default_factory=dict)


def _values(trace: Trace) -> dict[str, Tensor]:
    check_whole(trace, "guide")
    return {name: node["value"] for name, node in trace.nodes.items() if is_latent(node)}


def _check(
    kinds: SiteKinds, trace: Trace, held: Mapping[str, Tensor], summed: Collection[str]
) -> None:
    check_whole(trace, "model")
    if not kinds.latent:
        msg = (
            f"the guide has the sites {sorted(held)}, of which the model has none: it has "
            f"{list(kinds.predicted)}. Expected a model and its guide"
        )
        raise ValueError(msg)
    unknown = [name for name in kinds.predicted if name not in summed]
    if kinds.observed and unknown:
        warn(
            f"the guide does not hold the latent sites {unknown}, which are drawn "
            "from the model, given what the guide draws: as if the data told nothing more of them"
        )


def _read(trace: Trace, kinds: SiteKinds, changed: list[str]) -> dict[str, Tensor]:
    """Take from a run of the model what is wanted of each draw."""
    nodes = trace.nodes
    found = read_values(trace, (*changed, *kinds.deterministic, *kinds.predicted))
    for name in kinds.observed:
        node = nodes[name]
        what = describe(node["fn"], node["value"], node["mask"])
        found |= {f"{name} {key}": tensor for key, tensor in what.items()}
    return found


def _assemble(
    first: Trace,
    kinds: SiteKinds,
    values: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    couplings: Mapping[str, str],
) -> Draws:
    def observed(name: str) -> Observed:
        node, density = first.nodes[name], found[f"{name} log_prob"]
        value = torch.as_tensor(node["value"], device=density.device)
        mean = found.get(f"{name} mean")
        return Observed(
            value=value.detach().expand(node["fn"].shape()),
            log_prob=density,
            mean=None if mean is None or not mean.isfinite().all() else mean,
            probabilities=found.get(f"{name} probabilities"),
            draws=found[f"{name} draws"],
            counted=find_counted(node["fn"], node["mask"]),
            coupling=couplings.get(name),
        )

    names = (*kinds.latent, *kinds.deterministic, *kinds.observed, *kinds.predicted)
    return Draws(
        latent={name: found.get(name, values[name]) for name in kinds.latent},
        observed={name: observed(name) for name in kinds.observed},
        deterministic={name: found[name] for name in kinds.deterministic},
        predicted={name: found[name] for name in kinds.predicted},
        axes={name: read_axes(first.nodes[name]) for name in names},
        supports={name: find_support(first.nodes[name]["fn"]) for name in kinds.latent},
    )
