"""Putting back what a change that failed half-way has done to a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state

from pyro_bmr.programs.dry_run import find_modules
from pyro_bmr.programs.overwriting import overwrite


def remember(*programs: Any) -> Callable[[], None]:
    """Return what puts everything back as it is now.

    That is: the tensors of models or guides, the param store, and the random number generators.
    """
    store = pyro.get_param_store()
    entries, generators = store.get_state(), get_rng_state()
    modules = [module for program in programs for module in find_modules(program)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [tensor for _, tensor in store.named_parameters()]
    before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors}

    def undo() -> None:
        for tensor, value in before.values():
            if not torch.equal(tensor, value):
                overwrite(tensor, value)
        store.clear()
        store.set_state(entries)
        set_rng_state(generators)

    return undo


@contextmanager
def undone_on_error(*programs: Any) -> Iterator[None]:
    """If what follows fails or is interrupted, put everything back as it was; see `remember`."""
    undo = remember(*programs)
    try:
        yield
    except BaseException:
        undo()
        raise
