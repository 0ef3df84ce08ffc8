"""First code of a worker process: handle signals (`distlora/system/stop_signals.py`), redirect output, run the module.

Rank 0's stdout goes to the launcher, which shows it and copies it into rank_0.log; all other output of a rank goes to
LOG_DIR/rank_<k>.log, an exception to LOG_DIR/rank_<k>.error.json (`distlora/run_folder/error_file.py`).

    python -m distlora_launcher.launch.worker_entry LOG_DIR STDOUT MODULE [ARGUMENTS]      (RANK is in the environment)
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import traceback

from distlora.run_folder import error_file
from distlora.system import stop_signals
from distlora_launcher.launch.bound import end_with_parent


def run(log_dir: str, stdout: str, module: str, *arguments: str) -> None:
    """Run `module` as this rank. stdout: path by which the launcher reads rank 0's output."""
    stop_signals.listen()
    end_with_parent()
    if multiprocessing.parent_process() is not None:
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
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # A full disk.
            traceback.print_exc()  # First: once the error file exists, the launcher may kill this process.
        error_file.leave(error)
        sys.exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that a library left running can abort the interpreter's shutdown ("terminate called without an active
    # exception"), which would count as a failure. A fork ends without that shutdown and must return.
    if multiprocessing.parent_process() is None:
        os._exit(0)


def redirect(descriptor: int, path: str, flags: int) -> None:
    """Open a file as the given descriptor."""
    file = os.open(path, flags | os.O_NOCTTY, 0o644)
    if file != descriptor:
        os.dup2(file, descriptor)
        os.close(file)


if __name__ == "__main__":
    run(*sys.argv[1:])
