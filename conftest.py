"""What every test and every example in a docstring starts from."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def fresh_pyro():
    """Clear the param store, which outlives guides, and seed all generators."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
