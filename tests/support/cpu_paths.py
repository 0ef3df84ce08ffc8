"""Paths of a CPU's products (distlora_kernels.processor) that this machine has, and how a process is held to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distlora_kernels import processor, products
from support.tiers import ci

_LIMITS = {"avx512_bf16": ("AVX512_CORE_BF16", "avx512"), "avx512": ("AVX512_CORE", "avx512"), "avx2": ("AVX2", "avx2")}
"""ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY of a processor that has a path and no better one."""
HERE = [path for path in _LIMITS if processor.is_supported(path)]


def limits_of(path: str) -> dict[str, str]:
    """Return the environment of a process that computes as on a processor which has this path and no better one."""
    onednn, aten = _LIMITS[path]
    return {processor.VARIABLE: path, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten}


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
