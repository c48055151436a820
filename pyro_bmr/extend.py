"""What extensions are made of: guide families, prior families, selections, posteriors."""

from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.families import read_factors
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets
from pyro_bmr.priors.families import log_density_at_zero
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.sites import Site
from pyro_bmr.selection.scores import Scores

__all__ = [
    "Factor",
    "IndependentFactor",
    "JointFactor",
    "Prior",
    "PrunedGuide",
    "PrunedModel",
    "Scores",
    "Site",
    "delta_f_of_all_subsets",
    "log_density_at_zero",
    "read_factors",
]
