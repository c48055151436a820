"""Sizes that a program writes out: ``h.view(batch, 8)``, ``torch.zeros(batch, 16)``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

CallHandler = Callable[[Any, tuple[Any, ...], Mapping[str, Any], str], Any]
"""From a torch function, its arguments and the place of the call to its result."""


class SizedCalls(TorchFunctionMode):
    """Sees the calls in which a program says sizes, in order.

    Those that Pyro makes itself, as when it expands a distribution to its plates, are passed over,
    so that two runs of a program with distributions of other shapes see the same calls. What
    ``call`` returns is the result; it may call the function with other arguments.
    """

    def __init__(self, call: CallHandler) -> None:
        super().__init__()
        self.call = call

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        if _says_sizes(func, args, kwargs):
            caller = _find_caller()
            module = caller.f_globals.get("__name__", "")
            if not module.startswith(_PASSED_OVER):
                code = caller.f_code
                where = f"{module}:{code.co_firstlineno}:{code.co_name}:{caller.f_lasti}"
                return self.call(func, args, kwargs, where)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class SizedCall:
    """A call in which the program says or checks sizes, at a place (``where``) in the program.

    Tensors among its arguments are left out (None): ``operands`` are their nodes in the graph,
    ``nodes`` those of the results.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    where: str

    @property
    def checks_sizes(self) -> bool:
        """Whether it is of `torch.nn.RNN`, LSTM or GRU, which check sizes before they call it."""
        module = self.where.partition(":")[0]
        return module == nn.modules.rnn.__name__ and self.function.__name__ in RECURRENT


# Attention with its body in sight of the mode, which else sees the call as a whole.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

_SHAPING = {
    "view",
    "reshape",
    "expand",
    "unflatten",
    "repeat",
    "tile",
    "broadcast_to",
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    "tensor_split",
    "hsplit",
    "vsplit",
    "dsplit",
    "narrow",
    "resize_",
    "as_strided",
    "repeat_interleave",
}

MAKING = {
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "normal",
    "eye",
    "arange",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}

_CONVOLUTIONS = {
    getattr(F, f"conv{transpose}{n}d") for transpose in ("", "_transpose") for n in (1, 2, 3)
}

_NORMS = {F.layer_norm, F.group_norm, F.rms_norm}

RECURRENT = {"rnn_tanh", "rnn_relu", "lstm", "gru"}


def _says_sizes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if func in _NORMS:
        return True
    if func in _CONVOLUTIONS:
        return kwargs.get("groups", args[6] if len(args) > 6 else 1) != 1
    if func in {Tensor.__getitem__, Tensor.__setitem__}:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, slice) for part in index)
    return getattr(func, "__name__", "") in _SHAPING | MAKING | RECURRENT


# Torch's own Python between a call in the program and the mode.
_PASSED_THROUGH = {"torch._tensor", "torch.functional", "torch.overrides", "torch.utils._device"}

_PASSED_OVER = ("pyro.", "torch.distributions.")

_PACKAGE = __name__.partition(".")[0] + "."


def _find_caller() -> Any:
    frame: Any = sys._getframe(1)
    while _is_between(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def _is_between(module: str) -> bool:
    # What this package runs a program in stands in its packages; its modules may hold programs.
    own = module.startswith(_PACKAGE) and module.count(".") > 1
    return own or module in _PASSED_THROUGH
