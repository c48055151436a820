"""Running a model so that nothing outside remembers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from inspect import getclosurevars, isfunction
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_bmr.programs.overwriting import overwrite


@contextmanager
def dry_run(*programs: Any) -> Iterator[None]:
    """Put back what models or guides change while they run.

    That is: the param store, the random number generators, and the buffers of modules.
    """
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(module: torch.nn.Module, _args: Any = None) -> None:
        for buffer in module.buffers():
            if id(buffer) not in before:
                before[id(buffer)] = buffer, buffer.detach().clone()

    for module in (module for program in programs for module in find_modules(program)):
        remember(module)
    random_state, store = get_rng_state(), pyro.get_param_store()
    entries = store.get_state()
    # Modules that a program finds in other ways are seen when they run.
    hook = register_module_forward_pre_hook(remember)

    def put_back() -> None:
        hook.remove()
        store.clear()
        store.set_state(entries)
        set_rng_state(random_state)
        for buffer, value in before.values():
            overwrite(buffer, value)

    try:
        with torch.random.fork_rng(), torch.enable_grad(), pyro.validation_enabled(False):
            yield
    finally:
        try:
            put_back()
        except KeyboardInterrupt:
            put_back()
            raise


def unconstrained_parameters(trace: Any) -> dict[str, Tensor]:
    """Return what an optimiser moves, by parameter, from a trace with ``param_only=True``.

    A tensor that has two names, as those of AutoIAFNormal, is moved once.
    """
    parameters = {name: node["value"].unconstrained() for name, node in trace.nodes.items()}
    names = {id(tensor): name for name, tensor in reversed(parameters.items())}
    return {name: parameters[name] for name in reversed(names.values())}


def find_tensors(run: Callable[[], Any], programs: Iterable[Any]) -> dict[str, Tensor]:
    """Return what training changes: the parameters of a run, and buffers of modules in programs."""
    programs = tuple(programs)
    with (
        dry_run(*programs),
        torch.no_grad(),
        poutine.block(),
        poutine.trace(param_only=True) as traced,
    ):
        run()
        parameters = unconstrained_parameters(traced.trace)
    modules = {id(module): module for one in programs for module in find_modules(one)}
    buffers = {
        f"buffer {i} {name}": buffer
        for i, module in enumerate(modules.values())
        for name, buffer in module.named_buffers()
    }
    return parameters | buffers


def find_modules(program: Any) -> list[torch.nn.Module]:
    """Find the outermost modules that a program is, is a method of, wraps, or refers to."""
    found, seen, ahead = [], set(), [program]
    while ahead:
        this = ahead.pop()
        if id(this) in seen or not callable(this) or isinstance(this, type):
            continue
        seen.add(id(this))
        if isinstance(this, torch.nn.Module):
            found.append(this)
            # A model of this package that wraps a function.
            ahead.append(vars(this).get("model"))
            continue
        ahead += [getattr(this, name, None) for name in ("func", "__wrapped__")]
        owner = getattr(this, "__self__", None)
        ahead += [owner, *vars(owner).values()] if hasattr(owner, "__dict__") else []
        ahead += getattr(this, "args", ())
        if isfunction(this):
            with suppress(ValueError):  # a variable that has no value yet
                variables = getclosurevars(this)
                ahead += variables.nonlocals.values()
                ahead += [v for v in variables.globals.values() if isinstance(v, torch.nn.Module)]
    return found


def check_owned(name: str, own: Tensor) -> None:
    """Raise a ValueError if the param store differs from a module's own unconstrained parameter."""
    name = name.removesuffix("_unconstrained")
    entries: dict[str, Tensor] = dict(pyro.get_param_store().named_parameters())
    stored = entries.get(name, own)
    local = pyro.settings.get("module_local_params")
    if not (local or stored is own or torch.equal(stored, own)):
        msg = (
            f"the guide's parameter {name!r} differs from the entry of that name in Pyro's param "
            "store: another guide of that name was trained, or a store was loaded. Expected them "
            "to agree: call the guide once to take the values of the store, or "
            "pyro.clear_param_store() to keep those of the guide"
        )
        raise ValueError(msg)
