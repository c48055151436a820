"""What every test and every example in a docstring starts from."""

from importlib import import_module

import matplotlib
import pyro
import pytest

matplotlib.use("Agg")

# By time: none of these files shall begin when the other workers are nearly done.
LONGEST = (
    "test_ranks.py",
    "test_pruning.py",
    "test_training.py",
    "test_network_experiments.py",
    "test_export.py",
    "test_compaction.py",
    "test_measured_ranks.py",
    "test_notebooks.py",
    "test_docs.py",
    "test_estimators.py",
    "test_what_svi_takes.py",
    "test_checkpoints.py",
    "test_numpyro.py",
    "test_guide_programs.py",
    "test_models.py",
    "test_horseshoe.py",
    "test_saving.py",
    "test_guides.py",
    "test_hierarchical.py",
)


def pytest_configure(config):
    """Import ArviZ before two workers do at once, which fails where it writes a file of the day."""
    if not hasattr(config, "workerinput"):
        import_module("arviz")


def pytest_collection_modifyitems(items):
    """Order the files."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def fresh_pyro(monkeypatch):
    """Clear the param store, which outlives guides, seed all generators, print 100 columns."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    monkeypatch.setenv("COLUMNS", "100")
