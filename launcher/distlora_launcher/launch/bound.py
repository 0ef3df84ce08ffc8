"""Commands of ours in processes of their own, which end with the process that started them.

    python -m distlora_launcher.launch.bound [--stop] MODULE [ARGUMENTS]

runs a module as `__main__`. It is killed when the process that started it ends; with --stop it gets SIGTERM then.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

PARENT = "DISTLORA_PARENT_PID"
"""Environment variable: pid of the process that started this one."""


def start_command(
    module: str,
    *arguments: str,
    stops: bool = False,
    environment: Mapping[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: str | None = None,
) -> "subprocess.Popen[bytes]":
    """Start `python -m module arguments`, which is killed when this process ends; `stops`: it gets SIGTERM instead.

    `environment`: the whole environment; None: this process's. Ctrl-C on the terminal reaches it only through us.
    """
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *(["--stop"] if stops else []), module, *arguments],
        env={**(os.environ if environment is None else environment), "PYTHONSAFEPATH": "1", PARENT: str(os.getpid())},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=True,
    )


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends: no worker outlives a killed launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signum)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(128 + signal.SIGKILL)  # The parent ended while Python was starting.


if __name__ == "__main__":
    stops = sys.argv[1] == "--stop"
    end_with_parent(signal.SIGTERM if stops else signal.SIGKILL)
    del sys.argv[: 1 + stops]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
