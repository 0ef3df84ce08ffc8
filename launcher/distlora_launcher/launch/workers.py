"""Worker processes on this node: torchrun, rank 0's output, requests to stop, exit codes; no process is left behind.

torchrun's exit code tells neither what failed nor whether a stopped run saved; see `run_workers` for what decides.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from distlora.config import require
from distlora.run_folder.layout import find_result
from distlora.system.command_worker import REQUEST_NAME, encode_call
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from distlora.system.progress import STILL_SECONDS
from distlora.system.stop_signals import PID_DIR, STOPPED_NAME
from distlora_launcher.compose.checks import gpu_count, split_endpoint
from distlora_launcher.launch import worker_entry
from distlora_launcher.launch.failures import Failure, WorkerMonitor, file_identity, start_failure, write_gave_up
from distlora_launcher.launch.processes import Forwarder, forwarding, host_name
from distlora_launcher.launch.rendezvous import Rendezvous
from distlora_launcher.launch.worker_entry import ATTEMPT, PARENT, last_number
from distlora_launcher.terminal.output import Output, warn

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP threads sleep while they wait. By default they spin, which slows down CPU runs on shared cores threefold."""

KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc keeps freed pages: page faults of fresh tensors cost 3-6 % of a CPU step. If memory is short, the user sets
MALLOC_MMAP_THRESHOLD_=262144, which takes less memory and 8-13 % more CPU time."""

ON_CPU = KEEP_PAGES | PASSIVE
"""Environment of workers that compute on the CPU. A variable that the user set is kept."""

IMPORTS = (
    "distlora.training.setup",
    "distlora.training.open_run",
    "transformers.models.auto.modeling_auto",
    "transformers.masking_utils",
    "transformers.modeling_layers",
)
"""Modules that training imports before its first step."""
QUANTIZED_IMPORT = "bitsandbytes"
"""Module that workers of quant=nf4 also import; if it is not installed, the failed import costs nothing."""

OUTCOME_SECONDS = 60
"""Longest wait for another node's files: NFS caches a folder's listing that long by default."""

IDLE_SECONDS = 10
"""Time without any worker on this node after which a request to stop ends torchrun, which may wait for other nodes."""

LOOK_SECONDS = 0.2
"""Interval between looks at the workers' state. Rank 0's output is shown at once."""


WORKER = "distlora.training.worker"
"""Module of the workers that train."""

START = "start_"
"""Prefix of the folders with logs of earlier starts."""
WRITTEN = ("rank_*", "torchrun*.log", "gave_up.json", f"{ATTEMPT}*")
"""Files that a start writes; SLURM's log, which all starts share, is not among them."""


