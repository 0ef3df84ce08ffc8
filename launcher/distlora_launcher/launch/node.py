"""One machine's part in a run of several: its workers, from start to end.

    python -m distlora_launcher.launch.node RUN --rdzv-endpoint HOST:PORT --rdzv-id ID [--slurm-job JOB]

Started on each machine by SLURM's script, or by hand. RUN is a folder that all machines share, with its settings
(config.yaml) and prepared data; ID tells this start of it from others. JOB is noted in RUN/slurm.json once the run is
held, so a job that is refused, as another has the run, is not taken for the run's. Ends with our exit codes, 0, 1, 2
and 75.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora_launcher.launch.signals import hold

# Before what takes long to import: SIGUSR1 ends a process that does nothing about it.
if __name__ == "__main__":
    hold()

from distlora.config.file import load_config
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora_launcher.compose.hub import restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.job_record import note_job
from distlora_launcher.launch.local import is_complete
from distlora_launcher.launch.machines import run_together
from distlora_launcher.launch.signals import Forwarder, forwarding


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this machine's workers of the run that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora_launcher.launch.node", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", required=True, help="where the machines meet")
    parser.add_argument("--rdzv-id", metavar="ID", required=True, help="the same on each machine of one start")
    parser.add_argument("--slurm-job", metavar="JOB", help="the job that this is, for `distlora status` and `cancel`")
    options = parser.parse_args(arguments)
    with forwarding() as forwarder:
        return run_to_exit_code(
            lambda: run_node(
                options.run.absolute(), options.rdzv_endpoint, options.rdzv_id, forwarder, slurm_job=options.slurm_job
            )
        )


def run_node(run_dir: Path, endpoint: str, run_id: str, forwarder: Forwarder, *, slurm_job: str | None = None) -> int:
    """Run this machine's workers of a prepared run. Raises UserError for a run without data or that others run."""
    config = load_config(run_dir)
    if is_complete(run_dir):
        return DONE
    restore(config)

    def lead() -> int:
        if slurm_job is not None:
            note_job(run_dir, slurm_job)
        # Where it was submitted, nothing showed the cards that it would get.
        keep(run_dir, planned(config, run_dir=run_dir, runs_here=True))
        return DONE

    return run_together(run_dir, config, endpoint, run_id, forwarder, lead=lead)


if __name__ == "__main__":
    sys.exit(main())
