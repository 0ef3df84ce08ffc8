"""A run on this node: its folder, the preparation of its data, its workers, and its resume."""

import contextlib
import dataclasses
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distlora.checkpoint.state import newest_state
from distlora.config import ClusterConfig, Config, UserError
from distlora.config.file import as_mapping, load_config
from distlora.config.json_files import object_or_empty
from distlora.planner import Plan
from distlora.run_folder.layout import (
    CHECKPOINTS,
    COMPILED_NAME,
    DATA_NAME,
    METRICS_NAME,
    PLAN_NAME,
    REPORT_NAME,
    checkpoint_folders,
    find_result,
)
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from distlora.system.numbers import clock
from distlora_launcher.compose.checks import check, check_run_dir, gpu_count
from distlora_launcher.compose.hub import is_to_download, localize, restore, with_small_files
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.launch.failures import would_repeat
from distlora_launcher.launch.lock import CONFIG_NAME, lock_run, remove_records
from distlora_launcher.launch.processes import Forwarder, forwarding
from distlora_launcher.launch.rendezvous import Rendezvous
from distlora_launcher.launch.worker_entry import PARENT
from distlora_launcher.launch.workers import QUANTIZED_IMPORT, Torchrun, prepare_torchrun, run_workers
from distlora_launcher.report.records import PageStatus, read_run
from distlora_launcher.report.run_page import run_report
from distlora_launcher.terminal.output import say, shown, warn


def start_run(plan: Plan) -> int:
    """Make the folder of a planned run, prepare the data, run the workers to the end. Returns the exit code."""
    run_dir = Path(plan.config.run_dir)
    used, present = plan.config.cluster.gpus_per_node, gpu_count()
    if used < present:
        say(f"uses {used} of this node's {present} GPUs; cluster.gpus_per_node={present} uses all")
    with start_torchrun_early(run_dir, plan.config) as torchrun:
        code, config = make_run(plan)
        if code != DONE:
            print_resume_hint(run_dir, code)
            return code
        with lock_run(run_dir):
            return train(run_dir, config.cluster, torchrun=torchrun)


def start_torchrun_early(run_dir: Path, config: Config) -> Torchrun:
    """Start torchrun's process, which imports what the workers need while the data is prepared."""
    family = object_or_empty(Path(config.model.path) / "config.json").get("model_type")
    return prepare_torchrun(
        run_dir,
        processes=config.cluster.gpus_per_node,
        max_restarts=config.cluster.max_restarts,
        imports=[
            *([QUANTIZED_IMPORT] if config.quant.default_format else []),
            *(["wandb"] if config.tracker.wandb else []),
            *([f"transformers.models.{family}.modeling_{family}"] if isinstance(family, str) else []),
        ],
    )


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
        code = prepare(run_dir)
        if code not in (DONE, STOPPED):
            forget_run(run_dir)
        return code, config


def resume_run(run_dir: Path) -> int:
    """Continue a run from its newest checkpoint, or from the start if it has none. Returns the exit code."""
    config = load_config(run_dir)
    restore(config.model)
    check(config, new_run=False)
    with start_torchrun_early(run_dir, config) as torchrun, lock_run(run_dir):
        plan = planned(config, run_dir=run_dir)
        say(f"run folder {shown(run_dir)}")
        keep(run_dir, plan)
        if not is_prepared(run_dir):
            code = prepare(run_dir)
            if code != DONE:
                print_resume_hint(run_dir, code)
                return code
        return train(run_dir, config.cluster, torchrun=torchrun)


def train(
    run_dir: Path,
    cluster: ClusterConfig,
    *,
    forwarder: Forwarder | None = None,
    rendezvous: Rendezvous | None = None,
    torchrun: Torchrun | None = None,
) -> int:
    """Run this node's workers of a prepared run. Returns the exit code.

    forwarder, rendezvous, torchrun: see `run_workers`.
    """
    processes = cluster.gpus_per_node
    say(f"starting {processes} worker{'s' if processes > 1 else ''} (importing torch takes a few seconds)")
    started = time.monotonic()
    code = run_workers(
        run_dir,
        processes=processes,
        max_restarts=cluster.max_restarts,
        rendezvous=rendezvous,
        forwarder=forwarder,
        torchrun=torchrun,
    )
    if code == DONE:
        say(f"done in {clock(time.monotonic() - started)}: {shown(find_result(run_dir) or run_dir)}")
        write_final_report(run_dir)
        return code
    ends_for_good = code == BAD_INPUT or find_result(run_dir) is not None or would_repeat(run_dir / "logs")
    if not ends_for_good and not (code == STOPPED and cluster.launcher == "slurm"):  # SLURM's script requeues it.
        saved = checkpoint_folders(run_dir)
        source = f"from {saved[-1].name}" if saved else "from the start, as nothing was saved yet (train.save_every)"
        on_each = " on each node" if cluster.on_each_node else ""
        say(f"continue {source} with: distlora resume {shown(run_dir)}{on_each}")
    return code


