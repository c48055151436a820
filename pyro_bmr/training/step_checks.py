"""Whether a step that was traced or compiled is that of the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pyro import poutine
from torch import Tensor

from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.training.adam import AdamState, shorten, update
from pyro_bmr.training.compilation import FixedNoise, NotStaticError
from pyro_bmr.training.feeds import Cut
from pyro_bmr.training.precision import full_precision
from pyro_bmr.training.step_functions import StepFunction, StepMaker

_TOLERANCE = 1e-5
# Of updates. A compiler rounds otherwise, and a ReLU that thereby opens moves gradients by more.
_COMPILED_TOLERANCE = 1e-3
# So high that the update is most of what is compared.
_RATE = 1e3
_STEPS = 3


def check_traced(maker: StepMaker, traced: StepFunction, state: AdamState, cut: Cut) -> None:
    """Raise a `NotStaticError` if a step is not Pyro's; what is in the state is lost."""
    of_loss, of_update = _compare(maker, traced, state, cut)
    if not (of_loss <= _TOLERANCE and of_update <= _TOLERANCE):
        msg = (
            f"the traced step differs from Pyro's by {of_loss:.1e} in the loss and "
            f"{of_update:.1e} in the update, relatively. Does the program change between steps?"
        )
        raise NotStaticError(msg)


def check_compiled(maker: StepMaker, compiled: StepFunction, state: AdamState, cut: Cut) -> None:
    """Raise a `NotStaticError` if rounding does not explain how a step differs from Pyro's."""
    of_loss, of_update = _compare(maker, compiled, state, cut)
    # The loss is a sum over all elements, whose rounding depends on the order of summation.
    count = sum(len(vector) for vector in state.values)
    rounding = torch.finfo(state.steps.dtype).eps * count**0.5
    if not (of_loss <= max(_TOLERANCE, rounding) and of_update <= _COMPILED_TOLERANCE):
        msg = (
            f"the compiled step differs from the traced one by {of_loss:.1e} in the loss and "
            f"{of_update:.1e} in the update, relatively, which rounding does not explain"
        )
        raise NotStaticError(msg)


def _compare(
    maker: StepMaker, function: StepFunction, state: AdamState, cut: Cut
) -> tuple[float, float]:
    """Compare a step with Pyro's, with the same noise; relative errors of loss and update."""
    loss, feed = maker.loss, maker.loss.feed
    rate, found = (state.steps.new_full((), number) for number in (_RATE, 0.0))
    with poutine.block(), dry_run(loss.model.model, loss.guide), full_precision():
        noise = torch.randn(function.noise_size, device="cpu").to(state.values[0])
        torch.manual_seed(0)
        with maker.ranks.together(), FixedNoise(function.gradient, noise):
            expected = loss(*feed.batch(feed.inputs(cut)))
        *gradients, expected = _differentiate(maker, expected)
        _begin(maker, state, gradients)
        torch.manual_seed(0)
        with torch.no_grad():
            inputs = maker.read(function.gradient, noise, cut)
            function.step(*state.tensors, found, rate, *inputs)
    data = loss.batches.tensors.values()
    # Each row adds about a nat to the loss, and rows of either sign can add up to nothing.
    most_rows = max((len(tensor) for tensor in data if tensor.dim()), default=1)
    of_loss = (found - expected).abs() / expected.abs().clamp(min=most_rows)
    errors = [float(of_loss), *_compare_updates(maker, state, gradients, rate)]
    # Of the rank with the largest ones, so that all go on in the same way.
    worst = torch.tensor(maker.ranks.gather(errors), device="cpu").amax(0)
    return float(worst[0]), float(worst[1:].amax())


def _differentiate(maker: StepMaker, loss: Tensor) -> Sequence[Tensor]:
    """Return the gradient and the loss, averaged over ranks."""
    parameters = list(maker.parameters.values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    named = dict(zip(maker.parameters, gradients, strict=True))
    return maker.ranks.average([*maker.layout.join(named), loss.detach()])


@torch.no_grad()
def _begin(maker: StepMaker, state: AdamState, gradients: Sequence[Tensor]) -> None:
    """Go to after some steps, from where a gradient moves all parameters."""
    state.begin(maker.layout.join(maker.detached()))
    state.steps.fill_(_STEPS)
    for square, spread in zip(state.squares, _spread(gradients), strict=True):
        square.copy_(spread)


def _spread(gradients: Sequence[Tensor]) -> Iterator[Tensor]:
    """Return squares of the size of the gradient: smaller ones would blow up rounding."""
    top = torch.stack([gradient.norm(torch.inf) for gradient in gradients]).max().square()
    generator = torch.Generator(top.device).manual_seed(0)
    for gradient in gradients:
        yield torch.empty_like(gradient).uniform_(0.5, 1.5, generator=generator).mul_(top)


@torch.no_grad()
def _compare_updates(
    maker: StepMaker, state: AdamState, gradients: Sequence[Tensor], rate: Tensor
) -> Iterator[float]:
    """Return the relative errors of parameters, and of both means."""
    values = maker.layout.join(maker.detached())
    shortened, steps = shorten(gradients, maker.clip_norm), state.steps.new_full((), _STEPS + 1)
    differences, sizes = [], []
    for i, (value, spread) in enumerate(zip(values, _spread(gradients), strict=True)):
        expected = update(value, torch.zeros_like(value), spread, shortened[i], rate, steps)
        moved = state.values[i], state.means[i], state.squares[i]
        differences.append([(a - b).abs().max() for a, b in zip(moved, expected, strict=True)])
        sizes.append([one.abs().max() for one in expected])
    for difference, size in zip(_largest(differences), _largest(sizes), strict=True):
        yield float(difference / size.clamp(min=1e-30))


def _largest(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows]).amax(0)