def run_workers(
    run_dir: Path,
    *,
    processes: int,
    worker_module: str = WORKER,
    max_restarts: int = 0,
    rendezvous: Rendezvous | None = None,
    forwarder: Forwarder | None = None,
    saves: bool = True,
    torchrun: Torchrun | None = None,
) -> int:
    """Run `python -m worker_module run_dir` in `processes` ranks to the end; print why it failed; return the exit code.

    max_restarts: how often failed workers are restarted, unless they would fail in the same way.
    rendezvous: of a run of several nodes.
    forwarder: handles signals already; None: signals are handled for the duration.
    saves: whether the workers save on a request to stop; else it kills them.
    torchrun: the process, if it was started early.

    Exit codes: 0 if every rank ended well; 2 if the first failure is a UserError; 75 if the workers left the stop
    marker, or no worker was running that could; 128 + n if signal n killed them; else 1.
    """
    log_dir = run_dir / "logs"
    if rendezvous is None:
        set_aside_logs(log_dir)
    marker = run_dir / STOPPED_NAME
    earlier = file_identity(marker)
    with (
        torchrun
        or prepare_torchrun(
            run_dir,
            processes=processes,
            worker_module=worker_module,
            max_restarts=max_restarts,
            rendezvous=rendezvous,
        ) as torchrun,
        contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests,
    ):
        process, torchrun_log = torchrun.begin()
        monitor = WorkerMonitor(
            run_dir,
            torchrun.pid_dir,
            torchrun_log,
            process.pid,
            processes=processes,
            max_restarts=max_restarts,
            rendezvous=rendezvous,
        )
        requests.attach(process, monitor.request_stop if saves else lambda _: process.kill())
        final = watch(process, torchrun.output, monitor)
        requests.detach()
        # If the failure was printed already and no worker came back, torchrun's log has the reason.
        failed = None if monitor.restarting else monitor.failure()
        done = process.returncode == 0 or monitor.all_done()
        if rendezvous is not None and done:
            wait_for_outcome(run_dir, earlier)
    if final is not None and final.stopped:
        give_up(final, final.message, log_dir, rendezvous)
        return STOPPED
    if file_identity(marker) not in (None, earlier):
        return STOPPED
    if done:
        # On a full disk the marker may be missing, but then so is the result.
        lacks_marker = saves and requests.received is not None and find_result(run_dir) is None
        return STOPPED if lacks_marker else DONE
    if requests.received is not None and (requests.killed or not saves):
        signum = signal.SIGINT if requests.killed else requests.received
        killed = f"killed by {signal.Signals(signum).name}"
        give_up(Failure(killed, ""), f"{killed}; logs are in {log_dir}", log_dir, rendezvous)
        return 128 + signum
    failure = final or failed or start_failure(torchrun_log, process.returncode, rendezvous)
    give_up(failure, f"error: {failure.message}{monitor.restarts_text()}", log_dir, rendezvous)
    return BAD_INPUT if failure.bad_input else FAILED


def give_up(failure: Failure, message: str, log_dir: Path, rendezvous: Rendezvous | None) -> None:
    """Print why this node ends for good, and leave the reason for the other nodes."""
    warn(message)
    if rendezvous is not None:
        write_gave_up(log_dir, host_name(), failure)


def wait_for_outcome(run_dir: Path, earlier: tuple[int, int] | None) -> None:
    """Wait until rank 0's result or stop marker is visible: a network file system shows another node's files late.

    earlier: identity of the marker of an earlier start, which does not count.
    """
    deadline = time.monotonic() + OUTCOME_SECONDS
    while find_result(run_dir) is None and file_identity(run_dir / STOPPED_NAME) in (None, earlier):
        if time.monotonic() > deadline:
            break
        time.sleep(1)


def watch(process: subprocess.Popen[bytes], output: Output, monitor: WorkerMonitor) -> Failure | None:
    """Show rank 0's output until torchrun has ended; return the failure or the request to stop that ended it, if any.

    torchrun is killed if a restart would fail in the same way, and on a request to stop that no worker can answer.
    """
    final, idle_since = None, math.inf
    began = told = time.monotonic()
    while process.poll() is None:
        if output.pump(LOOK_SECONDS):
            told = math.inf
        elif time.monotonic() - told > STILL_SECONDS:
            told = time.monotonic()
            warn(f"still starting the workers ({told - began:.0f} s)")
        failure = monitor.look()
        idle_since = min(idle_since, time.monotonic()) if monitor.cannot_answer() else math.inf
        if failure is None and time.monotonic() - idle_since > IDLE_SECONDS:
            failure = monitor.leave_stopped()
        if failure is not None:
            final = failure
            process.kill()  # Its workers end with it.
            process.wait()
    while output.pump(0.0):
        pass
    output.close()
    return final or monitor.look()


