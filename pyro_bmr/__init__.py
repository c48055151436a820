"""Bayesian model reduction for Pyro: prune a trained posterior by its free energy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_bmr import baselines as baselines
from pyro_bmr import extend as extend
from pyro_bmr import nn as nn
from pyro_bmr import types as types
from pyro_bmr.averaging.average import average
from pyro_bmr.averaging.model_comparison import compare_models
from pyro_bmr.averaging.model_priors import LearnedPrior
from pyro_bmr.averaging.named_models import model_grid
from pyro_bmr.averaging.presence import presence
from pyro_bmr.diagnostics.arviz_data import to_arviz
from pyro_bmr.diagnostics.comparison import compare
from pyro_bmr.estimators.elbos import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.estimators.measurement import free_energy
from pyro_bmr.export.costs import measure_costs
from pyro_bmr.export.modules import apply_masks, to_module
from pyro_bmr.export.onnx_files import export_onnx
from pyro_bmr.guides.auto_gamma import AutoGamma, mean_field
from pyro_bmr.guides.families import read_factors
from pyro_bmr.loading import load as load
from pyro_bmr.mathematics.evidence import delta_f
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.mathematics.reduced_posteriors import reduced_posterior
from pyro_bmr.mathematics.reduced_priors import Gaussian, Laplace, Spike
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.moments.spm import read_spm
from pyro_bmr.nn import bayesianize, init_to_pretrained
from pyro_bmr.plots.bars import plot_delta_f
from pyro_bmr.plots.criteria import plot_criteria
from pyro_bmr.plots.curves import plot_rounds, plot_sparsities
from pyro_bmr.plots.densities import plot_element
from pyro_bmr.plots.matrices import plot_weights
from pyro_bmr.plots.models import plot_models
from pyro_bmr.plots.networks import plot_network
from pyro_bmr.plots.predictions import plot_predictions
from pyro_bmr.plots.reliability import plot_reliability
from pyro_bmr.reduction import reduce
from pyro_bmr.results import Reduction
from pyro_bmr.second_level.group_level import group_level
from pyro_bmr.second_level.group_prior import GroupPrior
from pyro_bmr.selection.by_free_energy import by_free_energy
from pyro_bmr.selection.groups import channels, elements, heads, inputs, units
from pyro_bmr.selection.selections import by_blocks, by_evidence, exhaustive, top_k
from pyro_bmr.shards.masks import read_masks
from pyro_bmr.shards.reduction import reduce_files
from pyro_bmr.sparsities import measure_sparsities
from pyro_bmr.training.fitting import fit
from pyro_bmr.training.pruning import prune
from pyro_bmr.tuning import tune_prior
from pyro_bmr.versions import __version__ as __version__

if TYPE_CHECKING:
    from pyro_bmr import datasets as datasets
    from pyro_bmr import testing as testing

# Not load, nn, baselines, extend and types, which a star import would surprise with.
__all__ = [
    "AutoGamma",
    "Dense",
    "Diagonal",
    "Gaussian",
    "GlobalELBO",
    "GroupPrior",
    "Laplace",
    "LearnedPrior",
    "LocalELBO",
    "LowRank",
    "MomentsELBO",
    "Posterior",
    "Reduction",
    "Spike",
    "apply_masks",
    "average",
    "bayesianize",
    "by_blocks",
    "by_evidence",
    "by_free_energy",
    "channels",
    "compare",
    "compare_models",
    "delta_f",
    "elements",
    "exhaustive",
    "export_onnx",
    "fit",
    "free_energy",
    "group_level",
    "heads",
    "init_to_pretrained",
    "inputs",
    "mean_field",
    "measure_costs",
    "measure_sparsities",
    "model_grid",
    "plot_criteria",
    "plot_delta_f",
    "plot_element",
    "plot_models",
    "plot_network",
    "plot_predictions",
    "plot_reliability",
    "plot_rounds",
    "plot_sparsities",
    "plot_weights",
    "presence",
    "prune",
    "read_factors",
    "read_masks",
    "read_spm",
    "reduce",
    "reduce_files",
    "reduced_posterior",
    "to_arviz",
    "to_module",
    "top_k",
    "tune_prior",
    "units",
]

# Modules that are loaded when they are asked for, as `bmr.datasets`.
_ON_ACCESS = ("datasets", "sklearn", "testing")
# What else is public.
_BESIDE = ("__version__", "baselines", "extend", "load", "nn", "plots", "types")


def __getattr__(name: str) -> Any:
    if name in _ON_ACCESS:
        return import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*__all__, *_BESIDE, *_ON_ACCESS})
