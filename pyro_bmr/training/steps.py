"""What steps of training are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.training.feeds import Cut, Feed

# Squares of larger parameters overflow in float32.
HUGE = 1e18


@dataclass(frozen=True)
class Loss:
    """The free energy as a function of a batch, in nats."""

    elbo: ELBO
    model: BatchModel
    guide: Callable[..., Any]
    feed: Feed

    @property
    def batches(self) -> Batches:
        """The arguments, or an example of them."""
        return self.feed.batches

    def __call__(self, *batch: Tensor) -> Tensor:
        """Estimate F, to be differentiated, on a batch as of `Feed.batch`."""
        args, kwargs = self.batches.arguments(batch)
        return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class Steps(ABC):
    """Steps of training that move the parameters of a guide."""

    steps_done = 0
    _loss: Loss
    _ranks: Ranks

    @abstractmethod
    def run(self, cuts: Iterable[Cut], rates: Sequence[float]) -> Tensor:
        """Take a step for each batch, and return the losses; cuts are those of a `Feed`.

        The guide is left with what came of them, or with what it was before if that is not finite.
        """

    @abstractmethod
    def renew_noise(self) -> None:
        """Draw from where torch's generator is now on."""

    @abstractmethod
    def verify(self) -> None:
        """Warn if the steps no longer are those of the program."""

    @abstractmethod
    def pack(self) -> dict[str, Any]:
        """Describe where the steps are, as plain data."""

    @abstractmethod
    def go_on_from(self, packed: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Go to where other steps were, of any kind; what does not fit raises a ValueError."""

    def _fail(self, step: int, culprits: Sequence[str], known: str = "") -> FloatingPointError:
        blown = f"{list(culprits)} blew up" if culprits else "no parameter is out of range"
        missing = self._loss.batches.describe_missing()
        found = f"; there are {missing}, which the model has to mask" if missing else ""
        return FloatingPointError(
            "the loss or its gradient became NaN or infinite at step "
            f"{self.steps_done + step}; {blown}. The guide was left in its last finite state"
            f"{known}. Expected finite losses: try a smaller lr, clip_norm=, a smaller init_scale "
            f"of the guide, or look for extreme values in the data{found}"
        )


def blown_up(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that are not finite, or too large to square."""
    return [name for name, tensor in tensors.items() if not (tensor.abs() < HUGE).all()]
