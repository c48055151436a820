"""What a process has once, and an interrupt leaves changed where a block of it begins or ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch._C import _functorch, _len_torch_function_stack, _pop_torch_function_stack
from torch.nn.modules.module import _global_forward_pre_hooks


@dataclass(frozen=True)
class ProcessState:
    """Handlers and plates of Pyro, modes and hooks of torch, at one time."""

    handlers: list[Any]
    plates: list[Any]
    validation: bool
    gradients: bool
    levels: int
    modes: int
    hooks: frozenset[int]

    @classmethod
    def now(cls) -> ProcessState:
        """Read it."""
        return cls(
            list(_PYRO_STACK),
            list(_DIM_ALLOCATOR._stack),
            pyro.distributions.is_validation_enabled(),
            torch.is_grad_enabled(),
            _functorch.get_dynamic_layer_stack_depth(),
            _len_torch_function_stack(),
            frozenset(_global_forward_pre_hooks),
        )

    def restore(self) -> None:
        """End what has begun since."""
        # First, since what is left of these is asked about the rest.
        while _len_torch_function_stack() > self.modes:
            _pop_torch_function_stack()
        _PYRO_STACK[:] = self.handlers
        _DIM_ALLOCATOR._stack[:] = self.plates
        if pyro.distributions.is_validation_enabled() != self.validation:
            pyro.enable_validation(self.validation)
        torch.set_grad_enabled(self.gradients)
        while _functorch.get_dynamic_layer_stack_depth() > self.levels:
            _functorch._vmap_decrement_nesting()
        for hook in _global_forward_pre_hooks.keys() - self.hooks:
            del _global_forward_pre_hooks[hook]
