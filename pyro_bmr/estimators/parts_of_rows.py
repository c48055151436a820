"""How the rows of a program can be measured in parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.dry_run import dry_run, find_modules
from pyro_bmr.programs.enumeration import find_enumerated, sum_log_likelihood
from pyro_bmr.programs.pairs import Pair
from pyro_bmr.programs.site_kinds import is_latent, is_likelihood

# Estimates that are made at once.
BLOCK = 4
# Rows are split if there are so many batches; fewer save little, and leave much to chance.
FEWEST_PARTS = 8


def find_plates(pair: Pair, whole: Batches, batch_size: int) -> dict[str, tuple[int, int]]:
    """Find sub-sampling plates: by name, the number of rows and how many they take.

    A model that has none of them among the rows of a few batches is not run on all, which may
    not fit.
    """
    rows = FEWEST_PARTS * batch_size
    # A guide that was never called would learn its shapes from the few rows.
    if count_rows(whole) > rows and all(map(_was_called, find_modules(pair[1]))):
        # What fails with fewer rows than there are is tried with all of them.
        with suppress(Exception), _WholePlates(rows):
            few = Batches(whole.args, whole.kwargs, batch_size)
            _trace_plates(pair, *few.arguments(few.take(slice(rows))))
            return {}
    return _trace_plates(pair, whole.args, whole.kwargs)


def count_rows(whole: Batches) -> int:
    """Return how many rows all tensors among the arguments have; 0 if these differ."""
    lengths = {len(t) if t.dim() else 0 for t in whole.tensors.values()}
    return lengths.pop() if len(lengths) == 1 else 0


def count_parts(rows: int, batch_size: int) -> int:
    """Return into how many parts so many rows are split; a block of estimates has a batch."""
    if rows < FEWEST_PARTS * batch_size:
        return 1
    return math.ceil(rows / math.ceil(rows / (BLOCK * math.ceil(rows / batch_size))))


def adds_up(pair: Pair, everything: Batches) -> bool:
    """Tell whether the parts of the log likelihood at one draw have the whole as their mean.

    Of few rows: what ties rows together does so in these.
    """
    size = everything.batch_size or 1
    rows = size * min(FEWEST_PARTS, everything.size // size)
    args, kwargs = everything.arguments(everything.take(slice(rows)))
    batches = Batches(args, kwargs, size)
    batch_model = BatchModel(pair[0], batches)
    with dry_run(*pair):
        guide = poutine.trace(pair[1]).get_trace(*args, **kwargs)

        def log_likelihood(model: Any, args: Any, kwargs: Any) -> Tensor:
            def run(model: Any) -> Trace:
                replayed = poutine.replay(model, trace=guide)
                return poutine.trace(replayed).get_trace(*args, **kwargs)

            trace = run(model)
            enumeration = find_enumerated(trace, guide.nodes)
            if enumeration.sites:
                trace = run(enumeration(model))
            return sum_log_likelihood(trace, enumeration)

        whole = log_likelihood(pair[0], args, kwargs)
        parts = torch.arange(rows, device="cpu").split(size)
        mean = sum(
            log_likelihood(batch_model, *batches.arguments(batches.take(part))) for part in parts
        ) / len(parts)
    return bool(torch.isclose(torch.as_tensor(mean, device=whole.device), whole, rtol=1e-4))


class _WholePlates(Messenger):
    """Raises a ValueError at a plate of more rows than so many, or that takes a part of them.

    Before its indices are used: on a GPU those beyond the rows could not be caught.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            size = msg["fn"].size
            if size > self._rows or (msg["fn"].subsample_size or size) < size:
                raise ValueError(msg["name"])


def _trace_plates(
    pair: Pair, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    with dry_run(*pair):
        guide = poutine.trace(pair[1]).get_trace(*args, **kwargs)
        replayed = poutine.replay(pair[0], trace=guide)
        model = poutine.trace(replayed).get_trace(*args, **kwargs)
    sites = {name: site for name, site in model.nodes.items() if site["type"] == "sample"}
    if not any(map(is_likelihood, sites.values())):
        latent = (name for name, site in sites.items() if is_latent(site))
        unheld = ", ".join(repr(name) for name in latent if name not in guide.nodes)
        asked = f"did you forget to pass the data for {unheld}? " if unheld else ""
        msg = (
            f"the model observes nothing with these arguments; {asked}its sites are {sorted(sites)}"
        )
        raise ValueError(msg)
    fns = {name: site["fn"] for name, site in sites.items() if site_is_subsample(site)}
    taken = {name: (int(fn.size), int(fn.subsample_size or fn.size)) for name, fn in fns.items()}
    return {name: sizes for name, sizes in taken.items() if sizes[1] < sizes[0]}


def _was_called(module: Any) -> bool:
    return not isinstance(module, AutoGuide) or module.prototype_trace is not None
