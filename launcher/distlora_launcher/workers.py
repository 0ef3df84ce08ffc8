"""Worker processes on this machine: torchrun, rank 0's output shown as it comes, requests to stop, no orphans.

torchrun's exit code says neither what failed nor whether a stopped run saved, so it decides nothing but success: see
`run_workers`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distlora.command_line import BAD_INPUT, DONE, FAILED, STOPPED
from distlora.run_folder import find_result
from distlora.stopping import PID_DIR, STOPPED_NAME
from distlora_launcher.attempts import Attempts, identity
from distlora_launcher.checks import gpu_count
from distlora_launcher.failures import Failure, start_failure, write_gave_up
from distlora_launcher.logs import host_name, machine_log, set_aside_logs
from distlora_launcher.meeting import Meeting
from distlora_launcher.output import Output, warn
from distlora_launcher.signals import Forwarder, forwarding
from distlora_launcher.worker_entry import PARENT

KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc's malloc told to keep freed pages: a fresh 32 MiB tensor costs 5x the work in page faults, 3-6 % of a step.
Pages between tensors that are still in use are kept, too: with 1.5 billion parameters on 2 ranks a worker held 2.3 to
3.3 GB in its second step, and 1.4 with glibc's own settings (2026-11-25). A variable that the user set stays."""

OUTCOME_SECONDS = 60
"""NFS keeps what it knows of a folder for as long, unless it is told otherwise."""

IDLE_SECONDS = 10
"""How long a request to stop waits for workers, where none is here: torchrun starts those of the next attempt at once,
unless it waits for other machines."""

LOOK_SECONDS = 0.2
"""Between looks at what became of the workers; what rank 0 writes is shown at once."""


