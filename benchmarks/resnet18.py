"""How long torchvision's resnet18 takes on the way: bayesianize, two steps, channels, compact.

Run with ``python benchmarks/resnet18.py`` where torchvision imports; writes ``resnet18.csv``, a
row for each step: its seconds, and elements and channels that are left. Weights are random, as are
the four images, so that which channels go says nothing: half of them by magnitude. ``difference``
is between the outputs of the masked network and of the smaller one, of their size.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import torchvision.models
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

import pyro_bmr as bmr

CLASSES, IMAGES, PIXELS = 10, 4, 64


class Classifier(PyroModule):
    """A resnet18 with weights that are sampled."""

    def __init__(self) -> None:
        super().__init__()
        # Of batches of four, running means say more than those of a batch.
        plain = torchvision.models.resnet18(weights=None, num_classes=CLASSES).eval()
        self.net = bmr.bayesianize(plain)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits, and observe the classes."""
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


def _main() -> None:
    pyro.set_rng_seed(0)
    x = torch.randn(IMAGES, 3, PIXELS, PIXELS, device="cpu")
    y = torch.randint(CLASSES, (IMAGES,), device="cpu")
    clock = Clock()
    model = Classifier()
    start = bmr.init_to_pretrained(model.net)
    guide = AutoNormal(model, init_loc_fn=start, init_scale=1e-3)
    guide(x, y)
    clock.lap("bayesianize, and a guide", elements=count(guide.median()))
    bmr.fit(model, guide, x, y, num_epochs=2, lr=1e-4, compile=False, progress=False)
    clock.lap("two steps")
    half = bmr.baselines.magnitude(fraction=0.5)
    result = bmr.reduce(guide, x, y, groups=bmr.channels, select=half)
    layers = result.layer_summary()
    kept = int(layers["kept"].sum())
    clock.lap("reduce by channels", channels=kept, elements=sum(int(s.kept) for s in result.sites))
    small = result.compact(x)
    clock.lap("compact", channels=kept, elements=count(small.guide.median()))
    masked, cut = (one.to_module(x)(x) for one in (result, small))
    difference = float((masked - cut).abs().max() / masked.abs().max())
    clock.lap("to_module, twice", difference=difference)
    table = pd.DataFrame(clock.rows)
    table["versions"] = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    table["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")
    print(table.to_string(index=False))


class Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.last = time.perf_counter()

    def lap(self, step: str, **what: object) -> None:
        """Write a row."""
        now = time.perf_counter()
        self.rows.append({"step": step, "seconds": now - self.last, **what})
        self.last = now
        print(self.rows[-1], flush=True)


def count(values: dict[str, Tensor]) -> int:
    """How many elements there are."""
    return sum(value.numel() for value in values.values())


if __name__ == "__main__":
    _main()
