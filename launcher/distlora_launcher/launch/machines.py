"""A run of several machines that share its folder: each runs its own workers, and one prepares what all need.

cluster=torchrun: the same `distlora train` on each machine; the first makes the run and prepares its data, the others
join it if their settings are the same. SLURM: `node.py` on each machine of a run that is made and prepared.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError
from distlora.config.file import as_mapping, load_config
from distlora.run_folder.layout import DATA_NAME, checkpoint_folders
from distlora.system.exit_codes import DONE, STOPPED
from distlora_launcher.compose.checks import (
    check,
    check_machine,
    check_writable,
    gpu_count,
)
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.local import (
    create_run,
    forget_run,
    is_prepared,
    prepare,
    train,
)
from distlora_launcher.launch.lock import CONFIG_NAME, together
from distlora_launcher.launch.logs import host_name, set_aside_logs
from distlora_launcher.launch.rendezvous import meet, wait_for_host
from distlora_launcher.launch.signals import Forwarder, forwarding
from distlora_launcher.terminal.output import say, shown


def start_together(config: Config) -> int:
    """This machine's part in a run that the same command starts on each: make it or join it. Returns the exit code.

    Raises UserError for a folder that holds a run which was started before, and for settings that are not the run's.
    """
    run_dir = Path(config.run_dir)
    check_writable(run_dir, "run_dir")
    config = localize(config)
    plan = planned(config, runs_here=True)
    if not (run_dir / CONFIG_NAME).is_file():
        with contextlib.suppress(UserError):  # Another machine was faster.
            create_run(run_dir, config)
    check_same(config, load_config(run_dir))
    say(f"run folder {shown(run_dir)}")
    with forwarding() as forwarder:

        def lead() -> int:
            if (run_dir / "logs").is_dir() or checkpoint_folders(run_dir):
                raise UserError(
                    f"run_dir={run_dir} already holds a run; continue it with `distlora resume {run_dir}` on each "
                    "machine, or set another run_dir"
                )
            keep(run_dir, plan)
            code = DONE if is_prepared(run_dir) else prepare(run_dir, forwarder)
            if code not in (DONE, STOPPED):
                forget_run(run_dir)
            return code

        return run_by_hand(run_dir, config, forwarder, lead)


def resume_together(run_dir: Path, config: Config) -> int:
    """This machine's part in the rest of a run, when the same command is given on each. Returns the exit code."""
    restore(config)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir, runs_here=True)
    say(f"run folder {shown(run_dir)}")
    with forwarding() as forwarder:

        def lead() -> int:
            keep(run_dir, plan)
            return DONE if is_prepared(run_dir) else prepare(run_dir, forwarder)

        return run_by_hand(run_dir, config, forwarder, lead)


def run_by_hand(
    run_dir: Path,
    config: Config,
    forwarder: Forwarder,
    lead: Callable[[], int],
    worker_module: str = "distlora.training.worker",
) -> int:
    """`run_together` with what SLURM's script would give: the endpoint, and an id that each machine can tell."""
    endpoint = config.cluster.rdzv_endpoint
    assert endpoint is not None, "config/cluster.py asks for one"
    return run_together(run_dir, config, endpoint, run_id(run_dir), forwarder, lead=lead, worker_module=worker_module)


def run_id(run_dir: Path) -> str:
    """What the machines of a run call its start. Of the folder's whole path: two runs may have the same endpoint."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def run_together(
    run_dir: Path,
    config: Config,
    endpoint: str,
    start_id: str,
    forwarder: Forwarder,
    *,
    lead: Callable[[], int],
    worker_module: str = "distlora.training.worker",
) -> int:
    """Hold a place among the machines of the start `start_id` and run this one's workers. `lead` is what one machine
    does before the others go on, which its exit code ends unless it is 0. Raises UserError for a run that another start
    has, and on a machine that does not see the prepared data, or has no GPU where the leader has.
    """
    cluster = config.cluster
    meeting = meet(endpoint, nodes=cluster.nodes, run_id=start_id, join_seconds=cluster.timeout_seconds)

    def stopped() -> bool:
        return forwarder.received is not None

    with together(
        run_dir,
        start_id,
        nodes=cluster.nodes,
        stopped=stopped,
        leads_without_locks=meeting.is_host is not False,
        shares_machine=meeting.is_host is None,
    ) as place:
        if place is not None:
            if place.leads:
                code = lead()
                if code != DONE:
                    return code
                set_aside_logs(run_dir / "logs")
            place.share()
            # First: its store listens once the run is prepared, which is all that tells where there are no locks.
            wait_for_host(meeting, stopped)
            if not is_prepared(run_dir) and not stopped():
                raise UserError(not_prepared(run_dir, config))
            check_gpus(config, place.start)
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


def check_gpus(config: Config, start: Mapping[str, Any]) -> None:
    """Refuse a machine with fewer GPUs than processes, and one without among machines that have some (or the other way
    round), whose ranks cannot talk. `start` is the leader's record.
    """
    check_machine(config)
    leader, here = int(start.get("gpus", gpu_count())), gpu_count()
    if bool(leader) != bool(here):
        raise UserError(
            f"{host_name()} shows {here} GPUs, and {start['leader']}, which leads the run, {leader}; start it where "
            "all machines have them, or hide them on each with CUDA_VISIBLE_DEVICES="
        )


def check_same(mine: Config, theirs: Config) -> None:
    """Refuse settings that are not those of the run, which another machine has made."""
    differing = list(_differences(as_mapping(mine), as_mapping(theirs)))
    if differing:
        lines = [f"{name}={ours} here, {name}={run} in the run" for name, ours, run in differing]
        raise UserError(
            f"the settings differ from those that {theirs.run_dir} was started with: {'; '.join(lines)}; give the same "
            "command on each machine"
        )


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(name, here, in the run) of each setting that differs."""
    for key in sorted(mine.keys() | theirs.keys()):
        ours, run = mine.get(key), theirs.get(key)
        if isinstance(ours, Mapping) and isinstance(run, Mapping):
            yield from _differences(ours, run, f"{prefix}{key}.")
        elif ours != run:
            yield f"{prefix}{key}", ours, run