def prepare_torchrun(
    run_dir: Path,
    *,
    processes: int,
    worker_module: str = WORKER,
    max_restarts: int,
    rendezvous: Rendezvous | None = None,
    imports: Sequence[str] = (),
) -> Torchrun:
    """Return torchrun for `run_workers` with the same arguments. On a single node it imports the workers' modules now.

    Without GPUs the workers are forks of torchrun, which share its imports. With GPUs they are new processes, since a
    fork cannot use CUDA once its parent has touched it; on macOS too, whose libraries refuse to work in a fork.
    """
    log_dir, scratch = run_dir / "logs", Path(tempfile.mkdtemp(prefix="distlora-torchrun-"))
    forks = gpu_count() == 0 and sys.platform == "linux"
    trains = worker_module.partition(".")[0] == "distlora"
    modules = [*(IMPORTS if trains else ()), *imports] if forks else []
    arguments = [
        *(f"--import={name}" for name in modules),
        *(serving_arguments(rendezvous) if rendezvous is not None else []),
        "--",
        *(one_node_arguments(scratch) if rendezvous is None else rendezvous.torchrun_arguments()),
        f"--nproc-per-node={processes}",
        f"--max-restarts={max_restarts}",
        "--signals-to-handle=SIGQUIT",  # It must handle one; requests to stop are blocked in torchrun_entry.
        f"--log-dir={scratch}",
        *(["--start-method=fork", "--run-path"] if forks else ["--module"]),
        "--",  # Without it, torchrun takes a worker's option for an abbreviation of its own.
        worker_entry.__file__ if forks else worker_entry.__name__,
        *(str(log_dir), worker_module, str(run_dir)),
    ]
    environment = worker_environment(processes, rendezvous)
    return Torchrun(arguments, log_dir, scratch, environment=environment, single_node=rendezvous is None)


def serving_arguments(rendezvous: Rendezvous) -> list[str]:
    """Return torchrun_entry's options on a node that serves the store, or may: the first process of a shared host."""
    if rendezvous.is_host is False:
        return []
    return ["--serve", *map(str, split_endpoint(rendezvous.endpoint)), *(["--shared"] * (rendezvous.is_host is None))]


def one_node_arguments(folder: Path) -> list[str]:
    """Return torchrun's options for one node: its store, whose content it unpickles, is a file in a private folder."""
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={folder / 'rendezvous'}",
        "--rdzv-conf=store_type=file,keep_alive_interval=3600",  # The file grows by each sign of life.
        "--rdzv-id=one-node",
        # By default torchrun takes the host's name, which laptops often cannot resolve.
        "--local-addr=127.0.0.1",
    ]


