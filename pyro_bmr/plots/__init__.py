"""Figures of what a reduction found; each takes axes, and returns those that it drew on."""

from pyro_bmr.plots.bars import plot_delta_f, plot_sites
from pyro_bmr.plots.criteria import plot_criteria
from pyro_bmr.plots.curves import plot_rounds, plot_sparsities
from pyro_bmr.plots.densities import plot_element
from pyro_bmr.plots.matrices import plot_weights
from pyro_bmr.plots.models import plot_models
from pyro_bmr.plots.networks import plot_network
from pyro_bmr.plots.predictions import plot_predictions
from pyro_bmr.plots.probabilities import plot_presence
from pyro_bmr.plots.reliability import plot_reliability
from pyro_bmr.plots.sources import data

__all__ = [
    "data",
    "plot_criteria",
    "plot_delta_f",
    "plot_element",
    "plot_models",
    "plot_network",
    "plot_predictions",
    "plot_presence",
    "plot_reliability",
    "plot_rounds",
    "plot_sites",
    "plot_sparsities",
    "plot_weights",
]
