"""A run on this node: its folder, the preparation of its data, its workers, and its resume.

With cluster=torchrun the same `distlora train` or `resume` runs on each node, and the nodes share the run's folder. Any
of them makes it, the node of the rendezvous endpoint prepares the data, the others join if their settings are equal.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distlora.checkpoint.state import newest_state
from distlora.config import ClusterConfig, Config, UserError, require
from distlora.config.file import as_mapping, load_config, settings_by_name
from distlora.config.json_files import object_or_empty
from distlora.planner import Plan
from distlora.run_folder.layout import (
    CHECKPOINTS,
    COMPILED_NAME,
    DATA_NAME,
    PLAN_NAME,
    checkpoint_folders,
    find_result,
)
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from distlora.system.numbers import clock
from distlora.system.stop_signals import Forwarder, forwarding
from distlora_launcher.compose.checks import check, check_gpu_count, check_run_dir, check_writable, gpu_count
from distlora_launcher.compose.hub import is_to_download, localize, restore, with_small_files
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.bound import start_command
from distlora_launcher.launch.failures import set_aside_logs, would_repeat
from distlora_launcher.launch.lock import CONFIG_NAME, MACHINES, host_name, lock_run
from distlora_launcher.launch.rendezvous import Rendezvous, make_rendezvous
from distlora_launcher.launch.workers import import_while, run_workers
from distlora_launcher.report.run_page import write_final_report
from distlora_launcher.terminal.output import say, shown


def start_run(plan: Plan) -> int:
    """Make the folder of a planned run, prepare the data, run the workers to the end. Returns the exit code."""
    run_dir, cluster = Path(plan.config.run_dir), plan.config.cluster
    if cluster.on_each_node:
        return start_on_each_node(plan.config)
    used, present = cluster.gpus_per_node, gpu_count()
    if used < present:
        say(f"uses {used} of this node's {present} GPUs; cluster.gpus_per_node={present} uses all")
    code, config = make_run(plan)
    if code != DONE:
        print_resume_hint(run_dir, code)
        return code
    with forwarding() as forwarder:
        return run_node(run_dir, config.cluster, None, forwarder, lambda: DONE)


def start_on_each_node(config: Config) -> int:
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
            code = DONE if is_prepared(run_dir) else prepare(run_dir, forwarder=forwarder, trains=config)
            if code not in (DONE, STOPPED):
                forget_run(run_dir)
            return code

        return run_node(run_dir, config.cluster, find_rendezvous(run_dir, config.cluster), forwarder, lead)


def make_run(plan: Plan) -> tuple[int, Config]:
    """Download the model, make the run folder and prepare the data: all of a run that needs no worker.

    Returns the exit code and the settings as they are in RUN/config.yaml. If the preparation fails, no run is left; if
    it is stopped (75), the run can be resumed.
    """
    config = plan.config
    run_dir, record = Path(config.run_dir), None
    check_run_dir(run_dir)
    if is_to_download(config.model):
        code, record = prepare_before_download(config)
        if code != DONE:
            return code, config
    config = dataclasses.replace(config, model=localize(config.model))
    create_run(run_dir, config)
    say(f"run folder {shown(run_dir)}")
    with lock_run(run_dir):
        keep(run_dir, dataclasses.replace(plan, config=config), runs_here=config.cluster.launcher != "slurm")
        if record is not None:
            atomic_io.write_text(run_dir / DATA_NAME, record)
            return DONE, config
        code = prepare(run_dir, trains=config if config.cluster.launcher != "slurm" else None)
        if code not in (DONE, STOPPED):
            forget_run(run_dir)
        return code, config


def resume_run(run_dir: Path) -> int:
    """Continue a run from its newest checkpoint, or from the start if it has none. Returns the exit code."""
    config = load_config(run_dir)
    restore(config.model)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir, runs_here=True)
    say(f"run folder {shown(run_dir)}")
    with forwarding() as forwarder:

        def lead() -> int:
            keep(run_dir, plan)
            return DONE if is_prepared(run_dir) else prepare(run_dir, forwarder=forwarder, trains=config)

        return run_node(run_dir, config.cluster, find_rendezvous(run_dir, config.cluster), forwarder, lead)


def find_rendezvous(run_dir: Path, cluster: ClusterConfig) -> Rendezvous | None:
    """Return the rendezvous of a run that the same command starts on each node; None for a run on one node."""
    if not cluster.on_each_node:
        return None
    assert cluster.rdzv_endpoint is not None, "ClusterConfig requires it"
    # From its whole path: two runs may have the same endpoint.
    start_id = f"{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
    return make_rendezvous(
        cluster.rdzv_endpoint, nodes=cluster.nodes, run_id=start_id, join_seconds=cluster.timeout_seconds
    )


def run_node(
    run_dir: Path,
    cluster: ClusterConfig,
    rendezvous: Rendezvous | None,
    forwarder: Forwarder,
    lead: Callable[[], int],
) -> int:
    """Hold the run, alone or as one of its nodes, and run this node's workers. Returns the exit code.

    `lead` prepares the run, on one node, before the others join; an exit code other than 0 ends the start. Raises
    UserError for a run that another start holds, and on a node that does not see the prepared data or has no GPU while
    others do.
    """
    on_each = " on each node" if cluster.on_each_node else ""

    def stopped() -> bool:
        return forwarder.received is not None

    with lock_run(run_dir, rendezvous, stopped) as lock:
        if lock is not None:
            if lock.leads:
                code = lead()
                if code != DONE:
                    print_resume_hint(run_dir, code, on_each)
                    return code
                set_aside_logs(run_dir / "logs")
            if not is_prepared(run_dir) and not stopped():
                require(
                    not (run_dir / DATA_NAME).is_file(),
                    f"{host_name()} does not see the packed sequences that {run_dir / DATA_NAME} names; set "
                    "data.cache_dir to a folder that all nodes share, and start the run again",
                )
                raise UserError(
                    f"the data of {run_dir} is not fully prepared; continue with `distlora resume {run_dir}`{on_each}"
                )
            check_gpus(cluster, lock.gpus)
        if stopped():
            say("stopped before the workers were started")
            print_resume_hint(run_dir, STOPPED, on_each)
            return STOPPED
        processes = cluster.gpus_per_node
        say(f"starting {processes} worker{'s' if processes > 1 else ''} (importing torch takes a few seconds)")
        started = time.monotonic()
        code = run_workers(
            run_dir,
            processes=processes,
            max_restarts=cluster.max_restarts,
            rendezvous=rendezvous,
            forwarder=forwarder,
        )
        if code == DONE:
            say(f"done in {clock(time.monotonic() - started)}: {shown(find_result(run_dir) or run_dir)}")
            write_final_report(run_dir)
            return code
        ends_for_good = code == BAD_INPUT or find_result(run_dir) is not None or would_repeat(run_dir / "logs")
        if not ends_for_good and not (code == STOPPED and cluster.launcher == "slurm"):  # SLURM's script requeues it.
            saved = checkpoint_folders(run_dir)
            source = saved[-1].name if saved else "the start, as nothing was saved yet (train.save_every)"
            say(f"continue from {source} with: distlora resume {shown(run_dir)}{on_each}")
        return code


def check_gpus(cluster: ClusterConfig, gpus_by_host: Mapping[str, int]) -> None:
    """Refuse a node with fewer GPUs than processes, and nodes with GPUs among nodes without."""
    check_gpu_count(cluster)
    count = gpu_count()
    for host, gpus in gpus_by_host.items():
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


def is_complete(run_dir: Path) -> bool:
    """Return whether a run has its result, and print it."""
    result = find_result(run_dir)
    if result is not None:
        say(f"{shown(run_dir)} is complete: {shown(result)}")
    return result is not None


def print_resume_hint(run_dir: Path, code: int, on_each: str = "") -> None:
    """Print how to continue a run that was stopped before its workers were started."""
    if code == STOPPED and (run_dir / CONFIG_NAME).is_file():
        say(f"continue with: distlora resume {shown(run_dir)}{on_each}")


def create_run(run_dir: Path, config: Config) -> None:
    """Write RUN/config.yaml in one step. Raises UserError if there is one: of two starts, one is refused."""
    write_new(run_dir / CONFIG_NAME, as_mapping(config), "run")


def write_new(path: Path, values: Mapping[str, Any], what: str) -> None:
    """Write a YAML file atomically. Raises UserError if it exists: its folder already holds a `what`."""
    atomic_io.private_folder(path.parent)
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"  # Not the pid: two containers have equal ones.
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError as error:
        raise UserError(f"run_dir={path.parent} already holds a {what}; set another run_dir") from error
    finally:
        temporary.unlink(missing_ok=True)


def forget_run(run_dir: Path) -> None:
    """Remove what `create_run` and the preparation made, so that the corrected command can use the same folder."""
    (run_dir / CONFIG_NAME).unlink()
    for name in (DATA_NAME, PLAN_NAME, COMPILED_NAME):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / MACHINES, ignore_errors=True)
    remove_if_empty(run_dir)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was written into."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def is_prepared(run_dir: Path) -> bool:
    """Return whether the packed sequences that RUN/data.json names are in the cache, and those of RUN/config.yaml.

    False for a damaged record, and for other data than a checkpoint was trained on; records of earlier versions do not
    say of which settings they are.
    """
    record = object_or_empty(run_dir / DATA_NAME)
    cache, preparation = record.get("cache"), record.get("preparation")
    is_there = isinstance(cache, str) and os.path.isdir(cache)
    if not is_there or preparation not in (None, load_config(run_dir).preparation):
        return False
    newest = newest_state(run_dir / CHECKPOINTS)
    return newest is None or newest[1].identity.data_digest == record.get("content")


def prepare(run_dir: Path, forwarder: Forwarder | None = None, *, trains: Config | None = None) -> int:
    """Tokenize a run's data in a process that prints its own errors. Returns its exit code, 75 if it was stopped.

    forwarder: handles signals already; None: signals are handled for the duration. trains: the run whose workers start
    next in this process, which imports meanwhile what they need.
    """
    with contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests:
        say("preparing the data")
        process = start_command("distlora.data.prepare", str(run_dir), stdin=None)
        requests.attach(process)
        if trains is not None:
            workers = trains.cluster.gpus_per_node
            import_while(process, trains.model, trains.quant, trains.tracker, workers=workers)
        code = process.wait()
        requests.detach()
    if requests.received is not None and code != BAD_INPUT:
        say(f"stopped by {signal.Signals(requests.received).name} while the data was prepared")
        return STOPPED
    return code if code >= 0 else FAILED


def prepare_before_download(config: Config) -> tuple[int, str | None]:
    """Prepare the data with the small files of a hub model. Returns the exit code and the text of data.json.

    So what the tokenizer refuses (chats without a template) is refused before the weights are downloaded. The cache's
    key does not depend on where the tokenizer's files are.
    """
    with (
        with_small_files(config.model) as model,
        tempfile.TemporaryDirectory(prefix="distlora-prepare-") as scratch,
    ):
        create_run(Path(scratch), dataclasses.replace(config, model=model))
        code = prepare(Path(scratch), trains=config if config.cluster.launcher != "slurm" else None)
        return code, (Path(scratch) / DATA_NAME).read_text(encoding="utf-8") if code == DONE else None