def is_complete(run_dir: Path) -> bool:
    """Return whether a run has its result, and print it."""
    result = find_result(run_dir)
    if result is not None:
        say(f"{shown(run_dir)} is complete: {shown(result)}")
    return result is not None


def print_resume_hint(run_dir: Path, code: int) -> None:
    """Print how to continue a run that was stopped before its workers were started."""
    if code == STOPPED and (run_dir / CONFIG_NAME).is_file():
        say(f"continue with: distlora resume {shown(run_dir)}")


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
    remove_records(run_dir)
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


def prepare(run_dir: Path, forwarder: Forwarder | None = None) -> int:
    """Tokenize a run's data in a process that prints its own errors. Returns its exit code, 75 if it was stopped.

    forwarder: handles signals already; None: signals are handled for the duration.
    """
    command = [sys.executable, "-m", "distlora_launcher.launch.bound", "distlora.data.prepare", str(run_dir)]
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
    """Prepare the data with the small files of a hub model. Returns the exit code and the text of data.json.

    So what the tokenizer refuses (chats without a template) is refused before the weights are downloaded. The cache's
    key does not depend on where the tokenizer's files are.
    """
    with (
        with_small_files(config.model) as model,
        tempfile.TemporaryDirectory(prefix="distlora-prepare-") as scratch,
    ):
        create_run(Path(scratch), dataclasses.replace(config, model=model))
        code = prepare(Path(scratch))
        return code, (Path(scratch) / DATA_NAME).read_text(encoding="utf-8") if code == DONE else None


MAX_METRICS_BYTES = 4_000_000
"""Largest metrics.jsonl of which a report is made as the run ends: some ten thousand steps, 0.3 s."""


def write_final_report(run_dir: Path) -> None:
    """Write the report of a run whose workers have ended well. A failure is printed and costs the run nothing."""
    command = f"distlora report {shown(run_dir)}"
    try:
        if (run_dir / METRICS_NAME).stat().st_size > MAX_METRICS_BYTES:
            say(f"write a report of it with: {command}")
            return
        write_report(run_dir)
        say(f"report {shown(run_dir / REPORT_NAME)}")
    except Exception as error:
        warn(f"no report was written ({type(error).__name__}: {error}); the run is complete; try {command}")


def write_report(run_dir: Path) -> None:
    """Write RUN/report.html of a run that has its result, even while its launcher still holds the lock."""
    result = find_result(run_dir)
    headline = f"is done: {shown(result)}" if result is not None else "is done"
    standing = PageStatus(
        state="done",
        headline=headline,
        commands=(*commands_when_done(run_dir, result), *commands_always(run_dir)),
    )
    atomic_io.write_text(run_dir / REPORT_NAME, run_report(read_run(run_dir), standing))


def commands_when_done(run_dir: Path, result: Path | None) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run with a result."""
    run, is_adapter = shlex.quote(str(run_dir)), result is not None and result.name == "adapter"
    splits = object_or_empty(run_dir / DATA_NAME).get("splits")
    text = "" if isinstance(splits, dict) and "eval" in splits else " --text FILE"
    commands = [
        (f"distlora generate {run}", "chat with the result"),
        (f"distlora eval {run}{text}", f"compare it with the base on {'documents' if text else 'the held-out data'}"),
    ]
    if is_adapter:
        commands.append((f"distlora merge {run}", "merge the adapter into the base: a Hugging Face model folder"))
    commands.append((f"distlora export {run} --format gguf", "make a GGUF file for llama.cpp or Ollama"))
    commands.append((f"distlora push {run} ORG/NAME", "upload it to the Hugging Face hub, with a model card"))
    if is_adapter:
        train = f"distlora train ... adapter.init_from={shlex.quote(str(result))}"
        commands.append((train, "train it further, on other data or for longer"))
    return commands


def commands_always(run_dir: Path) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run in any state."""
    run = shlex.quote(str(run_dir))
    return [
        (f"distlora verify {run}", "check every byte of its checkpoints and records"),
        (f"distlora report {run}", "write this report again"),
    ]
