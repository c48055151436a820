r"""Discrete sites that are summed out, as `pyro.infer.TraceEnum_ELBO` does.

A model marks them by ``infer={"enumerate": "parallel"}``, and its guide does not sample them. The
model is run at all of their values at once, each site along an axis of its own, left of all plates;
what has such axes is summed by message passing (Obermeyer et al. 2019, "Tensor variable elimination
for plated factor graphs", arXiv:1902.03210).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmr.programs.scales import read_scale


@dataclass(frozen=True)
class Enumeration:
    """The sites of a model that are summed out; ``nesting`` axes belong to plates and batches."""

    sites: frozenset[str]
    nesting: int

    def __call__(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """Let a model take all values of these sites at once."""
        if not self.sites:
            return model
        return _EnumMessenger(-1 - self.nesting)(poutine.infer_config(model, self._configure))

    def _configure(self, site: Any) -> dict[str, Any]:
        how = "parallel" if site["name"] in self.sites else None
        return {"enumerate": how, "num_samples": None}


def find_enumerated(trace: Trace, held: Collection[str]) -> Enumeration:
    """Find the sites to sum out in a run of a model, given the sites that its guide holds."""
    nodes = dict(sample_statements(trace))
    sites = frozenset(
        name for name, node in nodes.items() if name not in held and is_enumerated(node)
    )
    plates = [-f.dim for n in nodes.values() for f in n["cond_indep_stack"] if f.vectorized]
    batches = [len(node["fn"].batch_shape) for node in nodes.values()]
    return Enumeration(sites, max([*plates, *batches], default=0))


def is_enumerated(node: Mapping[str, Any]) -> bool:
    """Tell whether a model marks a site as one to be summed out."""
    marked = node["infer"].get("enumerate") == "parallel"
    return marked and not node["is_observed"] and node["fn"].has_enumerate_support


class _EnumMessenger(EnumMessenger):
    def _pyro_post_sample(self, msg: Any) -> None:
        # It reads only the shape of a value, in a way that torch.vmap does not allow.
        super()._pyro_post_sample(
            {**msg, "value": torch.zeros((), device="cpu").expand(msg["value"].shape)}
        )


def sample_statements(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Yield what is drawn or observed in a trace, without what only looks like it."""
    for name, node in trace.nodes.items():
        if (
            node["type"] == "sample"
            and not site_is_subsample(node)
            and not node["infer"].get("_deterministic", False)
        ):
            yield name, node