def worker_environment(processes: int, rendezvous: Rendezvous | None = None) -> dict[str, str]:
    """Return the launcher's environment plus what workers need. A variable that the user set is kept."""
    # PET_* are defaults of torchrun's options: one left over from another job would change ours.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # A folder ./datasets in the working folder must not shadow a package.
    }
    if gpu_count() == 0:
        defaults |= ON_CPU
    if rendezvous is not None:
        defaults |= rendezvous.environment()
    # torchrun's store outlives a rank, and would give out the address of a dead rank. It also listens everywhere.
    return defaults | environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Torchrun:
    """torchrun with the given arguments. `begin` lets it start the workers.

    For a single node the process starts at once and imports the workers' modules; for one of several it starts at
    `begin`. On exit from the context it is killed if it still runs, and its workers with it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log_dir: Path,
        scratch: Path,
        *,
        environment: Mapping[str, str],
        single_node: bool,
    ) -> None:
        self._arguments, self._log_dir, self._scratch = arguments, log_dir, scratch
        self.pid_dir = scratch / "pids"
        """Folder where each worker writes its pid."""
        self.pid_dir.mkdir()
        self._environment = {**environment, PID_DIR: str(self.pid_dir), PARENT: str(os.getpid())}
        self.output = Output(log_dir / "rank_0.log")
        self._process: subprocess.Popen[bytes] | None = None
        if single_node:
            early = ["--log", str(new_torchrun_log(log_dir, single_node=True))]
            self._process = self._popen([*early, *arguments], scratch / "early.log", subprocess.PIPE)

    def begin(self) -> tuple[subprocess.Popen[bytes], Path]:
        """Start the workers; return the process and its log. RUN/logs must exist."""
        log = new_torchrun_log(self._log_dir, single_node=self._process is not None)
        log.touch()
        if self._process is None:
            self._process = self._popen(self._arguments, log, subprocess.DEVNULL)
        elif self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # It has ended; its exit code is reported later.
                self._process.stdin.write(b"go\n")
                self._process.stdin.close()
        return self._process, log

    def _popen(self, arguments: Sequence[str], log: Path, stdin: int) -> subprocess.Popen[bytes]:
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "distlora_launcher.launch.torchrun_entry", *arguments],
                stdin=stdin,
                stdout=self.output.child_end,
                stderr=stderr,
                env=self._environment,
                start_new_session=True,  # Ctrl-C then reaches the workers once, through the launcher.
            )
        os.close(self.output.child_end)
        return process

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            failed = self._process.poll()
            self._process.kill()
            self._process.wait()
            if failed:
                self._append_early_log()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _append_early_log(self) -> None:
        """Append what a torchrun that failed during its imports printed: the reason is not in its log."""
        early, log = self._scratch / "early.log", new_torchrun_log(self._log_dir, single_node=True)
        if early.is_file() and log.is_file():
            with log.open("ab") as end:
                end.write(early.read_bytes())


ENTRY = "distlora.system.command_worker"
"""The module that every worker process of a command runs."""


def become(worker: str, request: Any) -> NoReturn:
    """Replace this process by `worker` ("module:function"), which then owns the terminal and its signals."""
    sys.stdout.flush()
    command = [sys.executable, "-m", ENTRY, encode_call(worker, request)]
    os.execve(command[0], command, worker_environment(processes=1))


def run_alone(worker: str, request: Any) -> int:
    """Run `worker` in a process of its own; return its exit code."""
    sys.stdout.flush()
    command = [sys.executable, "-m", ENTRY, encode_call(worker, request)]
    code = subprocess.run(command, env=worker_environment(processes=1)).returncode
    return code if code >= 0 else 128 - code


def run_several(worker: str, request: Any, processes: int) -> int:
    """Run `worker` in `processes` ranks; return the exit code. Keep their logs if they fail."""
    folder = Path(tempfile.mkdtemp(prefix=f"{worker.partition(':')[0].replace('.', '-')}-"))
    (folder / REQUEST_NAME).write_text(encode_call(worker, request), encoding="utf-8")
    code = run_workers(folder, processes=processes, worker_module=ENTRY, saves=False)
    if code == DONE:
        shutil.rmtree(folder)
    return code


def check_processes(processes: int) -> None:
    """Refuse a number of processes that this node has no GPUs for."""
    require(processes > 0, f"--processes={processes} is not a valid number of processes; write 1 or more")
    available = gpu_count()
    require(
        available == 0 or processes <= available,
        f"--processes={processes}, but this node has {available} GPU{'s' if available > 1 else ''}; "
        f"write --processes {available}",
    )


def set_aside_logs(log_dir: Path) -> None:
    """Move the logs of an earlier start to logs/start_<n>, so that the newest are logs/rank_<k>.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for pattern in WRITTEN for path in log_dir.glob(pattern)]
    if earlier:
        folder = log_dir / f"{START}{1 + last_number(START, log_dir.glob(f'{START}*'))}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)


def new_torchrun_log(log_dir: Path, *, single_node: bool) -> Path:
    """Return torchrun's log: torchrun.log on a single node, else a new file torchrun_<host>[_<n>].log."""
    if single_node:
        return log_dir / "torchrun.log"
    host = host_name()
    names = (f"torchrun_{host}.log" if number == 1 else f"torchrun_{host}_{number}.log" for number in range(1, 10_000))
    for name in names:
        try:
            (log_dir / name).touch(exist_ok=False)
            return log_dir / name
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
