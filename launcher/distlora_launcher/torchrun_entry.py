"""torchrun itself, bound to the launcher: when the launcher is killed, it is asked to stop, and its workers with it.

python -m distlora_launcher.torchrun_entry [torchrun's arguments]
"""

from __future__ import annotations

import runpy
import signal
import sys

from distlora_launcher.worker_entry import end_with_parent

if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    sys.argv[0] = "torchrun"
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
