"""Start the worker of a command with its request: this process becomes it, or torchrun starts several ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from distlora.config import require
from distlora.system.command_worker import REQUEST_NAME, encode_call
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.workers import run_workers, worker_environment

ENTRY = "distlora.system.command_worker"
"""The module that every worker process of a command runs."""


def become(worker: str, request: Any) -> NoReturn:
    """Replace this process by `worker` ("module:function"), which then owns the terminal and its signals."""
    sys.stdout.flush()
    command = [sys.executable, "-m", ENTRY, encode_call(worker, request)]
    os.execve(command[0], command, worker_environment(processes=1))


def run_alone(worker: str, request: Any) -> int:
    """Run `worker` in a process of its own; return its exit code."""
    sys.stdout.flush()
    command = [sys.executable, "-m", ENTRY, encode_call(worker, request)]
    code = subprocess.run(command, env=worker_environment(processes=1)).returncode
    return code if code >= 0 else 128 - code


def run_several(worker: str, request: Any, processes: int) -> int:
    """Run `worker` in `processes` ranks; return the exit code. Keep their logs if they fail."""
    folder = Path(tempfile.mkdtemp(prefix=f"{worker.partition(':')[0].replace('.', '-')}-"))
    (folder / REQUEST_NAME).write_text(encode_call(worker, request), encoding="utf-8")
    code = run_workers(folder, processes=processes, worker_module=ENTRY, saves=False)
    if code == DONE:
        shutil.rmtree(folder)
    return code


def check_processes(processes: int) -> None:
    """Refuse a number of processes that this machine has no GPUs for."""
    require(processes > 0, f"--processes={processes} is no number of processes; write 1 or more")
    available = gpu_count()
    require(
        available == 0 or processes <= available,
        f"--processes={processes}, but this machine shows {available} GPU{'s' if available > 1 else ''}; "
        f"write --processes {available}",
    )
