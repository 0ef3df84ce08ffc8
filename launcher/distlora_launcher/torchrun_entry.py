"""torchrun itself, bound to the launcher's life and deaf to requests to stop.

    python -m distlora_launcher.torchrun_entry [torchrun's arguments]

torchrun kills workers 30 s after a signal that it handles, and a step with its save may take longer. So the launcher
signals the workers itself, and here the signals stay blocked: in every thread, and in the workers until they listen, so
that none is lost while they start.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from distlora_launcher.signals import FORWARDED
from distlora_launcher.worker_entry import PARENT, end_with_parent

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    sys.argv[0] = "torchrun"
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
