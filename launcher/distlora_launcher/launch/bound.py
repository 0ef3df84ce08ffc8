"""Run a module as `__main__`, killed when the process that started it ends; with --stop it gets SIGTERM then.

python -m distlora_launcher.launch.bound [--stop] MODULE [ARGUMENTS]
"""

import runpy
import signal
import sys

from distlora_launcher.launch.worker_entry import end_with_parent

if __name__ == "__main__":
    stops = sys.argv[1] == "--stop"
    end_with_parent(signal.SIGTERM if stops else signal.SIGKILL)
    del sys.argv[: 1 + stops]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
