"""How long torchvision's resnet18 takes on the way: bayesianize, two steps, channels, compact.

Run with ``python benchmarks/resnet18.py``; writes ``resnet18.csv``, a row for each step: its
seconds, and elements and channels that are left. Where torchvision does not import, the same layers
are put together here, which ``network`` says. Weights are random, as are the four images, so that
which channels go says nothing: half of them by magnitude, without data. ``difference`` is between
the outputs of the masked network and of the smaller one, of their size.
"""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_bmr as bmr

try:
    from torchvision.models import resnet18

    NETWORK = "of torchvision"
except (ImportError, RuntimeError):
    resnet18, NETWORK = None, "the same layers"

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "integrations.md"
PLACE = re.compile(r"(<!-- benchmarks/resnet18.csv -->\n).*?(<!-- end -->)", re.DOTALL)
CLASSES, IMAGES, PIXELS = 10, 4, 64


class Block(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        shorter = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(*shorter) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways."""
        inner = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(inner)) + self.downsample(x)).relu()


class ResNet(nn.Module):
    """Torchvision's resnet18, from torch alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = (64, 64, 128, 256, 512)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(Block(a, b, 1 if a == b else 2), Block(b, b, 1))
                for a, b in zip(sizes, sizes[1:], strict=False)
            )
        )
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layers(x).mean((-2, -1)))


class Classifier(PyroModule):
    """A resnet18 with weights that are sampled."""

    def __init__(self) -> None:
        super().__init__()
        # Of batches of four, running means say more than those of a batch.
        plain = (resnet18 or ResNet)(num_classes=CLASSES).eval()
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
    result = bmr.reduce(guide, groups=bmr.channels, select=half)
    layers = result.layer_summary()
    kept = int(layers["kept"].sum())
    clock.lap("reduce by channels", channels=kept, elements=sum(int(s.kept) for s in result.sites))
    small = result.compact(x)
    clock.lap("compact", channels=kept, elements=count(small.guide.median()))
    masked, cut = (one.to_module(x)(x) for one in (result, small))
    difference = float((masked - cut).detach().abs().max() / masked.detach().abs().max())
    clock.lap("to_module, twice", difference=difference)
    table = pd.DataFrame(clock.rows)
    table["network"] = NETWORK
    table["torch"] = torch.__version__
    table["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    path = Path(__file__).with_suffix(".csv")
    table.to_csv(path, index=False, float_format="%.8g")
    PAGE.write_text(fill(PAGE.read_text(), pd.read_csv(path)))


def fill(page: str, table: pd.DataFrame) -> str:
    """Write the table into the page."""
    lines = ["| step | seconds | elements |", "| --- | --- | --- |"]
    for row in table.itertuples():
        elements = "" if pd.isna(row.elements) else f"{row.elements:,.0f}"
        lines.append(f"| {row.step} | {row.seconds:.1f} | {elements} |")
    text = "\n".join(["", *lines, "", ""])
    return PLACE.sub(lambda found: found[1] + text + found[2], page)


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
