"""Describe the machine of a measurement, for the planner and for the notes below a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from distlora.planner.machine import Found


def found_by(device: torch.device, *, ranks: int = 1) -> Found:
    """Return the planner's view of `ranks` ranks with a device like this one each."""
    devices: tuple[tuple[str, int], ...] = ()
    if device.type == "cuda":
        devices = ((torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]),) * ranks
    return Found(devices=devices, has_liger=importlib.util.find_spec("liger_kernel") is not None)


def measurement_notes(*packages: str, threads: int | None = None) -> str:
    """Return the date, device, threads, load and package versions of a measurement.

    Args:
        packages: Packages whose versions matter, besides torch.
        threads: Threads of the measured processes; None for those of this process.
    """
    threads = threads or torch.get_num_threads()
    named = ("torch", *(name for name in packages if name != "torch"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in named)
    used = f"{threads} threads" if threads > 1 else "1 thread"
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{datetime.date.today()}, {device_name()}, {os.cpu_count()} cores, {used}, load {load}; {versions}"


def device_name() -> str:
    """Return the GPU's name; without a GPU the CPU's, with its instructions for bf16 matrix products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return " ".join([values.get("model name", platform.machine()), *flags])