@contextmanager
def refuse_by_name(enumeration: Enumeration) -> Iterator[None]:
    """Raise a ValueError that names the sites where Pyro cannot sum them out."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if not enumeration.sites:
            raise
        msg = (
            f"the discrete sites {sorted(enumeration.sites)} cannot be summed out "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Expected a model that "
            "takes all of their values at once, along axes left of its plates, as for "
            "pyro.infer.TraceEnum_ELBO; or a mixture that is written out, as in "
            "dist.MixtureSameFamily"
        )
        raise ValueError(msg) from error


def find_mixtures(trace: Trace, enumeration: Enumeration) -> list[SummedSites]:
    """Find what is summed out together in a run of an enumerated model.

    Where an axis of a log density has no plate, or a site outside of a plate depends on one that is
    summed out inside, a ValueError names the site.
    """  # noqa: DOC201, DOC501
    if not enumeration.sites:
        return []
    trace.symbolize_dims()
    sizes = {
        trace.plate_to_symbol[frame.name]: frame.size
        for _, node in sample_statements(trace)
        for frame in node["cond_indep_stack"]
        if frame.vectorized
    }
    groups: list[dict[str, _Term]] = []
    for name, term in _find_terms(trace, enumeration):
        joined = [g for g in groups if any(term.axes & one.axes for one in g.values())]
        merged = {n: one for group in joined for n, one in group.items()}
        groups = [g for g in groups if g not in joined] + [merged | {name: term}]
    for group in groups:
        _check_plates(group)
    return [SummedSites(group, enumeration.nesting, trace.symbol_to_dim, sizes) for group in groups]


def sum_log_likelihood(trace: Trace, enumeration: Enumeration) -> Tensor:
    """Add up the log likelihood of a run, with its scales and masks."""
    mixtures = find_mixtures(trace, enumeration)
    mixed = {name for mixture in mixtures for name in mixture.terms}
    parts = [mixture.sum_out()[1].double() for mixture in mixtures]
    for name, node in sample_statements(trace):
        if node["is_observed"] and name not in mixed:
            density = node["fn"].log_prob(node["value"])
            parts.append(scale_and_mask(density, node["scale"], node["mask"]).sum().double())
    return torch.stack(parts).sum()


@dataclass(frozen=True, eq=False)
class SummedSites:
    """Sites whose log densities are summed out together, by message passing."""

    terms: Mapping[str, _Term]
    nesting: int
    symbol_to_dim: Mapping[str, int]
    plate_sizes: Mapping[str, int]

    def sum_out(self) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\ln p(\theta)` and :math:`\ln p(y \mid \theta)` of its sites, scaled."""
        scale = self._scale()
        hidden = {name: term for name, term in self.terms.items() if not term.is_observed}
        whole = scale * self._contract(self.terms, frozenset(), frozenset())
        if all(term.is_enumerated for term in hidden.values()):
            return torch.zeros_like(whole), whole
        prior = scale * self._contract(hidden, frozenset(), frozenset())
        return prior, whole - prior

    def log_weights(self, site: str) -> Tensor:
        r"""Return :math:`\ln p(k \mid \theta)` of what an observed site depends on.

        The axes of ``k`` come before those of plates.
        """
        term = self.terms[site]
        hidden = {name: one for name, one in self.terms.items() if not one.is_observed}
        joint = packed.unpack(self._contract(hidden, term.plates, term.axes), self.symbol_to_dim)
        axes = tuple(range(joint.dim() - self.nesting))
        return joint - joint.logsumexp(axes, keepdim=True)

    def describe_coupling(self, site: str) -> str | None:
        """Say why the rows of an observed site are not independent given θ, if they are not."""
        others = [n for n, term in self.terms.items() if term.is_observed and n != site]
        if others:
            return f"{site!r} depends on the same summed-out sites as {others}"
        sizes = self.plate_sizes
        shared = [
            name
            for name, term in self.terms.items()
            if term.is_enumerated
            and any(sizes[plate] > 1 for plate in self.terms[site].plates - term.plates)
        ]
        return f"rows of {site!r} share the summed-out sites {shared}" if shared else None

    def keeps_rows_apart(self, rows: Collection[int]) -> bool:
        """Tell whether rows are independent given θ; axes of their sizes are taken for rows."""
        summed = {
            size
            for term in self.terms.values()
            for axis, size in zip(term.log_density._pyro_dims, term.log_density.shape, strict=True)
            if axis in term.axes
        }
        observed = [name for name, term in self.terms.items() if term.is_observed]
        return summed.isdisjoint(rows) and not any(map(self.describe_coupling, observed))

    def _contract(
        self, terms: Mapping[str, _Term], plates: frozenset[str], axes: frozenset[str]
    ) -> Tensor:
        """Sum out all axes but some, after the product over all plates but some."""
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for term in terms.values():
            tree.setdefault(term.plates, []).append(term.log_density)
        summed = {axis for term in terms.values() for axis in term.axes}
        ring = _EliminationRing(dim_to_size=self.plate_sizes)
        return contract_to_tensor(tree, summed, plates, set(axes), ring=ring)

    def _scale(self) -> float:
        scales = {name: term.scale for name, term in self.terms.items()}
        first = next(iter(scales.values()))
        if any(scale.dim() or scale != first for scale in scales.values()):
            told = {name: scale.tolist() for name, scale in scales.items()}
            msg = (
                f"sites that are summed out together have the scales {told}. Expected the same "
                "number for all of them: put a site of each row into the plate of the rows, and "
                "take no batch_size, and no sub-sampling plate, where all rows share one"
            )
            raise ValueError(msg)
        return float(first)


