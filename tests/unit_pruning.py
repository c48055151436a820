"""Reductions of which units can go, for tests of what is compacted."""

import torch

import pyro_bmr as bmr


def prune_units(result):
    """Prune what reads and what makes every second unit, but for inputs and outputs."""
    masks = {name: torch.ones_like(v, dtype=torch.bool) for name, v in result.scores.items()}
    weights = [name for name in masks if name.endswith("weight")]
    for name, keep in masks.items():
        if not name.startswith(weights[-1].rpartition(".")[0]):
            keep[1::2] = False
        if name in weights[1:]:
            keep[:, 1::2] = False
    return bmr.reduce(result.guide, select=lambda _: masks)
