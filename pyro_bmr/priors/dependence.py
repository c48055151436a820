"""Which sites a prior depends on, in value and not in the graph of its computation alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_bmr.programs.model_runs import ModelRuns, find_gradients, find_tensors

# How far a parent is moved, at least once in each direction, in unconstrained coordinates.
_REACHES = (1.0, 10.0)


def find_parents(
    runs: ModelRuns,
    priors: Mapping[str, Any],
    leaves: Mapping[str, Tensor],
    candidates: Mapping[str, Collection[str]],
) -> dict[str, tuple[str, ...]]:
    """Leave out candidates at whose values, wherever they are, a prior is the same.

    ``priors`` are distributions of a run at ``leaves``. A gradient that is not zero proves a
    dependence; where there is none, the model runs at other values of the candidate.
    """
    proven = {name: _have_gradients(priors[name], leaves) for name in candidates}
    doubtful = sorted({c for name, them in candidates.items() for c in {*them} - proven[name]})
    changed: dict[str, set[str]] = {name: set() for name in candidates}
    with runs.elsewhere() as run:
        here = run({}) if doubtful else {}
        for candidate in doubtful:
            children = {name for name, them in candidates.items() if candidate in them}
            for values in _move(runs.locations[candidate][1]):
                rerun = partial(run, {candidate: values})
                for name in _find_changed(here, children, rerun):
                    changed[name].add(candidate)
    return {
        name: tuple(sorted(c for c in them if c in proven[name] | changed[name]))
        for name, them in candidates.items()
    }


def _have_gradients(fn: Any, leaves: Mapping[str, Tensor]) -> set[str]:
    return {
        name
        for tensor in find_tensors(fn)
        for name, gradient in find_gradients(tensor, leaves).items()
        if gradient.any()
    }


def _move(location: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    for reach in _REACHES:
        step = reach * (0.5 + torch.rand(location.shape, generator=generator, device="cpu")).to(
            location
        )
        yield location + step
        yield location - step


def _find_changed(
    here: Mapping[str, Any], names: Collection[str], run: Callable[[], Mapping[str, Any]]
) -> set[str]:
    """Compare priors with those of another run; all have changed if it fails."""
    try:
        there = run()
    except Exception:
        return set(names)
    return {name for name in names if not _are_same(here[name]["fn"], there[name]["fn"])}


def _are_same(one: Any, other: Any) -> bool:
    tensors, others = ([detach_provenance(t) for t in find_tensors(fn)] for fn in (one, other))
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))
