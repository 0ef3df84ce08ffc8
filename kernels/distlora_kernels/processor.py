"""Choose the instructions that products use on this node's CPU: the path of a process. Imports no torch.

Products of bf16 sum in fp32 on every path. On `avx512` and `avx2` their operands are widened to fp32 first, since these
processors have no fast instruction for bf16, and torch's bf16 products are several times as slow as its fp32 ones.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "DISTLORA_CPU_PATH"
"""Environment variable that names the path of new runs, for comparisons and tests."""

_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512_bf16", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
PATHS = tuple(_FLAGS)
"""Paths, the preferred one first: `amx` and `generic` leave products to torch, in bf16."""

DESCRIPTIONS: Mapping[str, str] = {
    "amx": "products of bf16 by oneDNN with AMX, attention by AVX512-BF16",
    "avx512_bf16": "products of bf16 by AVX512-BF16",
    "avx512": "products of bf16 by AVX-512, operands widened to fp32",
    "avx2": "products of bf16 by AVX2 and FMA, operands widened to fp32",
    "generic": "products of bf16 by torch",
}
"""What runs on each path."""

BLOCK = 1024
"""Rows, summed elements and columns of a block that is widened without a compiler (products.py)."""
WIDENED_BYTES = 3 * 4 * BLOCK * BLOCK
"""Bytes that a thread keeps for blocks: two operands and their product, fp32."""

_path: str | None = None


@functools.cache
def _fields() -> Mapping[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return {}
    with file.open(errors="replace") as lines:  # Not all of them: Linux asks each of hundreds of processors.
        first = [line.partition(":") for line in itertools.takewhile(str.strip, lines)]
    return {name.strip(): value.strip() for name, _, value in first}


def features() -> frozenset[str]:
    """Return the names of this processor's features, its vendor and, on ARM, its part, as Linux reports them."""
    return frozenset(
        " ".join(_fields().get(name, "") for name in ("flags", "Features", "vendor_id", "CPU part")).split()
    )


def name() -> str:
    """Return the processor's name, or else its architecture."""
    return _fields().get("model name", platform.machine())


def is_supported(path: str) -> bool:
    """Return whether this processor has the instructions of a path."""
    return features().issuperset(_FLAGS[path])


def preferred() -> str:
    """Return the path of new runs. Raises ValueError if VARIABLE names none, or one that this processor lacks."""
    if wanted := os.environ.get(VARIABLE):
        if wanted not in PATHS or not is_supported(wanted):
            supported = ", ".join(filter(is_supported, PATHS))
            raise ValueError(f"{VARIABLE}={wanted} is not a path of this processor; unset it or use one of {supported}")
        return wanted
    # Without AMX, which a virtual machine may hide, Intel's cores with AVX512-FP16 multiply bf16 half as fast as fp32.
    slow = "avx512_bf16" if {"GenuineIntel", "avx512_fp16"} <= features() else None
    return next(path for path in PATHS if is_supported(path) and path != slow)


def path() -> str:
    """Return the path of this process."""
    return preferred() if _path is None else _path


def use(chosen: str | None) -> None:
    """Set the path of this process; None for the preferred one."""
    global _path
    assert chosen is None or is_supported(chosen), f"this processor has no {chosen}"
    _path = chosen


def widens() -> bool:
    """Return whether products of bf16 take operands that are widened to fp32."""
    return path() in ("avx512", "avx2")


def compiler_flags() -> tuple[str, ...]:
    """Return the C++ compiler's flags for this process' path."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()  # gcc needs it.
    needed = [f"-m{flag.replace('_', '')}" for flag in _FLAGS[path()] if flag != "amx_bf16"]
    return (*(("-DVECTORS", *needed) if needed else ("-march=native",)), *wide)
