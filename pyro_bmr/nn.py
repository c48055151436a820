"""From torch networks to Pyro models: `bayesianize`, its priors, and `init_to_pretrained`."""

from pyro_bmr.conversion.bayesian import bayesianize
from pyro_bmr.conversion.layers import LAYERS
from pyro_bmr.conversion.pretrained import init_to_pretrained
from pyro_bmr.conversion.weight_priors import WeightPrior, fan_in_normal, learned_normal, normal

__all__ = [
    "LAYERS",
    "WeightPrior",
    "bayesianize",
    "fan_in_normal",
    "init_to_pretrained",
    "learned_normal",
    "normal",
]
