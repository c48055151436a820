"""What many processes found, which are started once for all tests of a file."""

import json
import os
import subprocess
import sys
from pathlib import Path


def start_ranks(folder, *launches):
    """Return by launch, of each rank, what each scenario found."""
    program = Path(__file__).with_name("launched_ranks.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Without it processes that start again do not find each other: torch's issue 135712.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *launches],
        **{"capture_output": True, "text": True, "env": environment, "check": False},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())
