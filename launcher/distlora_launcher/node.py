"""One machine's part in a run of several: its workers, from start to end.

    python -m distlora_launcher.node RUN --rdzv-endpoint HOST:PORT --rdzv-id ID

Started on each machine by SLURM's script, or by hand. RUN is a folder that all machines share, with its settings
(config.yaml) and prepared data; ID tells this start of it from others. Ends with our exit codes, 0, 1, 2 and 75.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distlora_launcher.signals import hold

# Before what takes long to import: SIGUSR1 ends a process that does nothing about it.
if __name__ == "__main__":
    hold()

from distlora.command_line import run_to_exit_code
from distlora.config import Config, UserError
from distlora.config_file import load_config
from distlora.run_folder import DATA_NAME, find_result
from distlora_launcher.checks import check_machine
from distlora_launcher.holding import together
from distlora_launcher.hub import restore
from distlora_launcher.local import is_prepared, say, shown, train
from distlora_launcher.logs import host_name, set_aside_logs
from distlora_launcher.meeting import meet, wait_for_host
from distlora_launcher.signals import Forwarder, forwarding
from distlora_launcher.workers import DONE, STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this machine's workers of the run that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora_launcher.node", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", required=True, help="where the machines meet")
    parser.add_argument("--rdzv-id", metavar="ID", required=True, help="the same on each machine of one start")
    options = parser.parse_args(arguments)
    with forwarding() as forwarder:
        return run_to_exit_code(
            lambda: run_node(options.run.absolute(), options.rdzv_endpoint, options.rdzv_id, forwarder)
        )


def run_node(run_dir: Path, endpoint: str, run_id: str, forwarder: Forwarder) -> int:
    """Run this machine's workers of a prepared run. Raises UserError for a run without data or that others run."""
    config = load_config(run_dir)
    result = find_result(run_dir)
    if result is not None:
        say(f"{shown(run_dir)} is complete: {shown(result)}")
        return DONE
    check_machine(config)
    restore(config)

    return run_together(run_dir, config, endpoint, run_id, forwarder)


def run_together(
    run_dir: Path,
    config: Config,
    endpoint: str,
    run_id: str,
    forwarder: Forwarder,
    *,
    lead: Callable[[], int] | None = None,
    worker_module: str = "distlora.train",
) -> int:
    """Hold a place among the machines of the start `run_id` and run this one's workers. `lead` is what one machine does
    before the others go on, which its exit code ends unless it is 0. Raises UserError for a run that another start has,
    and on a machine that does not see the prepared data.
    """
    cluster = config.cluster
    meeting = meet(endpoint, nodes=cluster.nodes, run_id=run_id, join_seconds=cluster.timeout_seconds)

    def stopped() -> bool:
        return forwarder.received is not None

    with together(
        run_dir, run_id, nodes=cluster.nodes, stopped=stopped, leads_without_locks=meeting.is_host is not False
    ) as place:
        if place is not None:
            if place.leads:
                set_aside_logs(run_dir / "logs")
                code = lead() if lead is not None else DONE
                if code != DONE:
                    return code
            place.share()
            if not is_prepared(run_dir) and not stopped():
                raise UserError(not_prepared(run_dir, config))
            wait_for_host(meeting, stopped)
        if stopped():
            say("stopped before the workers were started")
            return STOPPED
        return train(run_dir, config, worker_module, forwarder=forwarder, meeting=meeting)


def not_prepared(run_dir: Path, config: Config) -> str:
    """Why this machine cannot take part, when it sees no prepared data."""
    if (run_dir / DATA_NAME).is_file():
        return (
            f"{host_name()} does not see the rows that {run_dir / DATA_NAME} names; set data.cache_dir (now "
            f"{config.data.cache_dir}) to a folder that all machines share, and start the run again"
        )
    return (
        f"the data of {run_dir} was not prepared to the end; continue with `distlora resume {run_dir}` on each machine"
    )


if __name__ == "__main__":
    sys.exit(main())
