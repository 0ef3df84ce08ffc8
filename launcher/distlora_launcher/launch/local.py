"""A run on this machine: its folder, the preparation of its data, its workers; and the rest of one (`resume`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from distlora.config import Config, UserError
from distlora.config.file import as_mapping
from distlora.config.json_files import object_or_empty
from distlora.run_folder.layout import (
    DATA_NAME,
    PLAN_NAME,
    checkpoint_folders,
    find_result,
)
from distlora.system import atomic_io
from distlora.system.exit_codes import (
    BAD_INPUT,
    DONE,
    FAILED,
    STOPPED,
)
from distlora_launcher.compose.checks import check, check_run_dir
from distlora_launcher.compose.hub import is_to_download, localize, restore
from distlora_launcher.compose.hub_preview import with_small_files
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.failures import would_repeat
from distlora_launcher.launch.final_report import write_final_report
from distlora_launcher.launch.lock import CONFIG_NAME, leave, running
from distlora_launcher.launch.rendezvous import Meeting
from distlora_launcher.launch.signals import Forwarder, forwarding
from distlora_launcher.launch.starting import Starting
from distlora_launcher.launch.worker_entry import PARENT
from distlora_launcher.launch.workers import QUANTIZED, run_workers, starting_workers
from distlora_launcher.terminal.output import say, shown

WORKER = "distlora.training.worker"


def start(config: Config) -> int:
    """Make the run folder, prepare the data, run the workers to the end. Returns the exit code."""
    run_dir = Path(config.run_dir)
    with early(run_dir, config) as starting:
        code, config = make_run(config)
        if code != DONE:
            say_how_to_go_on(run_dir, code)
            return code
        with running(run_dir):
            return train(run_dir, config, starting=starting)


def early(run_dir: Path, config: Config) -> Starting:
    """torchrun for the workers of a run, which imports what they need while the data is prepared."""
    family = object_or_empty(Path(config.model.path) / "config.json").get("model_type")
    return starting_workers(
        run_dir,
        processes=config.cluster.gpus_per_node,
        worker_module=WORKER,
        max_restarts=config.cluster.max_restarts,
        imports=[
            *([QUANTIZED] if config.quant.is_nf4 else []),
            *(["wandb"] if config.tracker.name == "wandb" else []),
            *([f"transformers.models.{family}.modeling_{family}"] if isinstance(family, str) else []),
        ],
    )


def make_run(config: Config) -> tuple[int, Config]:
    """All of a run that needs no worker: its model here, its folder, its data prepared. Returns the exit code, and the
    settings as they are in RUN/config.yaml. Where the preparation fails, no run is left; one that was stopped in it
    (75) can be resumed."""
    run_dir = Path(config.run_dir)
    check_run_dir(run_dir)
    record = None
    if is_to_download(config):
        code, record = prepare_before_download(config)
        if code != DONE:
            return code, config
    config = localize(config)
    plan = planned(config)
    create_run(run_dir, config)
    say(f"run folder {shown(run_dir)}")
    with running(run_dir):
        keep(run_dir, plan, runs_here=config.cluster.launcher != "slurm")
        if record is not None:
            atomic_io.write_text(run_dir / DATA_NAME, record)
            return DONE, config
        code = prepare(run_dir)
        if code not in (DONE, STOPPED):
            forget_run(run_dir)
        return code, config


def resume_here(run_dir: Path, config: Config) -> int:
    """Continue a run from its newest checkpoint, or from the start where it has none. Returns the exit code."""
    restore(config)
    check(config, new_run=False)
    with early(run_dir, config) as starting, running(run_dir):
        plan = planned(config, run_dir=run_dir)
        say(f"run folder {shown(run_dir)}")
        keep(run_dir, plan)
        if not is_prepared(run_dir):
            code = prepare(run_dir)
            if code != DONE:
                say_how_to_go_on(run_dir, code)
                return code
        return train(run_dir, config, starting=starting)


def train(
    run_dir: Path,
    config: Config,
    worker_module: str = WORKER,
    *,
    forwarder: Forwarder | None = None,
    meeting: Meeting | None = None,
    starting: Starting | None = None,
) -> int:
    """Run this machine's workers of a prepared run. `starting`: as `early` has it."""
    processes = config.cluster.gpus_per_node
    say(f"starting {processes} worker{'s' if processes > 1 else ''} (importing torch takes a few seconds)")
    started = time.monotonic()
    code = run_workers(
        run_dir,
        processes=processes,
        worker_module=worker_module,
        max_restarts=config.cluster.max_restarts,
        meeting=meeting,
        forwarder=forwarder,
        starting=starting,
    )
    if code == DONE:
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        say(f"done in {minutes}:{seconds:02}: {shown(find_result(run_dir) or run_dir)}")
        write_final_report(run_dir)
    elif code == BAD_INPUT or find_result(run_dir) is not None or would_repeat(run_dir / "logs"):
        pass  # What was refused once is refused again, and what has ended has ended.
    elif code == STOPPED and config.cluster.launcher == "slurm":
        pass  # Its script queues it again, or was told not to.
    else:
        saved = checkpoint_folders(run_dir)
        since = f"from {saved[-1].name}" if saved else "from its start, as nothing was saved yet (train.save_every)"
        everywhere = " on each machine" if config.cluster.on_each_machine else ""
        say(f"continue {since} with: distlora resume {shown(run_dir)}{everywhere}")
    return code


