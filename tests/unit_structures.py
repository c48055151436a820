"""Multi-layer networks as programs of bare sites, with their units written down by hand."""

import pyro
import pyro.distributions as dist
import torch

from pyro_bmr.structure.units import Axis, Layer, Structure


def make_sites(sizes, scale=1.0):
    """Sample weights w0, w1, ... and biases b0, b1, ... of layers of these sizes."""

    def model():
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            for name, shape in {f"w{i}": (outputs, inputs), f"b{i}": (outputs,)}.items():
                pyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event())

    return model


def make_structure(sizes):
    """Label inputs and hidden units; outputs cannot go."""
    count, ends = sum(sizes[:-1]), torch.tensor(sizes).cumsum(0)
    *units, _ = torch.arange(ends[-1]).tensor_split(ends[:-1])
    units.append(torch.full((sizes[-1],), -1))
    assert sum(len(one) for one in units[:-1]) == count
    sites = {}
    for i in range(len(sizes) - 1):
        produced = Axis(units[i + 1], reads=False)
        sites |= {f"w{i}": (produced, Axis(units[i], reads=True)), f"b{i}": (produced,)}
    layers = [Layer("w0", "input", units[0])]
    layers += [Layer(f"w{i}", "unit", one) for i, one in enumerate(units[1:-1])]
    return Structure(sites, {}, tuple(layers), {})
