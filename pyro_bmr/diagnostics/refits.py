"""Training a copy of a model and its guide, of which nothing is left afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bmr.programs.dry_run import dry_run, find_modules

Refit = Callable[[Any, Any], Any]
"""Trains a model and its guide in place."""


@contextmanager
def trained_copy(refit: Refit, model: Any, guide: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    """Train copies, and put back what they share with the originals.

    That is the param store, the random number generators, and whatever parameters a model function
    refers to, which a copy of it refers to as well.
    """
    store = pyro.get_param_store()
    modules = [module for program in (model, guide) for module in find_modules(program)]
    shared: list[Tensor] = [parameter for _, parameter in store.named_parameters()]
    shared += [parameter for module in modules for parameter in module.parameters()]
    before = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in shared]
    with dry_run(model, guide), torch.inference_mode(False):
        pyro.set_rng_seed(seed)
        pair = copy.deepcopy((model, guide))
        try:
            refit(*pair)
            yield pair
        finally:
            with torch.no_grad():
                for tensor, value, grad in before:
                    tensor.copy_(value)
                    tensor.grad = grad
