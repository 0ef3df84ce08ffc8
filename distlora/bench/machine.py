"""The machine that a measurement runs on, as the planner takes it and as its figures are said."""

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
    """What so many ranks have that each have a device like this one."""
    devices: tuple[tuple[str, int], ...] = ()
    if device.type == "cuda":
        devices = ((torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]),) * ranks
    return Found(devices=devices, has_liger=importlib.util.find_spec("liger_kernel") is not None)


def made_here(*packages: str, threads: int | None = None) -> str:
    """The day, the device, the threads and the versions behind figures; and how busy the machine is. `threads`: of the
    processes that were measured; None for those of this one."""
    threads = threads or torch.get_num_threads()
    named = ("torch", *(name for name in packages if name != "torch"))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in named)
    used = f"{threads} threads" if threads > 1 else "1 thread"
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{datetime.date.today()}, {device_name()}, {os.cpu_count()} cores, {used} here, load {load}; {versions}"


def device_name() -> str:
    """The GPU; without one the CPU, with what makes its products of bf16 fast."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return " ".join([values.get("model name", platform.machine()), *flags])
