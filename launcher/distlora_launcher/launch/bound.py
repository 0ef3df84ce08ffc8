"""Run a module as `__main__`, killed when the process that started it ends.

python -m distlora_launcher.launch.bound MODULE [ARGUMENTS]
"""

from __future__ import annotations

import runpy
import sys

from distlora_launcher.launch.worker_entry import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
