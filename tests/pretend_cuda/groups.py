"""Start a process with the pretended GPU for a group of paths, and read what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pretend_cuda import library

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")
"""The compiler that the tests were started with; conftest.py hides it from the tests themselves."""


def start(module: str, *arguments: str, mode: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` where the device can be put in place, which is before torch is imported.

    Skips without a C++ compiler.
    """
    if library.build(COMPILER) is None:
        pytest.skip(f"the pretended GPU needs a C++ compiler; there is no {COMPILER}")
    folders = (ROOT / "tests", ROOT, ROOT / "kernels", ROOT / "launcher")
    environment = os.environ | {"PRETEND_CUDA": mode, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def in_process(module: str, out: Path, *arguments: str, mode: str) -> Any:
    """Run a module of this folder in a process with the device, and return the JSON that it writes to `out`."""
    ended = start("pretend_cuda.start", module, str(out), *arguments, mode=mode)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads(out.read_text())


def split(names: Sequence[str], number: int) -> list[Sequence[str]]:
    """Return names in groups of `number`: a process takes seconds to start."""
    return [names[start : start + number] for start in range(0, len(names), number)]
