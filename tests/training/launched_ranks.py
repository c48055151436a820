"""Runs what ranks do in the tests of many processes: ``python launched_ranks.py FOLDER LAUNCH``.

By the agent of ``torchrun``. The ranks are forked from this process, which imports once for all.
"""

import json
import sys
import time
from pathlib import Path

import measured_ranks
import ranks
import torch._inductor.compile_fx  # noqa: F401, which ranks would each import
from torch import distributed
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FIT = ["same_noise", "exact"]
LAUNCHES = {
    "1": (1, FIT),
    "2": (2, [*FIT, "errors", "unhurt"]),
    "4": (4, [*FIT, "unhurt"]),
    "killed": (2, ["killed"]),
    "measured 1": (1, ["measuring"]),
    "measured 2": (2, ["measuring", "measuring_errors", "pruned"]),
    "measured 4": (4, ["pruned"]),
    "measured, killed": (2, ["pruned_killed"]),
}


def launch(size, names, folder):
    """Start ranks that run scenarios, and start them again where one dies."""
    config = LaunchConfig(
        **{"min_nodes": 1, "max_nodes": 1, "nproc_per_node": size, "max_restarts": 2},
        **{"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"},
        **{"run_id": names[0], "monitor_interval": 0.1},
    )
    folder.mkdir(exist_ok=True)
    found = elastic_launch(config, run)(names, folder)
    return [found[rank] for rank in range(size)]


def run(names, folder):
    """Run scenarios in one rank; returns what each found, and its seconds."""
    own, found = ranks.Ranks(), {"seconds": {}}
    for name in names:
        begin = time.process_time()
        scenario = getattr(ranks, name, None) or getattr(measured_ranks, name)
        found[name] = scenario(own, folder)
        found["seconds"][name] = time.process_time() - begin
    # None ends while another still needs it.
    distributed.barrier()
    distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for name in sys.argv[2:]:
        results[name] = launch(
            *LAUNCHES[name], folder / ("killed" if "killed" in name else "whole")
        )
    (folder / "results.json").write_text(json.dumps(results))
