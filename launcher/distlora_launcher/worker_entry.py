"""The first code of a worker process: signals become requests to stop (`distlora/stopping.py`), its output goes into
its log, then the module that does the work is run as `__main__`.

    python -m distlora_launcher.worker_entry LOG_DIR MODULE [ARGUMENTS]      (torchrun sets RANK)

Rank 0 keeps its stdout, which the launcher shows and copies into rank_0.log; everything else that a rank writes goes
to LOG_DIR/rank_<k>.log alone. An exception is left in LOG_DIR/rank_<k>.error.json as well
(`distlora/error_file.py`).
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

from distlora import error_file, stopping


def end_with_parent(signum: signal.Signals) -> None:
    """Have the kernel send `signum` here when the parent dies, so that no worker outlives a killed launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signum)


def redirect_output(log: Path, *, keep_stdout: bool) -> None:
    """Append what this process and the libraries in it write to `log`. At the level of descriptors: C++ writes too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    if not keep_stdout:
        os.dup2(descriptor, 1)
    os.close(descriptor)


def leave_pid(rank: int) -> None:
    """Tell the launcher where to send signals, once they are listened to."""
    folder = os.environ.get(stopping.PID_DIR)
    if folder is not None:
        path = Path(folder) / f"rank_{rank}.pid"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(os.getpid()))
        temporary.replace(path)


def main() -> None:
    stopping.listen()
    log_dir, module, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    end_with_parent(signal.SIGKILL)
    redirect_output(Path(log_dir) / f"rank_{rank}.log", keep_stdout=rank == 0)
    leave_pid(rank)
    os.environ[error_file.VARIABLE] = str(Path(log_dir) / f"rank_{rank}.error.json")
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        error_file.leave(error)
        raise
    # The work is done and its files are closed. A thread that some library left running can abort the interpreter's own
    # shutdown ("terminate called without an active exception", 2 of 18 runs), which would make a failure of it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
