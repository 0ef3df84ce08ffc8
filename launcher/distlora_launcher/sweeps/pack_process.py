"""The launcher of a pack's workers, a process of its own beside the sweep's worker that feeds it.

    python -m distlora_launcher.sweeps.pack_process PACK

Exit codes are `run_workers`'; what became of each trial is in PACK/outcomes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distlora.config.file import load_config
from distlora.config.json_files import read_object
from distlora.system.exit_codes import run_to_exit_code
from distlora.training.multi_trial.protocol import PACK_NAME
from distlora_launcher.launch.lock import running
from distlora_launcher.launch.signals import hold
from distlora_launcher.launch.workers import run_workers

WORKER = "distlora.training.multi_trial"


def run(pack: Path) -> int:
    """Run the workers of a pack to their end. Of a pack of one, those that die are started again as a run's are; of
    more, whoever feeds it starts fewer at once."""
    config = load_config(pack)
    slots = read_object(pack / PACK_NAME, "start the sweep again with `distlora resume`").get("slots")
    with running(pack):
        return run_workers(
            pack,
            processes=config.cluster.gpus_per_node,
            worker_module=WORKER,
            max_restarts=config.cluster.max_restarts if slots == 1 else 0,
        )


if __name__ == "__main__":
    hold()
    sys.exit(run_to_exit_code(lambda: run(Path(sys.argv[1]))))