def is_complete(run_dir: Path) -> bool:
    """Whether a run has its result, which is said where it has."""
    result = find_result(run_dir)
    if result is not None:
        say(f"{shown(run_dir)} is complete: {shown(result)}")
    return result is not None


def say_how_to_go_on(run_dir: Path, code: int) -> None:
    """After a run was stopped before its workers were started."""
    if code == STOPPED and (run_dir / CONFIG_NAME).is_file():
        say(f"continue with: distlora resume {shown(run_dir)}")


def create_run(run_dir: Path, config: Config) -> None:
    """Write RUN/config.yaml, whole, and only if there is none: of two starts with one folder, one is refused."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{CONFIG_NAME}-{secrets.token_hex(8)}"  # A pid would be another container's, too.
    with temporary.open("w") as file:
        yaml.safe_dump(as_mapping(config), file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, run_dir / CONFIG_NAME)
    except FileExistsError as error:
        raise UserError(f"run_dir={run_dir} already holds a run; set another run_dir") from error
    finally:
        temporary.unlink()


def forget_run(run_dir: Path) -> None:
    """Take back what `create_run` made, so that the same command works once its data is corrected."""
    (run_dir / CONFIG_NAME).unlink()
    for name in (DATA_NAME, PLAN_NAME):
        (run_dir / name).unlink(missing_ok=True)
    leave(run_dir)
    remove_if_empty(run_dir)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that Hydra or we made and nothing was written into."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def is_prepared(run_dir: Path) -> bool:
    """Whether the rows that RUN/data.json names are still in the cache; a damaged record is made again."""
    cache = object_or_empty(run_dir / DATA_NAME).get("cache")
    return isinstance(cache, str) and os.path.isdir(cache)  # False, too, for what is no path.


def prepare(run_dir: Path, forwarder: Forwarder | None = None) -> int:
    """Tokenize the run's data in a process of its own, which explains its own failures. Returns its exit code; 75 when
    it was asked to stop, since nothing is lost by that. `forwarder` takes signals already.
    """
    command = [sys.executable, "-m", "distlora_launcher.launch.bound", "distlora.data", str(run_dir)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", PARENT: str(os.getpid())}
    with contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests:
        say("preparing the data")
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        requests.attach(process)
        code = process.wait()
        requests.detach()
    if requests.received is not None and code != BAD_INPUT:
        say(f"stopped by {signal.Signals(requests.received).name} while the data was prepared")
        return STOPPED
    return code if code >= 0 else FAILED


def prepare_before_download(config: Config) -> tuple[int, str | None]:
    """(exit code, data.json) of the preparation with the small files of a model on the hub.

    What the tokenizer refuses (chats without a template) is so refused before the weights are downloaded. The record
    is the run's own: the cache's key does not depend on where the tokenizer's files lie.
    """
    with with_small_files(config) as here, tempfile.TemporaryDirectory(prefix="distlora-prepare-") as scratch:
        create_run(Path(scratch), here)
        code = prepare(Path(scratch))
        return code, (Path(scratch) / DATA_NAME).read_text(encoding="utf-8") if code == DONE else None
