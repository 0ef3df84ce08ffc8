"""One node of a SLURM job: it runs its workers of a run that is prepared and whose folder all nodes share.

    python -m distlora_launcher.launch.node RUN --rdzv-endpoint HOST:PORT --rdzv-id ID [--slurm-job JOB]

SLURM's script starts it on each node; it can be started by hand. RUN is a folder that all nodes share, with its
settings and prepared data; ID tells this start from others. JOB is written to RUN/slurm.json once the run is locked, so
a job that is refused does not replace the job that has the run. Exit codes: 0, 1, 2 and 75.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.system.stop_signals import block

# Before the slow imports: by default SIGUSR1 kills a process.
if __name__ == "__main__":
    block()

from distlora.config.file import load_config
from distlora.run_folder.submission import note_job
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.stop_signals import Forwarder, forwarding
from distlora_launcher.compose.checks import check_machine
from distlora_launcher.compose.hub import restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.local import is_complete, run_node
from distlora_launcher.launch.rendezvous import make_rendezvous


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this node's workers of the run that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora_launcher.launch.node", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", required=True, help="rendezvous of the nodes")
    parser.add_argument("--rdzv-id", metavar="ID", required=True, help="the same on each node of one start")
    parser.add_argument("--slurm-job", metavar="JOB", help="id of this job, for `distlora status` and `cancel`")
    options = parser.parse_args(arguments)
    with forwarding() as forwarder:
        return run_to_exit_code(
            lambda: run_slurm_node(
                options.run.absolute(), options.rdzv_endpoint, options.rdzv_id, forwarder, slurm_job=options.slurm_job
            )
        )


def run_slurm_node(
    run_dir: Path, endpoint: str, start_id: str, forwarder: Forwarder, *, slurm_job: str | None = None
) -> int:
    """Run this node's workers of a prepared run. Raises UserError for a run without data or that others run."""
    config = load_config(run_dir)
    if is_complete(run_dir):
        return DONE
    restore(config.model)
    check_machine(config.cluster, config.parallel, config.quant, config.optim, config.train)

    def lead() -> int:
        if slurm_job is not None:
            note_job(run_dir, slurm_job)
        # The submitting node showed no GPUs of the job.
        keep(run_dir, planned(config, run_dir=run_dir, runs_here=True))
        return DONE

    rendezvous = None
    if config.cluster.nodes > 1:  # One node needs no port.
        rendezvous = make_rendezvous(
            endpoint, nodes=config.cluster.nodes, run_id=start_id, join_seconds=config.cluster.timeout_seconds
        )
    return run_node(run_dir, config.cluster, rendezvous, forwarder, lead)


if __name__ == "__main__":
    sys.exit(main())
