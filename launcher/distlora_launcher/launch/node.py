"""A run of several nodes that share its folder: each node runs its own workers, one node prepares what all need.

cluster=torchrun: the same `distlora train` on each node. Any of them makes the run folder; the node of the rendezvous
endpoint prepares the data, and the others join if their settings are equal. SLURM: a run that is already prepared.

    python -m distlora_launcher.launch.node RUN --rdzv-endpoint HOST:PORT --rdzv-id ID [--slurm-job JOB]

SLURM's script starts it on each node; it can be started by hand. RUN is a folder that all nodes share, with its
settings and prepared data; ID tells this start from others. JOB is written to RUN/slurm.json once the run is locked, so
a job that is refused does not replace the job that has the run. Exit codes: 0, 1, 2 and 75.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora_launcher.launch.processes import block

# Before the slow imports: by default SIGUSR1 kills a process.
if __name__ == "__main__":
    block()

from distlora.config import ClusterConfig, Config, UserError, require
from distlora.config.file import load_config, settings_by_name
from distlora.run_folder.layout import DATA_NAME, checkpoint_folders
from distlora.run_folder.submission import note_job
from distlora.system.exit_codes import DONE, STOPPED, run_to_exit_code
from distlora_launcher.compose.checks import check, check_gpu_count, check_machine, check_writable, gpu_count
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.local import create_run, forget_run, is_complete, is_prepared, prepare, train
from distlora_launcher.launch.lock import CONFIG_NAME, lock_node
from distlora_launcher.launch.logs import set_aside_logs
from distlora_launcher.launch.processes import Forwarder, forwarding, host_name
from distlora_launcher.launch.rendezvous import make_rendezvous
from distlora_launcher.terminal.output import say, shown


def start_multi_node(config: Config) -> int:
    """Make or join a run that the same command starts on each node, and run this node's workers. Returns the exit code.

    Raises UserError for a folder with a run that was started before, and for settings that differ from the run's.
    """
    run_dir = Path(config.run_dir)
    check_writable(run_dir, "run_dir")
    config = dataclasses.replace(config, model=localize(config.model))
    plan = planned(config, runs_here=True)
    if not (run_dir / CONFIG_NAME).is_file():
        with contextlib.suppress(UserError):  # Another node was faster.
            create_run(run_dir, config)
    check_same_settings(settings_by_name(config), settings_by_name(load_config(run_dir)), run_dir)
    say(f"run folder {shown(run_dir)}")
    with forwarding() as forwarder:

        def lead() -> int:
            if (run_dir / "logs").is_dir() or checkpoint_folders(run_dir):
                raise UserError(
                    f"run_dir={run_dir} already holds a run; continue it with `distlora resume {run_dir}` on each "
                    "node, or set another run_dir"
                )
            keep(run_dir, plan)
            code = DONE if is_prepared(run_dir) else prepare(run_dir, forwarder)
            if code not in (DONE, STOPPED):
                forget_run(run_dir)
            return code

        return run_node_of(run_dir, config.cluster, forwarder, lead)


def resume_multi_node(run_dir: Path) -> int:
    """Run this node's workers of a run that the same command continues on each node. Returns the exit code."""
    config = load_config(run_dir)
    restore(config.model)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir, runs_here=True)
    say(f"run folder {shown(run_dir)}")
    with forwarding() as forwarder:

        def lead() -> int:
            keep(run_dir, plan)
            return DONE if is_prepared(run_dir) else prepare(run_dir, forwarder)

        return run_node_of(run_dir, config.cluster, forwarder, lead)


def run_node_of(run_dir: Path, cluster: ClusterConfig, forwarder: Forwarder, lead: Callable[[], int]) -> int:
    """Call `run_node` for cluster=torchrun: the endpoint is a setting, and each node derives the same id."""
    assert cluster.rdzv_endpoint is not None, "ClusterConfig requires it"
    # From its whole path: two runs may have the same endpoint.
    start_id = f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
    return run_node(run_dir, cluster, cluster.rdzv_endpoint, start_id, forwarder, lead=lead)


def run_node(
    run_dir: Path,
    cluster: ClusterConfig,
    endpoint: str,
    start_id: str,
    forwarder: Forwarder,
    *,
    lead: Callable[[], int],
) -> int:
    """Hold the run as one of its nodes and run this node's workers. Returns the exit code.

    `lead` prepares the run, on one node, before the others join; an exit code other than 0 ends the start. Raises
    UserError for a run that another start holds, and on a node that does not see the prepared data or has no GPU while
    others do.
    """
    rendezvous = make_rendezvous(endpoint, nodes=cluster.nodes, run_id=start_id, join_seconds=cluster.timeout_seconds)

    def stopped() -> bool:
        return forwarder.received is not None

    with lock_node(run_dir, rendezvous, stopped) as lock:
        if lock is not None:
            if lock.leads:
                code = lead()
                if code != DONE:
                    return code
                set_aside_logs(run_dir / "logs")
            if not is_prepared(run_dir) and not stopped():
                require(
                    not (run_dir / DATA_NAME).is_file(),
                    f"{host_name()} does not see the packed sequences that {run_dir / DATA_NAME} names; set "
                    "data.cache_dir to a folder that all nodes share, and start the run again",
                )
                raise UserError(
                    f"the data of {run_dir} is not fully prepared; continue with `distlora resume {run_dir}` on each "
                    "node"
                )
            check_gpus(cluster, lock.gpus_elsewhere)
        if stopped():
            say("stopped before the workers were started")
            return STOPPED
        # A job of one node needs no port.
        return train(run_dir, cluster, forwarder=forwarder, rendezvous=rendezvous if cluster.nodes > 1 else None)


def check_gpus(cluster: ClusterConfig, gpus_elsewhere: Mapping[str, int]) -> None:
    """Refuse a node with fewer GPUs than processes, and nodes with GPUs among nodes without."""
    check_gpu_count(cluster)
    count = gpu_count()
    for host, gpus in gpus_elsewhere.items():
        if bool(gpus) != bool(count):
            raise UserError(
                f"{host_name()} shows {count} GPUs and {host} {gpus}; start the run where all nodes have GPUs, or hide "
                "them on each node with CUDA_VISIBLE_DEVICES="
            )


def check_same_settings(these: Mapping[str, Any], run: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse settings (`settings_by_name`) that differ from those of a run that another node has made."""
    names = sorted(name for name in these.keys() | run.keys() if these.get(name) != run.get(name))
    lines = [f"{name}={these.get(name)} here, {name}={run.get(name)} in the run" for name in names]
    if lines:
        raise UserError(
            f"the settings differ from those of {run_dir}: {'; '.join(lines)}; give the same command on each node"
        )


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
        keep(
            run_dir, planned(config, run_dir=run_dir, runs_here=True)
        )  # The submitting node showed no GPUs of the job.
        return DONE

    return run_node(run_dir, config.cluster, endpoint, start_id, forwarder, lead=lead)


if __name__ == "__main__":
    sys.exit(main())
