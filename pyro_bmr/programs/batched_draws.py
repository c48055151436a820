"""A function of one draw, evaluated at all draws at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pyro_bmr.display import warn

_Tensors = dict[str, Tensor]


def evaluate(
    function: Callable[[Mapping[str, Tensor]], _Tensors],
    inputs: Mapping[str, Tensor],
    *,
    largest: int,
    seed: int,
    what: str,
) -> _Tensors:
    """Evaluate a function at many draws, by `torch.vmap` in chunks that bound the memory.

    Inputs and results have a leading axis for the draws; ``largest`` counts the elements of the
    largest tensors of one draw. Where `torch.vmap` cannot follow the function, which ``what``
    names, the draws are taken one after the other, with a warning. All random number generators
    are seeded anew: call it in a dry run.
    """
    total = len(next(iter(inputs.values())))
    size = min(total, max(1, _CHUNK // max(1, largest)))
    torch.manual_seed(seed)
    results: _Tensors = {}
    run = _all_at_once(function)
    for start in range(0, total, size):
        part = {name: value[start : start + size] for name, value in inputs.items()}
        try:
            found = run(part)
        except Exception as error:
            run = _one_by_one(function)
            found = run(part)
            warn(
                f"the {what} runs once for each draw, which is slow, because torch.vmap cannot "
                f"follow it ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Expected "
                "operations that do not depend on the values of tensors, such as "
                "torch.where(x > 0, a, b) in the place of if x > 0, and batch norm in eval mode"
            )
        for name, value in found.items():
            if name not in results:
                results[name] = value.new_empty((total, *value.shape[1:]))
            results[name][start : start + size] = value
    return results


def evaluate_at_once(
    function: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], count: int
) -> Tensor:
    """Evaluate a function so many times by `torch.vmap`, with random numbers of its own each.

    ``inputs`` have a leading axis of that length.
    """
    batched = _all_at_once(lambda one: {"": function(one)})
    return batched({**inputs, "": torch.zeros(count, device="cpu")})[""]


class LargestTensor(TorchFunctionMode):
    """Watches how many elements the largest tensor has that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


# Elements of all draws of a chunk together, 16 MiB in float32; several such tensors live at once.
_CHUNK = 2**22


def _all_at_once(
    function: Callable[[Mapping[str, Tensor]], _Tensors],
) -> Callable[[Mapping[str, Tensor]], _Tensors]:
    # Memory of its own for every constant is needed seldom, and costs.
    ways = [_batched(function, makers) for makers in (_UNFILLED, _UNFILLED | _FILLED)]

    def run(inputs: Mapping[str, Tensor]) -> _Tensors:
        random_state = get_rng_state()
        try:
            return ways[0](inputs)
        except Exception as error:
            set_rng_state(random_state)
            try:
                found = ways[-1](inputs)
            except Exception:
                raise error from None
            del ways[0]
            return found

    return run


def _batched(
    function: Callable[[Mapping[str, Tensor]], _Tensors], makers: Collection[Any]
) -> Callable[[Mapping[str, Tensor]], _Tensors]:
    def one(inputs: Mapping[str, Tensor], any_draw: Tensor) -> _Tensors:
        with _OwnMemory(any_draw, makers):
            return function(inputs)

    batched = torch.vmap(one, randomness="different")

    def run(inputs: Mapping[str, Tensor]) -> _Tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return batched(inputs, torch.zeros(len(next(iter(inputs.values()))), device="cpu"))

    return run


class _OwnMemory(TorchFunctionMode):
    """Gives every draw memory of its own where a tensor is made to be filled in place.

    So distributions of torch make their random numbers, and `pyro.distributions.OrderedLogistic`
    its probabilities, which `torch.vmap` refuses to write into memory that all draws share. It
    refuses ``x.data``, too, by which Pyro adds a jitter in `pyro.distributions.GaussianHMM`.
    """

    def __init__(self, any_draw: Tensor, makers: Collection[Any]) -> None:
        super().__init__()
        self.any_draw, self.makers = any_draw, makers

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        result = func(*args, **(kwargs or {}))
        if func not in self.makers:
            return result
        of_each = self.any_draw.to(result.device).expand(result.shape)
        own = torch.empty_like(of_each, dtype=result.dtype, memory_format=torch.contiguous_format)
        return own if func in _UNFILLED else own.copy_(result)


_UNFILLED = {torch.empty, torch.empty_like, Tensor.new, Tensor.new_empty}

_FILLED = {
    *(torch.zeros, torch.ones, torch.full, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.clone, torch.clone),
}

_DATA = cast(Any, Tensor.data).__get__


def _one_by_one(
    function: Callable[[Mapping[str, Tensor]], _Tensors],
) -> Callable[[Mapping[str, Tensor]], _Tensors]:
    def run(inputs: Mapping[str, Tensor]) -> _Tensors:
        names = list(inputs)
        rows = zip(*inputs.values(), strict=True)
        found = [function(dict(zip(names, row, strict=True))) for row in rows]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    return run
