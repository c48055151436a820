"""That a smaller program computes what the masked one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.priors.model_runs import find_tensors
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.sites import Indices, take

NUM_DRAWS = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def check_same(
    masked: Any,
    compacted: Any,
    guide: Any,
    kept: Mapping[str, Indices],
    calls: tuple[Arguments, Arguments],
) -> None:
    """Compare two programs at the posterior's median and at draws.

    Parameters
    ----------
    masked, compacted : callable
        The models.
    guide : callable
        Of the masked one.
    kept : mapping
        By site that is cut, what is left of it.
    calls : tuple
        Arguments and keyword arguments of each.

    Raises
    ------
    RuntimeError
        If the compacted model does not run, or something that it returns, observes or has as a
        prior differs.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> model = lambda: pyro.sample("y", dist.Normal(0.0, 1.0))
    >>> check_same(model, model, lambda: None, {}, (((), {}), ((), {})))
    """
    with dry_run(masked, compacted, guide), torch.no_grad():
        for what, values in _places(guide, calls[0]):
            smaller = {n: take(v, kept[n]) if n in kept else v for n, v in values.items()}
            expected = dict(_read(masked, values, calls[0], kept))
            try:
                found = dict(_read(compacted, smaller, calls[1], {}))
            except Exception as error:
                msg = (
                    f"the compacted model does not run ({type(error).__name__}: {error}). Expected "
                    "a program whose sizes follow from its tensors, or are written out in calls of "
                    "torch functions such as view and zeros; a module that compares its input with "
                    "sizes of its own cannot be made smaller. Prune without compacting, or leave "
                    "the units of that layer whole"
                )
                raise RuntimeError(msg) from error
            for name, value in expected.items():
                _compare(name, what, value, found.get(name))


def _places(guide: Any, call: Arguments) -> Iterator[tuple[str, dict[str, Tensor]]]:
    args, kwargs = call
    median = getattr(guide, "median", dict)
    yield "at the posterior's median", dict(median())
    for number in range(NUM_DRAWS):
        pyro.set_rng_seed(number)
        nodes = poutine.trace(guide).get_trace(*args, **kwargs).nodes
        yield (
            "at a draw of the posterior",
            {
                name: node["value"]
                for name, node in nodes.items()
                if node["type"] == "sample"
                and not node["infer"].get("is_auxiliary")
                and not site_is_subsample(node)
            },
        )


def _read(
    model: Any, values: Mapping[str, Tensor], call: Arguments, kept: Mapping[str, Indices]
) -> Iterator[tuple[str, Tensor]]:
    """Run a model and read what it is for; of the priors of sites that are cut, what is left."""
    args, kwargs = call
    pyro.set_rng_seed(0)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if name not in values:
            for number, tensor in enumerate(find_tensors(node["fn"])):
                yield f"the distribution of the site {name!r} ({number})", tensor
        else:
            fn = node["fn"]
            while isinstance(fn, Independent):
                fn = fn.base_dist
            density = fn.log_prob(node["value"])
            if name in kept and density.dim() == len(kept[name]):
                density = take(density, kept[name])
            yield f"the prior of the site {name!r}", density
            yield f"the scale of the site {name!r}", torch.as_tensor(node["scale"])
    returned = pytree.tree_leaves(trace.nodes["_RETURN"]["value"])
    for number, tensor in enumerate(t for t in returned if isinstance(t, Tensor)):
        if not any(tensor is value for value in values.values()):
            yield f"what the model returns ({number})", tensor


def _compare(name: str, what: str, expected: Tensor, found: Tensor | None) -> None:
    if found is None or found.shape != expected.shape:
        shape = None if found is None else tuple(found.shape)
        _fail(name, what, f"the shape {shape} instead of {tuple(expected.shape)}")
        return
    if not expected.is_floating_point():
        if not torch.equal(expected, found):
            _fail(name, what, "other values")
        return
    if not expected.numel():
        return
    finite = expected.isfinite()
    same_elsewhere = torch.equal(expected[~finite], found[~finite].to(expected))
    scale = expected[finite].abs().amax() if finite.any() else expected.new_zeros(())
    error = (expected - found)[finite].abs().amax() if finite.any() else expected.new_zeros(())
    if not same_elsewhere or not error <= TOLERANCE.get(expected.dtype, 1e-5) * scale:
        _fail(name, what, f"an error of {float(error):.3g}, at values of up to {float(scale):.3g}")


def _fail(name: str, what: str, difference: str) -> None:
    msg = (
        f"the compacted model does not compute what the masked one does: {what}, {name} has "
        f"{difference}. Nothing was returned. This is a fault of the package, or of a program that "
        "does other things when its tensors have other sizes; please report the model"
    )
    raise RuntimeError(msg)
