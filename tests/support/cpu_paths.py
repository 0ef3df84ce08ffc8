"""Paths of a CPU's products (distlora_kernels.processor) that this machine has, and how a process is held to one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distlora_kernels import processor, products
from support.tiers import ci

_LIMITS = {"avx512_bf16": ("AVX512_CORE_BF16", "avx512"), "avx512": ("AVX512_CORE", "avx512"), "avx2": ("AVX2", "avx2")}
"""ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY of a processor that has a path and no better one."""
_LIMITS_WITH_AMX = {"amx": ("AVX512_CORE_AMX", "avx512"), **_LIMITS}
HERE = [path for path in _LIMITS if processor.is_supported(path)]


def run_limited(path: str, task: str, request: Sequence[Any]) -> list[Any]:
    """Return what path_step.py finds in a process that computes as on a processor with this path and no better one."""
    onednn, aten = _LIMITS_WITH_AMX[path]
    limits = {processor.VARIABLE: path, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}  # The tests' hides the compiler.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "support.path_step", task, json.dumps(request)]
    done = subprocess.run(command, env=environment | limits, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["path"] == path
    found: list[Any] = answer["found"]
    return found


def limited_to_each() -> list[Any]:
    """Return the paths for `run_limited`, `amx` included, of which `make test` runs the least."""
    paths = [path for path in _LIMITS_WITH_AMX if processor.is_supported(path)]
    return [path if path == paths[-1] else ci(path) for path in paths] or [pytest.param(None, marks=_NONE)]


def each_path() -> list[Any]:
    """Return the paths of this machine as cases, of which `make test` runs the preferred one."""
    return [path if path == processor.preferred() else ci(path) for path in HERE] or [pytest.param(None, marks=_NONE)]


_NONE = pytest.mark.skip(reason="this processor has no AVX2, so no products are compiled for it")


def used(path: str) -> Iterator[str]:
    """Hold this process to a path until the test ends, for a fixture that yields from it."""
    processor.use(path)
    yield path
    products.use(False)
    processor.use(None)
