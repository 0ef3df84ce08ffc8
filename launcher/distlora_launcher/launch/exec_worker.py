"""From a command that has checked everything to its worker: this process becomes it, or torchrun starts several."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from distlora.config import require
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.workers import run_workers, worker_environment


def become(worker: str, request: str) -> NoReturn:
    """Be `python -m worker REQUEST` from here on, so that the terminal and its signals are the worker's own."""
    sys.stdout.flush()
    command = [sys.executable, "-m", worker, request]
    os.execve(command[0], command, worker_environment(processes=1))


def run_alone(worker: str, request: str) -> int:
    """Run `python -m worker REQUEST` to its end, for a command that has more to do; its exit code."""
    sys.stdout.flush()
    command = [sys.executable, "-m", worker, request]
    code = subprocess.run(command, env=worker_environment(processes=1)).returncode
    return code if code >= 0 else 128 - code


def run_several(worker: str, request: str, processes: int) -> int:
    """Run the ranks to the end, each with a folder that holds request.json; the exit code. Their logs stay if they
    fail."""
    folder = Path(tempfile.mkdtemp(prefix=f"{worker.replace('.', '-')}-"))
    (folder / "request.json").write_text(request, encoding="utf-8")
    code = run_workers(folder, processes=processes, worker_module=worker, saves=False)
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
