"""Entry of a worker process: handle signals (`distlora/system/stop_signals.py`), redirect output, run the module.

    python -m distlora_launcher.launch.worker_entry LOG_DIR MODULE [ARGUMENTS]      (torchrun sets RANK)

Rank 0 keeps its stdout, which the launcher shows and copies into rank_0.log; all other output of a rank goes to
LOG_DIR/rank_<k>.log. An exception also goes to LOG_DIR/rank_<k>.error.json (`distlora/run_folder/error_file.py`).
Files of the attempt before this one move to LOG_DIR/attempt_<n>/.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from distlora.run_folder import error_file
from distlora.system import stop_signals

PARENT = "DISTLORA_PARENT_PID"
"""Environment variable: pid of the process that started this one."""

ATTEMPT = "attempt_"
"""Prefix of the folders with logs of ranks that were restarted."""

LOOK_SECONDS = 1.0
"""Pause of a restarted worker: the launcher reads the error files of the attempt before every 0.5 s."""
LONGEST_LOOK_SECONDS = 60.0
"""Longest wait for the launcher to kill torchrun."""


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent dies: no worker outlives a killed launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signum)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)  # The parent died while Python was starting.


def wait_if_failed_for_good(log_dir: Path, rank: int) -> None:
    """Wait to be killed if this rank's earlier attempt failed in a way that a restart would repeat.

    torchrun restarts it at once, and the launcher must find the error files as they are.
    """
    from distlora_launcher.launch.failures import is_final, read_errors

    folders = [log_dir, *(Path(os.environ[name]) for name in (stop_signals.PID_DIR,) if name in os.environ)]
    errors = [error for folder in folders for _, error in read_errors(folder) if error["rank"] == rank]
    if any(is_final(error) for error in errors):
        time.sleep(LONGEST_LOOK_SECONDS)


def last_number(prefix: str, folders: Iterable[Path]) -> int:
    """Return the largest <n> of the folders `prefix`<n>; 0 if there is none."""
    words = (folder.name.removeprefix(prefix) for folder in folders)
    return max((int(word) for word in words if word.isdecimal()), default=0)


def set_aside_attempt(log_dir: Path, rank: int) -> None:
    """Move this rank's files of an earlier attempt to LOG_DIR/attempt_<n>."""
    log = log_dir / f"rank_{rank}.log"
    if not log.exists():
        return
    number = 1 + last_number(ATTEMPT, (path.parent for path in log_dir.glob(f"{ATTEMPT}*/{log.name}")))
    # torchrun's count includes attempts without a log of this rank, but not those that another node began.
    number = max(number, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    folder, error = log_dir / f"{ATTEMPT}{number}", log_dir / f"rank_{rank}.error.json"
    try:
        folder.mkdir(exist_ok=True)
        for path in (error, log):
            if path.exists():
                path.rename(folder / path.name)
    except OSError:  # A full disk: the log then has both attempts, but the error must not count for this one.
        error.unlink(missing_ok=True)


def leave_pid(rank: int) -> None:
    """Write the pid, to which the launcher may send signals from now on, and name a second place for an error file."""
    folder = os.environ.get(stop_signals.PID_DIR)
    if folder is not None:
        path = Path(folder) / f"rank_{rank}.pid"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(os.getpid()))
        temporary.replace(path)
        path.with_suffix(".done").unlink(missing_ok=True)
        spare = path.with_suffix(".error.json")
        spare.unlink(missing_ok=True)
        os.environ[error_file.SPARE] = str(spare)


def main() -> None:
    """Run the module that the command line names, as this rank."""
    stop_signals.listen()
    log_dir, module, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    end_with_parent()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        time.sleep(LOOK_SECONDS)
        wait_if_failed_for_good(Path(log_dir), rank)
    set_aside_attempt(Path(log_dir), rank)
    # By its descriptors: C++ libraries write too.
    descriptor = os.open(Path(log_dir) / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    if rank != 0:
        os.dup2(descriptor, 1)
    os.close(descriptor)
    leave_pid(rank)
    os.environ[error_file.VARIABLE] = str(Path(log_dir) / f"rank_{rank}.error.json")
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # A full disk.
            traceback.print_exc()  # First: once the error file exists, the launcher may kill this process.
        error_file.leave(error)
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    folder = os.environ.get(stop_signals.PID_DIR)
    if folder is not None:  # For the launcher: torchrun may fail if another node leaves first.
        (Path(folder) / f"rank_{rank}.done").touch()
    # A thread that a library left running can abort the interpreter's shutdown ("terminate called without an active
    # exception"), which would count as a failure. A fork of torchrun has no such thread and must return.
    if multiprocessing.parent_process() is None:
        os._exit(0)


if __name__ == "__main__":
    main()
