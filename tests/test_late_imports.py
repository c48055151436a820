"""What ``import pyro_bmr`` loads, and what works without the packages that extras install."""

import subprocess
import sys

import pytest

import pyro_bmr as bmr

# Imported where they are needed, for each costs as much as the package, or far more.
LATE = [
    "arviz",
    "matplotlib",
    "numpyro",
    "onnx",
    "onnxruntime",
    "pandas",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.device_mesh",
    "torch.onnx._internal.exporter",
    "xarray",
]

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {missing}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

REDUCE = """
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)

pyro.set_rng_seed(0)
x = torch.randn(50, 3)
y = x[:, 0]
guide = AutoNormal(model)
bmr.fit(model, guide, x, y, num_epochs=50, lr=0.05)
result = bmr.reduce(guide, x, y)
print(bmr.reduce(guide))
print(result)
"""

NEED_AN_EXTRA = """
def tell(call, *args):
    try:
        call(*args)
    except ImportError as error:
        print(type(error).__name__, error)

tell(bmr.plot_delta_f, result)
tell(bmr.plot_criteria, result)
tell(bmr.plot_element, result, "w", 0)
tell(bmr.plot_weights, result)
tell(bmr.plot_predictions, result, x)
tell(bmr.plot_models, bmr.compare_models(guide, {"first": {"w": [True, False, False]}}))
tell(bmr.plot_sparsities, bmr.measure_sparsities(guide, x, y))
tell(bmr.datasets.load, "diabetes")
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_imported_late():
    found = run(
        "import sys, torch, pyro; before = {*sys.modules}; import pyro_bmr;"
        "print(*({*sys.modules} - before), sep='\\n')"
    )
    assert not {*LATE} & {*found.split()}


def test_a_reduction_needs_no_extra():
    missing = ["arviz", "matplotlib", "onnx", "pandas", "sklearn", "xarray"]
    printed = run(WITHOUT.replace("{missing}", str(missing)) + REDUCE)
    assert "predicted, not measured" in printed and "realised" in printed


@pytest.mark.rare
def test_what_needs_an_extra_says_which():
    missing = ["matplotlib", "sklearn"]
    *figures, data = run(
        WITHOUT.replace("{missing}", str(missing)) + REDUCE.split("print")[0] + NEED_AN_EXTRA
    ).splitlines()
    told = "ImportError {} not found. Expected it for {}: pip install 'pyro-bmr[{}]'"
    assert figures == [told.format("matplotlib", "figures", "plots")] * 7
    assert data == told.format("scikit-learn", "these data", "sklearn")


def test_modules_that_are_loaded_when_they_are_asked_for():
    assert run("import pyro_bmr as bmr; print(bmr.datasets.__name__)") == "pyro_bmr.datasets\n"
    assert {"datasets", "testing", "reduce"} <= {*dir(bmr)}
    with pytest.raises(AttributeError, match="'pyro_bmr' has no attribute 'reduces'"):
        _ = bmr.reduces


def test_the_versions(capsys):
    from pyro_bmr.__main__ import main

    main(["versions"])
    printed = capsys.readouterr().out
    for what in ("pyro-bmr", bmr.__version__, "torch", "pyro-ppl", "python", "CUDA"):
        assert what in printed
