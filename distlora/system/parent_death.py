"""End a process with the one that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel signal this process when the thread that started it ends; exit now if `parent` is dead already.

    Linux alone does so.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # It died while Python was starting.
        os._exit(128 + signal.SIGKILL)
