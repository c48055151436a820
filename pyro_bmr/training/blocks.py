"""So many steps of training at a time, on tensors that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.display import warn
from pyro_bmr.training.feeds import Cut

# Compiled code takes tensors for aligned to so many bytes.
_ALIGNED = 16

# Makes the inputs of a step from the place of its loss, its rate, its noise and its batch.
Arrange = Callable[[Tensor, Tensor, Tensor, Cut], Sequence[Tensor]]


class Block:
    """Steps on batches of one size, which on a GPU are launched once for all, as a CUDA graph.

    A step is a function of tensors that changes what it moves in place. Batches, rates and noise
    are copied to where it reads them. ``noise`` has a row for each step that there may be.
    """

    def __init__(
        self, step: Callable[..., Any], arrange: Arrange, count: int, cut: Cut, noise: Tensor
    ) -> None:
        self._step = step
        self.count = count
        self._rates, self._losses = (_repeat(noise.new_zeros(()), count) for _ in range(2))
        self._cuts = [_repeat(tensor, count).unbind() for tensor in cut]
        cuts = zip(*self._cuts, strict=True)
        slots = zip(self._losses, self._rates, noise[:count], cuts, strict=True)
        self._inputs = [arrange(*slot) for slot in slots]
        self._replay: Callable[[], Any] | None = None

    @torch.no_grad()
    def run(self, cuts: Sequence[Cut], rates: Tensor) -> Tensor:
        """Take a step for each of some batches, with the noise that is there."""
        count = len(cuts)
        self._rates[:count] = rates
        for places, tensors in zip(self._cuts, zip(*cuts, strict=True), strict=True):
            torch._foreach_copy_(places[:count], tensors)
        if self._replay is not None and count == self.count:
            self._replay()
        else:
            self.take_steps(count)
        return self._losses[:count].clone()

    @torch.no_grad()
    def take_steps(self, count: int) -> None:
        """Take the first so many steps on what is there, a pure function of static tensors."""
        for inputs in self._inputs[:count]:
            self._step(*inputs)

    @torch.no_grad()
    def capture(self) -> None:
        """Launch the steps as one from now on; they must move nothing while this is prepared."""
        try:
            with torch.cuda.device(self._losses.device):
                graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                # Libraries set themselves up for each stream when they are first called.
                with torch.cuda.stream(stream):
                    self.take_steps(1)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.take_steps(self.count)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            warn(f"each step is launched by itself, which is slower: {reason}")
        else:
            self._replay = graph.replay


def can_capture(device: torch.device) -> bool:
    """Whether steps on this device can be launched as one."""
    return device.type == "cuda"


def _repeat(tensor: Tensor, count: int) -> Tensor:
    """Stack so many copies of a tensor, each of which is aligned."""
    every = max(1, _ALIGNED // tensor.element_size())
    size = math.ceil(max(1, tensor.numel()) / every) * every
    rows = tensor.new_zeros(count, size)[:, : tensor.numel()]
    rows[:] = tensor.reshape(1, -1)
    return rows.unflatten(1, tensor.shape) if tensor.dim() else rows[:, 0]
