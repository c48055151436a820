"""Draw the figures of the documentation: ``python docs/figures.py``, in some minutes.

They go to docs/images/figures-NAME.png, all from small networks that are trained here, and to
docs/images/demo.png, what ``python -m pyro_bmr demo`` draws. None has more than 150 kB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.infer.autoguide import AutoNormal, init_to_sample
from sklearn.datasets import load_digits
from torch import nn

import pyro_bmr as bmr
from pyro_bmr import datasets, demo
from pyro_bmr.__main__ import main as main_of_package

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Draw those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as weights; all by default")
    names = parser.parse_args().names
    if not names or "demo" in names:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "demo.png"
            main_of_package(["demo", "--figure", str(path)])
            save_small(Image.open(path), IMAGES / "demo.png")
    for draw in (draw_regression, draw_rounds, draw_predictions, draw_classes, draw_models):
        for name, axes in draw():
            figure = np.atleast_1d(axes)[0].figure
            if not names or name in names:
                buffer = BytesIO()
                figure.savefig(buffer, dpi=110)
                save_small(Image.open(buffer), IMAGES / f"figures-{name}.png")
            plt.close(figure)


def save_small(picture: Image.Image, path: Path) -> None:
    """Save a picture in 256 colours, which its lines and areas do with.

    Parameters
    ----------
    picture : Image
        To save.
    path : Path
        Where.
    """
    flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


Figures = Iterator[tuple[str, Any]]


def draw_regression() -> Figures:
    """Draw what one reduction of the network of the demo shows.

    Yields
    ------
    tuple
        The name of a figure, and its axes.
    """
    data, rows = train_rows()
    network, guide = make_network(len(data.inputs))
    bmr.fit(network, guide, *rows, num_epochs=300, batch_size=64, lr=_falling, estimator="local")
    result = bmr.reduce(guide)
    print(result)
    by_unit = bmr.reduce(guide, groups=[bmr.units, bmr.elements])
    yield "delta_f", bmr.plot_delta_f(result)
    yield "delta_f-units", bmr.plot_delta_f(by_unit)
    yield "sites", bmr.plots.plot_sites(result)
    yield "criteria", bmr.plot_criteria(result)
    options: Any = {"reader": "fc2.weight", "labels": data.inputs}
    yield "weights", bmr.plot_weights(result, "fc1.weight", **options)
    scores, mask = result.scores["fc2.weight"][0], result.masks["fc2.weight"][0]
    pruned = int(scores.where(~mask, -torch.inf).argmax())
    kept = int(scores.where(mask, torch.inf).argmin())
    yield "element", bmr.plot_element(result, "fc2.weight", (0, pruned))
    yield "element-kept", bmr.plot_element(result, "fc2.weight", (0, kept))
    yield "presence", bmr.plots.plot_presence(bmr.presence(guide))
    yield "sparsities", bmr.plot_sparsities(bmr.measure_sparsities(guide, *rows, num_points=14))


def draw_rounds() -> Figures:
    """Draw the rounds of `prune` on the same network.

    Yields
    ------
    tuple
        The name of a figure, and its axes.
    """
    data, rows = train_rows()
    network, guide = make_network(len(data.inputs))
    options: Any = {"num_epochs": 150, "refit_epochs": 40, "batch_size": 64, "lr": 0.02}
    result = bmr.prune(network, guide, *rows, **options)
    print(result)
    yield "rounds", bmr.plot_rounds(result)


def draw_predictions() -> Figures:
    """Draw what a network of one input predicts, also far from its data.

    Yields
    ------
    tuple
        The name of a figure, and its axes.
    """
    pyro.set_rng_seed(0)
    x = torch.cat([torch.rand(100, 1) - 2, 1.5 * torch.rand(100, 1) + 0.5])
    y = torch.sin(2 * x[:, 0]) + 0.15 * torch.randn(200)
    network, guide = make_network(1)
    bmr.fit(network, guide, x, y, num_epochs=800, batch_size=50, lr=_falling, estimator="local")
    result = bmr.reduce(guide)
    print(result)
    models = {"full": (network, guide), "reduced": result}
    grid = torch.linspace(-3, 3, 121)[:, None]
    yield "predictions", bmr.plot_predictions(models, grid, data=(x, y))


def draw_classes() -> Figures:
    """Draw how calibrated a network for handwritten digits is.

    Yields
    ------
    tuple
        The name of a figure, and its axes.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    # Pixels from 0 to 8 under unit priors: with smaller ones weights would have to be large.
    x, y = torch.tensor(digits.data).float()[order] / 2, torch.tensor(digits.target)[order]
    network = bmr.bayesianize(nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10)))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        logits = network(x)
        with pyro.plate("data", len(x)):
            pyro.sample("digit", dist.Categorical(logits=logits), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.05)
    rows, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    bmr.fit(model, guide, *rows, num_epochs=200, batch_size=100, lr=_falling, estimator="local")
    result = bmr.reduce(guide)
    print(result)
    pairs = {"full": (model, guide), "reduced": result}
    comparison = bmr.compare(pairs, *rows, num_samples=100, test=test, loo=False)
    print(comparison.summary().T)
    yield "reliability", bmr.plot_reliability(comparison)


def draw_models() -> Figures:
    """Draw the models of a grid of commonalities and differences.

    Yields
    ------
    tuple
        The name of a figure, and its axes.
    """
    names = ["A(1,2) × mean", "A(2,1) × mean", "A(1,2) × group", "A(2,1) × group", "C(1,1) × mean"]
    mean = np.array([0.08, 0.50, 0.04, 0.31, 0.42])
    spread = 0.0064 * np.eye(5) + 0.0036
    posterior = bmr.Posterior(mean, spread, prior_scale=0.5, names=names)
    grid = bmr.model_grid(commonalities=_options("mean"), differences=_options("group"))
    yield "models", bmr.plot_models(bmr.compare_models(posterior, grid))
    yield "presence-elements", bmr.plots.plot_presence(bmr.presence(posterior), names)


def _options(covariate: str) -> dict[str, dict[str, bool]]:
    return {
        "both": {},
        "only forward": {f"A(1,2) × {covariate}": False},
        "only backward": {f"A(2,1) × {covariate}": False},
        "none": {f"A* × {covariate}": False},
    }


def _falling(done: float) -> float:
    return 0.03 * (1 - done) + 1e-4


def train_rows() -> tuple[datasets.RegressionData, tuple[torch.Tensor, torch.Tensor]]:
    """Return the data of the demo, and of these the rows that it trains on, on one scale.

    Returns
    -------
    tuple
        As scikit-learn has them, and inputs and targets.
    """
    pyro.set_rng_seed(0)
    data = datasets.load("diabetes")
    rows = torch.randperm(len(data.x))[len(data.x) // 5 :]
    x, y = (demo.Standardization.of(part[rows]).apply(part[rows]) for part in (data.x, data.y))
    return data, (x, y.squeeze(-1))


def make_network(inputs: int) -> tuple[Callable[..., Any], AutoNormal]:
    """Return the network of the demo and a guide for it.

    Parameters
    ----------
    inputs : int
        How many.

    Returns
    -------
    tuple
        A pair.
    """
    pyro.clear_param_store()
    network = demo.Regression(inputs)
    return network, AutoNormal(network, init_loc_fn=init_to_sample, init_scale=0.05)


if __name__ == "__main__":
    main()
