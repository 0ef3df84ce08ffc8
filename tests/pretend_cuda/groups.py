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


def in_process(module: str, out: Path, *arguments: str, mode: str) -> Any:
    """Run `python -m pretend_cuda.start MODULE OUT ARGUMENTS` and return the JSON that it writes to `out`.

    The device is there before torch, so a process of tests cannot have it. Skips without a C++ compiler.
    """
    if library.build(COMPILER) is None:
        pytest.skip(f"the pretended GPU needs a C++ compiler; there is no {COMPILER}")
    folders = (ROOT / "tests", ROOT, ROOT / "kernels", ROOT / "launcher")
    environment = os.environ | {"PRETEND_CUDA": mode, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "pretend_cuda.start", module, str(out), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads(out.read_text())


def split(names: Sequence[str], number: int) -> list[Sequence[str]]:
    """Return names in groups of `number`: a process takes seconds to start."""
    return [names[start : start + number] for start in range(0, len(names), number)]
