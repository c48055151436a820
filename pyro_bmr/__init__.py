"""Bayesian model reduction for Pyro: prune a trained posterior by its free energy."""

from pyro_bmr.auto_gamma import AutoGamma, mean_field
from pyro_bmr.averaged_guide import AveragedGuide
from pyro_bmr.averaging import Average, average
from pyro_bmr.estimators import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.evidence import delta_f
from pyro_bmr.factors import Prior, Site
from pyro_bmr.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.groups import elements
from pyro_bmr.guides import read_factors
from pyro_bmr.handlers import PrunedModel
from pyro_bmr.inclusion import LearnedPrior, Presence, presence
from pyro_bmr.independent_factor import IndependentFactor
from pyro_bmr.joint_factor import JointFactor
from pyro_bmr.measurement import free_energy
from pyro_bmr.nn import bayesianize, fan_in_normal, init_to_pretrained, normal
from pyro_bmr.occam_window import Window
from pyro_bmr.priors import log_density_at_zero
from pyro_bmr.pruned_guide import PrunedGuide
from pyro_bmr.pruning import Pruning, Round, prune
from pyro_bmr.reduced_posteriors import reduced_posterior
from pyro_bmr.reduced_priors import Gaussian, Laplace, Spike
from pyro_bmr.reduction import Reduction, reduce
from pyro_bmr.scores import Scores
from pyro_bmr.selection import (
    by_blocks,
    by_evidence,
    exhaustive,
    magnitude,
    random,
    snr,
    spr,
    top_k,
)
from pyro_bmr.subsets import delta_f_of_all_subsets
from pyro_bmr.training import fit
from pyro_bmr.tuning import TunedPrior, tune_prior

__all__ = [
    "AutoGamma",
    "Average",
    "AveragedGuide",
    "Dense",
    "Diagonal",
    "Gaussian",
    "GlobalELBO",
    "IndependentFactor",
    "JointFactor",
    "Laplace",
    "LearnedPrior",
    "LocalELBO",
    "LowRank",
    "MomentsELBO",
    "Presence",
    "Prior",
    "PrunedGuide",
    "PrunedModel",
    "Pruning",
    "Reduction",
    "Round",
    "Scores",
    "Site",
    "Spike",
    "TunedPrior",
    "Window",
    "average",
    "bayesianize",
    "by_blocks",
    "by_evidence",
    "delta_f",
    "delta_f_of_all_subsets",
    "elements",
    "exhaustive",
    "fan_in_normal",
    "fit",
    "free_energy",
    "init_to_pretrained",
    "log_density_at_zero",
    "magnitude",
    "mean_field",
    "normal",
    "presence",
    "prune",
    "random",
    "read_factors",
    "reduce",
    "reduced_posterior",
    "snr",
    "spr",
    "top_k",
    "tune_prior",
]
