"""Bayesian model reduction for Pyro: prune a trained posterior by its free energy."""

from pyro_bmr.averaging.average import Average, average
from pyro_bmr.averaging.averaged_guide import AveragedGuide
from pyro_bmr.averaging.occam_window import Window
from pyro_bmr.averaging.presence import LearnedPrior, Presence, presence
from pyro_bmr.compaction import Compaction
from pyro_bmr.diagnostics.arviz_data import to_arviz
from pyro_bmr.diagnostics.audit import Audit, Check
from pyro_bmr.diagnostics.comparison import Comparison, compare
from pyro_bmr.estimators.elbos import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.estimators.measurement import free_energy
from pyro_bmr.export.costs import Cost, Costs, measure_costs
from pyro_bmr.export.modules import apply_masks, to_module
from pyro_bmr.export.onnx_files import export_onnx
from pyro_bmr.factors.factor import Prior
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.auto_gamma import AutoGamma, mean_field
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.guides.reading import read_factors
from pyro_bmr.loading import load
from pyro_bmr.mathematics.evidence import delta_f
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.mathematics.reduced_posteriors import reduced_posterior
from pyro_bmr.mathematics.reduced_priors import Gaussian, Laplace, Spike
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets
from pyro_bmr.nn import bayesianize, fan_in_normal, init_to_pretrained, normal
from pyro_bmr.plots.bars import plot_delta_f
from pyro_bmr.plots.criteria import plot_criteria
from pyro_bmr.plots.curves import plot_rounds, plot_sparsities
from pyro_bmr.plots.densities import plot_element
from pyro_bmr.plots.matrices import plot_weights
from pyro_bmr.plots.networks import plot_network
from pyro_bmr.plots.predictions import plot_predictions
from pyro_bmr.plots.reliability import plot_reliability
from pyro_bmr.priors.families import log_density_at_zero
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.sites import Site
from pyro_bmr.reduction import Reduction, reduce
from pyro_bmr.selection.groups import channels, elements, heads, inputs, units
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import (
    by_blocks,
    by_evidence,
    exhaustive,
    magnitude,
    random,
    snr,
    spr,
    top_k,
)
from pyro_bmr.sparsities import Sparsities, Sparsity, measure_sparsities
from pyro_bmr.training.fitting import fit
from pyro_bmr.training.pruning import Pruning, Round, prune
from pyro_bmr.tuning import TunedPrior, tune_prior

__all__ = [
    "Audit",
    "AutoGamma",
    "Average",
    "AveragedGuide",
    "Check",
    "Compaction",
    "Comparison",
    "Cost",
    "Costs",
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
    "Sparsities",
    "Sparsity",
    "Spike",
    "TunedPrior",
    "Window",
    "apply_masks",
    "average",
    "bayesianize",
    "by_blocks",
    "by_evidence",
    "channels",
    "compare",
    "delta_f",
    "delta_f_of_all_subsets",
    "elements",
    "exhaustive",
    "export_onnx",
    "fan_in_normal",
    "fit",
    "free_energy",
    "heads",
    "init_to_pretrained",
    "inputs",
    "load",
    "log_density_at_zero",
    "magnitude",
    "mean_field",
    "measure_costs",
    "measure_sparsities",
    "normal",
    "plot_criteria",
    "plot_delta_f",
    "plot_element",
    "plot_network",
    "plot_predictions",
    "plot_reliability",
    "plot_rounds",
    "plot_sparsities",
    "plot_weights",
    "presence",
    "prune",
    "random",
    "read_factors",
    "reduce",
    "reduced_posterior",
    "snr",
    "spr",
    "to_arviz",
    "to_module",
    "top_k",
    "tune_prior",
    "units",
]
