"""That a smaller program computes what the masked one does."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from pyro_bmr.display import a_or_an
from pyro_bmr.graphs.operations import is_random
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import ValueMessenger, take_rows
from pyro_bmr.programs.model_runs import find_tensors
from pyro_bmr.programs.scales import read_scale
from pyro_bmr.programs.site_kinds import is_deterministic, is_reparameterized
from pyro_bmr.programs.sites import Indices, take
from pyro_bmr.programs.wrappers import ModelWrapper

_NUM_DRAWS = 3
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}

_Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def check_same(
    masked: Any,
    compacted: Any,
    guide: Any,
    kept: Mapping[str, Indices],
    calls: tuple[_Arguments, _Arguments],
) -> None:
    """Compare two programs at the posterior's median and at draws; RuntimeError if they differ.

    That is in what they return, in what they observe, or in a prior: of sites that are cut, in what
    is ``kept``. The guide is that of the masked program; ``calls`` are the arguments of each.
    """
    with dry_run(masked, compacted, guide), torch.no_grad():
        for what, values in _places(guide, calls[0]):
            smaller = {n: take(v, kept[n]) if n in kept else v for n, v in values.items()}
            expected = dict(_read(masked, values, calls[0], kept))
            try:
                found = dict(_read(compacted, smaller, calls[1], {}))
            except Exception as error:
                first = _find_first(error)
                reason = str(first).partition("\nTrace Shapes")[0].strip()
                msg = (
                    f"the compacted model does not run: {type(first).__name__} in "
                    f"{_find_place(first)} ({reason}). Expected a program whose sizes follow from "
                    "its tensors, or are written out in calls of torch functions such as view and "
                    "zeros. A module that compares its input with sizes of its own, or a "
                    "distribution that is expanded to written sizes, "
                    "cannot be made smaller: write it otherwise, or leave the units of that layer "
                    "whole when reducing"
                )
                raise RuntimeError(msg) from error
            for name, value in expected.items():
                _compare(name, what, value, found.get(name))


def _places(guide: Any, call: _Arguments) -> Iterator[tuple[str, dict[str, Tensor]]]:
    args, kwargs = call
    median = getattr(guide, "median", dict)
    yield "at the posterior's median", dict(median())
    for number in range(_NUM_DRAWS):
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
    model: Any, values: Mapping[str, Tensor], call: _Arguments, kept: Mapping[str, Indices]
) -> Iterator[tuple[str, Tensor]]:
    """Run a model and read what it is for; of the priors of sites that are cut, what is left."""
    args, kwargs = call
    pyro.set_rng_seed(0)
    with _SteadyNoise(), ValueMessenger(values, take_rows):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if is_reparameterized(node) and not is_deterministic(node):
            yield f"the log density of the site {name!r}", node["fn"].log_prob(node["value"]).sum()
        elif name not in values:
            for number, tensor in enumerate(find_tensors(node["fn"])):
                yield f"the distribution of the site {name!r} ({number})", tensor
        else:
            fn = node["fn"]
            while isinstance(fn, Independent):
                fn = fn.base_dist
            density = fn.log_prob(node["value"])
            indices = kept.get(name, ())
            if name in kept and density.dim() + fn.event_dim == len(indices):
                density = take(density, indices[: density.dim()])
            yield f"the prior of the site {name!r}", density
            yield f"the scale of the site {name!r}", read_scale(node)
    returned = pytree.tree_leaves(trace.nodes["_RETURN"]["value"])
    for number, tensor in enumerate(t for t in returned if isinstance(t, Tensor)):
        if not any(tensor is value for value in values.values()):
            yield f"what the model returns ({number})", tensor


class _SteadyNoise(TorchDispatchMode):
    """Makes the noise of dropout and its like the same for all units, however many they are."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_random(func):
            return result
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(result[1])
        return result.fill_(0.5) if name.rstrip("_") in _NOISE else result


_NOISE = {
    *("bernoulli", "rand", "randn", "rand_like", "randn_like", "uniform", "normal", "dropout"),
    *("exponential", "poisson", "_standard_gamma"),
}


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
    if not same_elsewhere or not error <= _TOLERANCE.get(expected.dtype, 1e-5) * scale:
        _fail(name, what, f"an error of {float(error):.3g}, at values of up to {float(scale):.3g}")


def _find_first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _find_place(error: BaseException) -> str:
    """Name the innermost module that ran, or the line of the program."""
    place = "the model"
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and not isinstance(module, ModelWrapper):
            place = a_or_an(module)
        elif not frame.f_globals.get("__name__", "").startswith(("torch", "pyro")):
            place = f"{frame.f_code.co_filename}, line {line}"
    return place


def _fail(name: str, what: str, difference: str) -> None:
    msg = (
        f"the compacted model does not compute what the masked one does: {what}, {name} has "
        f"{difference}. Nothing was returned. This is a fault of the package, or of a program that "
        "does other things when its tensors have other sizes; please report the model"
    )
    raise RuntimeError(msg)
