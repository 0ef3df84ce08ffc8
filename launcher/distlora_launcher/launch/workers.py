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
from collections.abc import Sequence
from pathlib import Path

from distlora.run_folder.layout import find_result
from distlora.system.exit_codes import (
    BAD_INPUT,
    DONE,
    FAILED,
    STOPPED,
)
from distlora.system.stop_signals import STOPPED_NAME
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch import worker_entry
from distlora_launcher.launch.failures import Failure, start_failure, write_gave_up
from distlora_launcher.launch.logs import host_name, set_aside_logs
from distlora_launcher.launch.rendezvous import Meeting
from distlora_launcher.launch.restarts import Attempts, identity
from distlora_launcher.launch.signals import Forwarder, forwarding
from distlora_launcher.launch.starting import Starting
from distlora_launcher.terminal.output import Output, warn

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads sleep where they wait for each other; by default they spin for milliseconds, which keeps the one
that they wait for from its core. The 100M model's step on two threads of two cores takes 2.7 s either way; where others
used one of the cores, 10 to 12 spinning, and 3 to 5 so (2026-11-26)."""

KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc's malloc told to keep freed pages: a fresh 32 MiB tensor costs 5x the work in page faults, 3-6 % of a step.
Pages between tensors that are still in use are kept, too: with 1.5 billion parameters on 2 ranks a worker held 1.8
to 2.0 GB, and 1.4 with glibc's own settings (2026-11-25). Where memory is short,
MALLOC_MMAP_THRESHOLD_=262144 gives every tensor pages of its own: 195 MiB in the place of 237 at 0.1 billion, for 8 to
13 % more CPU seconds (2026-11-26)."""

ON_CPU = KEEP_PAGES | PASSIVE
"""What workers have where they compute on the CPU. A variable that the user set stays."""

IMPORTS = (
    "distlora.training.setup",
    "distlora.training.runs",
    "transformers.models.auto.modeling_auto",
    "transformers.masking_utils",
    "transformers.modeling_layers",
)
"""What workers of ours import before their first step, in CPU seconds: 1.3 torch, 1.1 ours and FSDP2, 2.3 transformers
(2026-11-26)."""
QUANTIZED = "bitsandbytes"
"""What those of quant=nf4 import too, 1.1 CPU seconds: it has the CPU's dequantization. Where it is not installed, the
import that fails costs nothing."""

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
    worker_module: str = "distlora.training.worker",
    max_restarts: int = 0,
    meeting: Meeting | None = None,
    forwarder: Forwarder | None = None,
    saves: bool = True,
    starting: Starting | None = None,
) -> int:
    """Run `python -m worker_module run_dir` in `processes` ranks to the end; print why it failed; return our exit code.

    max_restarts: how often workers that died are started again, unless that would fail in the same way.
    meeting: where this machine meets the others of the run; None: there are no others.
    forwarder: takes signals already; None: for the duration.
    saves: whether the workers answer a request to stop; else it ends them at once.
    starting: torchrun, where it is there already.

    0 when every rank ended well, 2 when the first failure is a UserError, 75 when the workers left the stop marker, or
    none was there that could, 128 + n when signal n ended them without one, else 1.
    """
    log_dir = run_dir / "logs"
    if meeting is None:
        set_aside_logs(log_dir)
    marker = run_dir / STOPPED_NAME
    earlier = identity(marker)
    with (
        starting
        or starting_workers(
            run_dir, processes=processes, worker_module=worker_module, max_restarts=max_restarts, meeting=meeting
        ) as starting,
        contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests,
    ):
        process, torchrun_log = starting.begin()
        attempts = Attempts(
            run_dir,
            starting.pid_dir,
            torchrun_log,
            process.pid,
            processes=processes,
            max_restarts=max_restarts,
            meeting=meeting,
        )
        requests.attach(process, attempts.request_stop if saves else lambda _: process.kill())
        final = watch(process, starting.output, attempts)
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


def starting_workers(
    run_dir: Path,
    *,
    processes: int,
    worker_module: str,
    max_restarts: int,
    meeting: Meeting | None = None,
    imports: Sequence[str] = (),
) -> Starting:
    """torchrun for `run_workers` with the same arguments, already now. Meanwhile it imports what workers need: what all
    of ours do, and `imports`.

    With GPUs workers are processes of their own: a fork can use nothing of CUDA once its parent has touched it, and
    that no import does is not shown there. So they are on macOS, whose libraries refuse to work in a fork.
    """
    log_dir, scratch = run_dir / "logs", Path(tempfile.mkdtemp(prefix="distlora-torchrun-"))
    forks = gpu_count() == 0 and sys.platform == "linux"
    ours = worker_module.partition(".")[0] == "distlora"
    names = [*(IMPORTS if ours else ()), *imports] if forks else []
    words = [
        *(f"--import={name}" for name in names),
        "--",
        # Else the host's name, which laptops often cannot resolve.
        *(["--standalone", "--local-addr=127.0.0.1"] if meeting is None else meeting.torchrun_arguments()),
        f"--nproc-per-node={processes}",
        f"--max-restarts={max_restarts}",
        "--signals-to-handle=SIGQUIT",  # It has to handle one; those that ask to stop are blocked in torchrun_entry.
        f"--log-dir={scratch}",
        *(["--start-method=fork", "--run-path"] if forks else ["--module"]),
        "--",  # Without it, torchrun takes a worker's option for an abbreviation of its own.
        worker_entry.__file__ if forks else worker_entry.__name__,
        *(str(log_dir), worker_module, str(run_dir)),
    ]
    return Starting(words, log_dir, scratch, environment=worker_environment(processes, meeting), alone=meeting is None)


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
        defaults |= ON_CPU
    if meeting is not None:
        defaults |= meeting.environment()
    return defaults | environment
