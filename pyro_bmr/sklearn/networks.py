"""Networks of dense layers as Pyro models, and what they say of new rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from torch import Tensor, nn

from pyro_bmr.conversion.bayesian import bayesianize
from pyro_bmr.conversion.weight_priors import fan_in_normal
from pyro_bmr.guides.auto_gamma import mean_field

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
# Standard deviations of posteriors before training.
_START = 0.05
# Of the precision's Gamma prior: as much as a sum of squares of 0.02 in standardised targets.
_RATE = 0.01
# Of activations that are held at a time, over rows, draws and the units of a layer.
_MOST_NUMBERS = 20_000_000


def dense_layers(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Make layers called ``hidden1``, ``hidden2`` ... and ``output``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (inputs, outputs) in enumerate(zip(sizes[:-2], sizes[1:-1], strict=True), 1):
        layers[f"hidden{i}"] = nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32)
        layers[f"activation{i}"] = ACTIVATIONS[activation]()
    layers["output"] = nn.Linear(sizes[-2], sizes[-1], device="cpu", dtype=torch.float32)
    return nn.Sequential(layers)


@dataclass(frozen=True)
class Network(ABC):
    """A Pyro model of rows, their targets and the weights of a network."""

    plain: nn.Sequential
    bayesian: Any
    # Of the prior of weights, on the scale of what the network puts out.
    usual_scale: ClassVar[float] = 1.0

    @classmethod
    def of(cls, sizes: Sequence[int], activation: str, prior_scale: float | None) -> Network:
        """Make one with the prior of `fan_in_normal`."""
        plain = dense_layers(sizes, activation)
        prior = fan_in_normal(cls.usual_scale if prior_scale is None else prior_scale)
        return cls(plain, bayesianize(plain, prior=prior))

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what the network puts out, and observe the targets."""

    def make_guide(self) -> AutoGuide:
        """Return one with an independent posterior for every weight."""
        return AutoNormal(self, init_loc_fn=init_to_sample, init_scale=_START)

    def outputs(self, x: Tensor, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Return ``(draws, rows, outputs)`` at draws of the weights, some rows at a time."""
        names = [name for name, _ in self.plain.named_parameters()]
        chosen = {name: weights[name].to(x) for name in names}
        widest = max(max(value.shape[1:]) for value in chosen.values())
        each = max(1, _MOST_NUMBERS // (len(chosen[names[0]]) * widest))
        for rows in x.split(each):
            yield torch.vmap(
                lambda one, rows=rows: torch.func.functional_call(self.plain, one, (rows,))
            )(chosen)


class RegressionNetwork(Network):
    """Normal targets around one output, with a precision that is learned."""

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean of each row."""
        mean = self.bayesian(x).squeeze(-1)
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(1.0), x.new_tensor(_RATE)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)
        return mean

    def make_guide(self) -> AutoGuide:
        """Return one with a Gamma posterior of the precision."""
        one = torch.ones((), device="cpu", dtype=torch.float32)
        start = init_to_value(values={"precision": one}, fallback=init_to_sample)
        return mean_field(self, gamma=["precision"], init_loc_fn=start, init_scale=_START)


class Classification(Network):
    """One of many classes, an output for each."""

    usual_scale = 3.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits of each row."""
        logits = self.bayesian(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


class BinaryClassification(Network):
    """One of two classes, with one output for the second."""

    usual_scale = 3.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logit of each row."""
        logits = self.bayesian(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)
        return logits


def used_inputs(masks: Mapping[str, Tensor], network: Network) -> Tensor:
    """Return which inputs a chain of kept weights leads from to an output."""
    names = [name for name, _ in network.plain.named_parameters() if name.endswith("weight")]
    used = torch.ones(len(masks[names[-1]]), dtype=torch.bool, device="cpu")
    for name in reversed(names):
        used = (masks[name] & used.unsqueeze(-1)).any(0)
    return used
