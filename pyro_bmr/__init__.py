"""Bayesian model reduction for Pyro: prune a trained posterior by its free energy."""

from pyro_bmr.evidence import delta_f
from pyro_bmr.factors import IndependentFactor, JointFactor, Site
from pyro_bmr.gaussian import Dense, Diagonal
from pyro_bmr.groups import elements
from pyro_bmr.guides import read_factors
from pyro_bmr.handlers import PrunedModel
from pyro_bmr.priors import Spike, log_density_at_zero
from pyro_bmr.pruned_guide import PrunedGuide
from pyro_bmr.reduction import Reduction, reduce
from pyro_bmr.scores import Scores
from pyro_bmr.selection import by_evidence, magnitude, random, snr, spr, top_k

__all__ = [
    "Dense",
    "Diagonal",
    "IndependentFactor",
    "JointFactor",
    "PrunedGuide",
    "PrunedModel",
    "Reduction",
    "Scores",
    "Site",
    "Spike",
    "by_evidence",
    "delta_f",
    "elements",
    "log_density_at_zero",
    "magnitude",
    "random",
    "read_factors",
    "reduce",
    "snr",
    "spr",
    "top_k",
]
