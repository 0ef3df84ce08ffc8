"""Describe this node for `distlora doctor`. Imports no torch."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from distlora import __version__
from distlora.config.base import cache_root
from distlora.system import host_memory
from distlora.system.exit_codes import DONE, EXTRAS
from distlora.system.numbers import size
from distlora_kernels import native, processor
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.compose.planning import devices
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import say

REQUIRED = ("torch", "triton", "transformers", "datasets", "deepspeed")
OPTIONAL = {**EXTRAS, "optuna": "sweep", "liger_kernel": "cuda"}
"""Optional package, as it is imported, to the extra that installs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorRequest:
    """Describe this node: versions, GPUs, processor, compiler, how products of bf16 run, and what would be faster.

    example: distlora doctor
    """


class Line(NamedTuple):
    """A line of the page."""

    name: str
    text: str


def main(arguments: list[str]) -> int:
    """Print the page. Returns the exit code."""
    read(DoctorRequest, "distlora doctor", arguments)
    for line in page():
        say(f"{line.name:<11} {line.text}")
    return DONE


def page() -> Iterator[Line]:
    """Yield the lines of the page."""
    path = processor.preferred()
    yield Line(
        "distlora", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    )
    yield Line("packages", ", ".join(f"{name} {_version(name) or 'is missing'}" for name in REQUIRED))
    missing = [f"{name} ([{extra}])" for name, extra in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    yield Line("extras", f"not installed: {', '.join(missing)}" if missing else "all installed")
    gpus = gpu_count()
    described = ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in devices() or ())
    yield Line("GPUs", described or (f"{gpus}, which nvidia-smi does not describe" if gpus else "none"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = host_memory.available_bytes()
    available = "" if memory is None else f", {size(memory)} of memory available"
    yield Line("processor", f"{processor.name()}, {cores} core{'s' * (cores != 1)}{available}")
    yield Line("CPU path", f"{path}: {processor.DESCRIPTIONS[path]}")
    yield Line("supported", ", ".join(filter(processor.is_supported, processor.PATHS)))
    reason = native.unavailable_reason()
    command = shlex.join(native.compiler() or [])
    yield Line("compiler", f"{command} ({native.compiler_version()})" if reason is None else f"none: {reason}")
    yield Line("cache", str(cache_root()))
    yield from (Line("faster with", cure) for cure in _cures(path, gpus=gpus, compiles=reason is None))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cures(path: str, *, gpus: int, compiles: bool) -> Iterator[str]:
    """Yield what would make runs on this node faster."""
    if gpus:
        return
    if not compiles:
        yield "a C++ compiler (apt-get install g++): layers and products of a CPU run are then compiled"
    if os.environ.get(processor.VARIABLE):
        yield f"{processor.VARIABLE} unset, which overrides the processor's own path"
    if path == "generic":
        yield "train.dtype=fp32: products of bf16 are slow on this processor"
