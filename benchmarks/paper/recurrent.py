"""A Bayesian recurrent network, and the signals that it learns to continue.

The network and the signals are those of Beckers et al. (2022), arXiv:2210.09134: a gated recurrent
unit (Cho et al. 2014, arXiv:1406.1078) reads eight values and predicts the next one.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.nn import functional as F


class Recurrent(PyroModule):
    r"""A gated recurrent unit and a dense layer, with unit Gaussian priors.

    .. math:: r &= \sigma(W_r x + U_r h + b_r) \\
              u &= \sigma(W_u x + U_u h + b_u) \\
              c &= \tanh(W_h x + U_h (r h) + b_h) \\
              h &\leftarrow u h + (1 - u) c

    The noise precision has a Gamma(1, 1) prior.

    Parameters
    ----------
    hidden : int
        H, the length of :math:`h`.

    Examples
    --------
    >>> Recurrent(16)(torch.zeros(4, 8)).shape
    torch.Size([4])
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.hidden = hidden
        shapes = {
            "input_weight": (3 * hidden,),
            "recurrent_weight": (3 * hidden, hidden),
            "bias": (3 * hidden,),
            "dense_weight": (1, hidden),
            "dense_bias": (1,),
        }
        for name, shape in shapes.items():
            setattr(
                self, name, PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
            )
        self.precision = PyroSample(dist.Gamma(1.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict, and observe targets where there are any.

        Parameters
        ----------
        x : Tensor
            Sequences, of shape ``(rows, steps)``.
        y : Tensor, optional
            The value after each, of shape ``(rows,)``.

        Returns
        -------
        Tensor
            Mean of the targets, of shape ``(rows,)``.
        """
        # Read before the plate, in which they would become local to each row.
        input_weight, bias, hidden = self.input_weight, self.bias, self.hidden
        gate_weight, new_weight = self.recurrent_weight.split([2 * hidden, hidden])
        inputs = x[:, :, None] * input_weight + bias
        h = x.new_zeros(len(x), hidden)
        for step in inputs.unbind(1):
            gates, new = step.split([2 * hidden, hidden], 1)
            reset, update = (gates + F.linear(h, gate_weight)).sigmoid().chunk(2, 1)
            new = (new + F.linear(reset * h, new_weight)).tanh()
            # u h + (1 - u) c as one function, whose moments know that both terms share u.
            h = torch.lerp(new, h, update)
        mean = F.linear(h, self.dense_weight, self.dense_bias).squeeze(-1)
        scale = self.precision.rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)
        return pyro.deterministic("mean", mean)


def signal(name: str) -> Tensor:
    """Return 800 values of a periodic signal, without noise.

    Parameters
    ----------
    name : str
        ``"sine"``, ``"sawtooth"`` or ``"square"``; the latter two as sums of four sines.

    Returns
    -------
    Tensor
        Of shape ``(800,)``, four periods.

    Examples
    --------
    >>> signal("sine")[:3]
    tensor([0.0000, 0.0314, 0.0628])
    """
    x = 0.01 * math.pi * torch.arange(800, dtype=torch.float64)
    amplitudes = {
        "sine": {1: 1.0},
        "sawtooth": {1: 1.0, 2: -1 / 2, 3: 1 / 3, 4: -1 / 4},
        "square": {1: 1.0, 3: 1 / 3, 5: 1 / 5, 7: 1 / 7},
    }[name]
    return sum(a * (k * x).sin() for k, a in amplitudes.items()).float()


def sequences(values: Tensor, length: int = 8) -> tuple[Tensor, Tensor]:
    """Cut a signal into overlapping sequences, each with the value that comes next.

    Parameters
    ----------
    values : Tensor
        Of shape ``(n,)``.
    length : int
        Of a sequence.

    Returns
    -------
    x, y : Tensor
        Of shape ``(n - length, length)`` and ``(n - length,)``.

    Examples
    --------
    >>> sequences(torch.arange(4.0), 2)
    (tensor([[0., 1.],
            [1., 2.]]), tensor([2., 3.]))
    """
    windows = values.unfold(0, length + 1, 1)
    return windows[:, :-1].contiguous(), windows[:, -1].contiguous()
