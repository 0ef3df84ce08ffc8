"""Processes of ours that end with the process that started them: commands, and the ranks of a run.

    python -m distlora_launcher.launch.bound [--stop] MODULE [ARGUMENTS]
    python -m distlora_launcher.launch.bound --rank LOG_DIR STDOUT MODULE [ARGUMENTS]

runs a module as `__main__`. It is killed when the process that started it ends; with --stop it gets SIGTERM then.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import util
from typing import IO

from distlora.run_folder import error_file
from distlora.system import stop_signals
from distlora.system.exit_codes import DONE, FAILED

PARENT = "DISTLORA_PARENT_PID"
"""Environment variable: pid of the process that started this one."""
RANK = "--rank"
"""First argument of a rank of a run."""


def start_command(
    module: str,
    *arguments: str,
    stops: bool = False,
    environment: Mapping[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: str | None = None,
    in_session: bool = False,
) -> "subprocess.Popen[bytes]":
    """Start `python -m module arguments`, which is killed when this process ends; `stops`: it gets SIGTERM instead.

    `environment`: the whole environment; None: this process's. Ctrl-C on the terminal reaches it only through us, or
    with `in_session` directly.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *(["--stop"] if stops else []), module, *arguments],
        env={**(os.environ if environment is None else environment), "PYTHONSAFEPATH": "1", PARENT: str(os.getpid())},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=not in_session,
    )


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends: no worker outlives a killed launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signum)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)  # The parent ended while Python was starting.


def run_rank(log_dir: str, stdout: str, module: str, *arguments: str) -> None:
    """Run `module` as this rank, of which RANK is in the environment; handle signals, and write its output to files.

    Rank 0's stdout goes to the launcher, by the path `stdout`, which shows it and copies it into rank_0.log. All other
    output of a rank goes to log_dir/rank_<k>.log, an exception to log_dir/rank_<k>.error.json
    (`distlora/run_folder/error_file.py`).
    """
    stop_signals.listen()
    end_with_parent()
    is_fork = multiprocessing.parent_process() is not None
    if is_fork:
        os.setsid()  # A fork shares the launcher's session, in which Ctrl-C reaches every process.
    rank, append = os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log = os.path.join(log_dir, f"rank_{rank}.log")
    # By their descriptors: C++ libraries write too.
    redirect(0, os.devnull, os.O_RDONLY)
    redirect(1, stdout if rank == "0" else log, os.O_WRONLY if rank == "0" else append)
    redirect(2, log, append)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ[error_file.VARIABLE] = os.path.join(log_dir, f"rank_{rank}.error.json")
    sys.argv = [module, *arguments]
    code = DONE
    sys.modules.pop(module, None)  # A fork may have it from its launcher, and runpy warns of a second copy.
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else FAILED
    except Exception as error:
        code = FAILED
        with contextlib.suppress(OSError):  # A full disk.
            traceback.print_exc()  # First: once the error file exists, the launcher may kill this process.
        error_file.leave(error)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A thread that a library left running can hold up the interpreter's shutdown, or abort it.
    if is_fork and code == DONE:  # torch waits for its return.
        util.Finalize(None, os._exit, args=(DONE,), exitpriority=-1)
    else:
        os._exit(code)


def redirect(descriptor: int, path: str, flags: int) -> None:
    """Open a file as the given descriptor."""
    file = os.open(path, flags | os.O_NOCTTY, 0o644)
    if file != descriptor:
        os.dup2(file, descriptor)
        os.close(file)


if __name__ == "__main__":
    if sys.argv[1] == RANK:
        run_rank(*sys.argv[2:])
    else:
        stops = sys.argv[1] == "--stop"
        end_with_parent(signal.SIGTERM if stops else signal.SIGKILL)
        del sys.argv[: 1 + stops]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
