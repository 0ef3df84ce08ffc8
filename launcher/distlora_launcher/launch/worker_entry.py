"""The first code of a worker process: signals become requests to stop (`distlora/system/stop_signals.py`),
its output goes into its log, then the module that does the work is run as `__main__`.

    python -m distlora_launcher.launch.worker_entry LOG_DIR MODULE [ARGUMENTS]      (torchrun sets RANK; or runs it in
    a fork)

Rank 0 keeps its stdout, which the launcher shows and copies into rank_0.log; everything else that a rank writes goes
to LOG_DIR/rank_<k>.log alone. An exception is left in LOG_DIR/rank_<k>.error.json as well
(`distlora/run_folder/error_file.py`). What a rank finds there is of the attempt before this one, and goes to
LOG_DIR/attempt_<n>/.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from distlora.run_folder import error_file
from distlora.system import stop_signals
from distlora_launcher.launch.logs import ATTEMPT, last_number

PARENT = "DISTLORA_PARENT_PID"
"""Environment variable: the process that starts this one, and ends it by its own end."""

LOOK_SECONDS = 1.0
"""The launcher looks every half a second at what became of an attempt, and a fork has nothing to import meanwhile."""
LONGEST_LOOK_SECONDS = 60.0
"""A launcher that has not ended torchrun by then never will."""


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no worker outlives a killed launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)  # It died while Python was starting here.


def wait_for_the_end(log_dir: Path, rank: int) -> None:
    """Where this rank's earlier attempt failed for good: torchrun starts it again at once, and the launcher, which ends
    torchrun then, looks every half a second. What that attempt left must be found as it is.
    """
    from distlora_launcher.launch.failures import is_final, read_errors

    folders = [log_dir, *(Path(os.environ[name]) for name in (stop_signals.PID_DIR,) if name in os.environ)]
    errors = [error for folder in folders for _, error in read_errors(folder) if error["rank"] == rank]
    if any(is_final(error) for error in errors):
        time.sleep(LONGEST_LOOK_SECONDS)


def set_aside_attempt(log_dir: Path, rank: int) -> None:
    """Move what this rank wrote in an earlier attempt to LOG_DIR/attempt_<n>."""
    log = log_dir / f"rank_{rank}.log"
    if not log.exists():
        return
    number = 1 + last_number(ATTEMPT, (path.parent for path in log_dir.glob(f"{ATTEMPT}*/{log.name}")))
    # torchrun's own count has attempts that left nothing of this rank, but not those that another machine began.
    number = max(number, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    folder, error = log_dir / f"{ATTEMPT}{number}", log_dir / f"rank_{rank}.error.json"
    try:
        folder.mkdir(exist_ok=True)
        for path in (error, log):
            if path.exists():
                path.rename(folder / path.name)
    except OSError:  # A full disk. The log is then of both attempts, but the error must not be taken for this one's.
        error.unlink(missing_ok=True)


def redirect_output(log: Path, *, keep_stdout: bool) -> None:
    """Append what this process and the libraries in it write to `log`. At the level of descriptors: C++ writes too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    if not keep_stdout:
        os.dup2(descriptor, 1)
    os.close(descriptor)


def leave_pid(rank: int) -> None:
    """Tell the launcher where to send signals, once they are listened to; and take space for an error there."""
    folder = os.environ.get(stop_signals.PID_DIR)
    if folder is not None:
        path = Path(folder) / f"rank_{rank}.pid"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(os.getpid()))
        temporary.replace(path)
        path.with_suffix(".done").unlink(missing_ok=True)
        error_file.make_spare(path.with_suffix(".error.json"))


def leave_done(rank: int) -> None:
    """Tell the launcher that the work ended well, whatever torchrun makes of a machine that leaves before it."""
    folder = os.environ.get(stop_signals.PID_DIR)
    if folder is not None:
        (Path(folder) / f"rank_{rank}.done").touch()


def main() -> None:
    stop_signals.listen()
    log_dir, module, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    end_with_parent()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        time.sleep(LOOK_SECONDS)
        wait_for_the_end(Path(log_dir), rank)
    set_aside_attempt(Path(log_dir), rank)
    redirect_output(Path(log_dir) / f"rank_{rank}.log", keep_stdout=rank == 0)
    leave_pid(rank)
    os.environ[error_file.VARIABLE] = str(Path(log_dir) / f"rank_{rank}.error.json")
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # A full disk.
            traceback.print_exc()  # First: once the error file is there, the launcher may end this process.
        error_file.leave(error)
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    leave_done(rank)
    # The work is done and its files are closed. A thread that some library left running can abort the interpreter's own
    # shutdown ("terminate called without an active exception", 2 of 18 runs), which would make a failure of it. A fork
    # of torchrun has none, and torchrun waits for it to return.
    if multiprocessing.parent_process() is None:
        os._exit(0)


if __name__ == "__main__":
    main()
