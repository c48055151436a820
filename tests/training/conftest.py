"""What many processes found, which are started once for all tests of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def of_ranks(tmp_path_factory):
    """By launch, of each rank, what each scenario found."""
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("launched_ranks.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Without it processes that start again do not find each other: torch's issue 135712.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        **{"capture_output": True, "text": True, "env": environment, "check": False},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())