@dataclass(frozen=True, eq=False)
class _Term:
    """A log density of a site, packed and masked; with the symbols of its plates and axes."""

    log_density: Any
    plates: frozenset[str]
    axes: frozenset[str]
    own_axis: str | None
    is_observed: bool
    scale: Tensor

    @property
    def is_enumerated(self) -> bool:
        return self.own_axis is not None


class _EliminationRing(LogRing):
    """Sums out one axis after the other, cheap ones first, in steps that torch.vmap follows."""

    def sumproduct(self, terms: Sequence[Any], dims: Collection[str]) -> Any:
        ahead, left = list(terms), sorted(dims)
        while left:
            axis = min(left, key=lambda one: len(_join_axes(_with_axis(ahead, one))))
            left.remove(axis)
            product = _add_up(_with_axis(ahead, axis))
            message = product.logsumexp(product._pyro_dims.index(axis))
            message._pyro_dims = product._pyro_dims.replace(axis, "")
            ahead = [term for term in ahead if axis not in term._pyro_dims] + [message]
        return _add_up(ahead)


def _with_axis(terms: Iterable[Any], axis: str) -> list[Any]:
    return [term for term in terms if axis in term._pyro_dims]


def _join_axes(terms: Iterable[Any]) -> set[str]:
    return {axis for term in terms for axis in term._pyro_dims}


def _add_up(terms: Sequence[Any]) -> Any:
    """Add packed tensors."""
    terms = packed.broadcast_all(*terms)
    total = reduce(torch.add, terms)
    total._pyro_dims = terms[0]._pyro_dims
    return total


def _find_terms(trace: Trace, enumeration: Enumeration) -> Iterator[tuple[str, _Term]]:
    """Find the log densities that have an axis of what is summed out."""
    for name, node in sample_statements(trace):
        symbols, shape = node["infer"]["_dim_to_symbol"], _batch_shape(node)
        used = {dim - len(shape) for dim, size in enumerate(shape) if size > 1}
        if not used <= symbols.keys():
            msg = (
                f"the log density of the site {name!r} has the shape {tuple(shape)}, of which some "
                f"axes have no plate, where {sorted(enumeration.sites)} are summed out. Expected "
                "pyro.plate around axes that are independent, or .to_event(); and a site that "
                "depends on those that are summed out inside of their plates"
            )
            raise ValueError(msg)
        own_axis = node["infer"].get("_enumerate_symbol") if name in enumeration.sites else None
        axes = frozenset(symbols[dim] for dim in used if dim < -enumeration.nesting)
        if own_axis or axes:
            log_density = node["fn"].log_prob(node["value"])
            if not own_axis:
                # A mask on a site that is summed out would count its values.
                log_density = scale_and_mask(log_density, mask=node["mask"])
            plates = frozenset(s for dim, s in symbols.items() if dim >= -enumeration.nesting)
            terms = packed.pack(log_density, symbols), plates, axes, own_axis
            yield name, _Term(*terms, node["is_observed"], read_scale(node))


def _batch_shape(node: Mapping[str, Any]) -> torch.Size:
    value = node["value"]
    rows = value.shape[: value.dim() - node["fn"].event_dim]
    return torch.broadcast_shapes(node["fn"].batch_shape, rows, np.shape(node["mask"]))


def _check_plates(terms: Mapping[str, _Term]) -> None:
    for name, term in terms.items():
        for other, one in terms.items():
            if term.own_axis in one.axes and not term.plates <= one.plates:
                msg = (
                    f"{other!r} depends on the summed-out site {name!r}, but is not in all of its "
                    f"plates. Expected {other!r} inside of the plates of {name!r}"
                )
                raise ValueError(msg)
