"""What reads other libraries imports nothing of them before it is called."""

import ast
from pathlib import Path

import pyro_bmr

OTHERS = {"numpyro", "jax", "laplace", "bayesian_torch", "h5py", "pymc", "cmdstanpy"}


def test_no_module_imports_what_it_reads():
    for path in Path(pyro_bmr.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import):
                names = {alias.name.partition(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                names = {(statement.module or "").partition(".")[0]}
            else:
                continue
            assert not names & OTHERS, path