def run_workers(
    run_dir: Path,
    *,
    processes: int,
    worker_module: str = "distlora.train",
    max_restarts: int = 0,
    meeting: Meeting | None = None,
    forwarder: Forwarder | None = None,
    saves: bool = True,
) -> int:
    """Run `python -m worker_module run_dir` in `processes` ranks to the end; print why it failed; return our exit code.

    max_restarts: how often workers that died are started again, unless that would fail in the same way.
    meeting: where this machine meets the others of the run; None: there are no others.
    forwarder: takes signals already; None: for the duration.
    saves: whether the workers answer a request to stop; else it ends them at once.

    0 when every rank ended well, 2 when the first failure is a UserError, 75 when the workers left the stop marker, or
    none was there that could, 128 + n when signal n ended them without one, else 1.
    """
    log_dir = run_dir / "logs"
    if meeting is None:
        set_aside_logs(log_dir)
    marker = run_dir / STOPPED_NAME
    earlier = identity(marker)
    with (
        tempfile.TemporaryDirectory(prefix="distlora-torchrun-") as scratch,
        contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests,
    ):
        torchrun_log = machine_log(log_dir, alone=meeting is None)
        pid_dir = Path(scratch) / "pids"
        pid_dir.mkdir()
        arguments = torchrun_arguments(
            processes, Path(scratch), log_dir, worker_module, run_dir, max_restarts=max_restarts, meeting=meeting
        )
        output = Output(log_dir / "rank_0.log")
        with torchrun_log.open("ab") as noise:
            process = subprocess.Popen(
                [sys.executable, "-m", "distlora_launcher.torchrun_entry", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output.child_end,
                stderr=noise,
                env=worker_environment(processes, meeting) | {PID_DIR: str(pid_dir), PARENT: str(os.getpid())},
                start_new_session=True,  # Ctrl-C then reaches the workers once, through us.
            )
        os.close(output.child_end)
        attempts = Attempts(
            run_dir, pid_dir, torchrun_log, process.pid, processes=processes, max_restarts=max_restarts, meeting=meeting
        )
        requests.attach(process, attempts.request_stop if saves else lambda _: process.kill())
        final = watch(process, output, attempts)
        requests.detach()
        # After a failure that was told already, no worker came: what kept them from coming is the reason.
        failed = None if attempts.restarting else attempts.failure()
        done = process.returncode == 0 or attempts.all_done()
        if meeting is not None and done:
            wait_for_outcome(run_dir, earlier)
    if final is not None and final.stopped:
        give_up(final, final.message, log_dir, meeting)
        return STOPPED
    if identity(marker) not in (None, earlier):
        return STOPPED
    if done:
        # Of a full disk the marker may be missing, but then so is the result.
        unsaid = saves and requests.received is not None and find_result(run_dir) is None
        return STOPPED if unsaid else DONE
    if requests.received is not None and (requests.killed or not saves):
        signum = signal.SIGINT if requests.killed else requests.received
        killed = f"killed by {signal.Signals(signum).name}"
        give_up(Failure(killed, ""), f"{killed}; logs are in {log_dir}", log_dir, meeting)
        return 128 + signum
    failure = final or failed or start_failure(torchrun_log, process.returncode, meeting)
    give_up(failure, f"error: {failure.message}{attempts.told()}", log_dir, meeting)
    return BAD_INPUT if failure.bad_input else FAILED


def give_up(failure: Failure, words: str, log_dir: Path, meeting: Meeting | None) -> None:
    """Say why this machine's part in a run has ended for good: here in `words`, and to the others."""
    warn(words)
    if meeting is not None:
        write_gave_up(log_dir, host_name(), failure)


def wait_for_outcome(run_dir: Path, earlier: tuple[int, int] | None) -> None:
    """Wait until what rank 0 has left, on another machine, is seen here: the result or a stop marker that is not
    `earlier`. A network file system shows it only after a while.
    """
    deadline = time.monotonic() + OUTCOME_SECONDS
    while find_result(run_dir) is None and identity(run_dir / STOPPED_NAME) in (None, earlier):
        if time.monotonic() > deadline:
            break
        time.sleep(1)


def watch(process: subprocess.Popen[bytes], output: Output, attempts: Attempts) -> Failure | None:
    """Show what rank 0 writes until torchrun has ended; it is ended where a further attempt would fail in the same way,
    and where it was asked to stop and no worker comes that could answer. Returns the failure, or that request.
    """
    final, idle_since = None, math.inf
    while process.poll() is None:
        output.pump(LOOK_SECONDS)
        found = attempts.look()
        idle_since = min(idle_since, time.monotonic()) if attempts.cannot_answer() else math.inf
        if found is None and time.monotonic() - idle_since > IDLE_SECONDS:
            found = attempts.leave_stopped()
        if found is not None:
            final = found
            process.kill()  # Its workers go with it.
            process.wait()
    while output.pump(0.0):
        pass
    output.close()
    return final or attempts.look()


def torchrun_arguments(
    processes: int,
    scratch: Path,
    log_dir: Path,
    worker_module: str,
    run_dir: Path,
    *,
    max_restarts: int,
    meeting: Meeting | None,
) -> list[str]:
    """torchrun's options, then `--`: without it, torchrun takes a worker's option for an abbreviation of its own."""
    alone = ["--standalone", "--local-addr=127.0.0.1"]  # Else the host's name, which laptops often cannot resolve.
    return [
        *(alone if meeting is None else meeting.torchrun_arguments()),
        f"--nproc-per-node={processes}",
        f"--max-restarts={max_restarts}",
        "--signals-to-handle=SIGQUIT",  # It has to handle one; those that ask to stop are blocked in torchrun_entry.
        f"--log-dir={scratch}",
        "--module",
        "--",
        "distlora_launcher.worker_entry",
        str(log_dir),
        worker_module,
        str(run_dir),
    ]


def worker_environment(processes: int, meeting: Meeting | None = None) -> dict[str, str]:
    """The launcher's environment plus what workers need; a variable that the user set stays as it is."""
    # PET_* are torchrun's defaults for its own options: one left over from another job would change ours.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    defaults = {
        # The agent's store outlives a rank, and with it the address at which a dead rank was reached.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # A folder such as ./datasets beside the user must not shadow a package.
    }
    if gpu_count() == 0:
        defaults |= KEEP_PAGES
    if meeting is not None:
        defaults |= meeting.environment()
    return defaults | environment
