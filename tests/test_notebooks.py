"""Every cell of every notebook, in a shell of IPython."""

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pyro
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# The other notebooks call what these, the pages of the documentation or other tests call too.
OFTEN = {"arviz_for_svi", "group_study", "own_model", "quickstart"}
MARKED = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in OFTEN else pytest.mark.rare)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", MARKED)
def test_every_cell_of_a_notebook(path, tmp_path, monkeypatch):
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
