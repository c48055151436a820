"""Every cell of every notebook, in a shell of IPython."""

import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pyro
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# The other notebooks call what these, the pages of the documentation or other tests call too.
OFTEN = {"group_study", "quickstart"}
MARKED = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in OFTEN else pytest.mark.rare)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", MARKED)
def test_every_cell_of_a_notebook(path, tmp_path, monkeypatch):
    if path.stem == "arviz_for_svi" and version("arviz").startswith("1."):
        pytest.skip("the notebook shows figures of ArviZ before 1.0, which have other names since")
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}), user_ns={})
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert len(cells) > 5
    with warnings.catch_warnings():
        for cell in cells:
            shell.run_cell(cell.source).raise_error()
            plt.close("all")


def test_an_error_in_a_cell_is_one_of_the_test():
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}), user_ns={})
    with pytest.raises(AssertionError):
        shell.run_cell("assert 1 == 2").raise_error()


FIGURES = """
import torch, pyro, pyro.distributions as dist
import pyro_bmr as bmr
def model(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=torch.ones(5))
guide = pyro.infer.autoguide.AutoNormal(model)
guide(torch.ones(5, 3))
result = bmr.reduce(guide)
"""


@pytest.mark.rare
def test_a_kernel_shows_every_figure():
    """Also those after the first, before which the backend is chosen."""
    cells = map(nbformat.v4.new_code_cell, [FIGURES, *["bmr.plot_criteria(result);"] * 2])
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    NotebookClient(notebook).execute()
    assert ["image/png" in cell.outputs[0].data for cell in notebook.cells[1:]] == [True, True]
