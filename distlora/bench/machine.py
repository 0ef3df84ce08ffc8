"""The machine that a measurement runs on, as the planner takes it."""

from __future__ import annotations

import importlib.util

import torch

from distlora.plan.machine import Found


def found_by(device: torch.device, *, ranks: int = 1) -> Found:
    """What so many ranks have that each have a device like this one."""
    devices: tuple[tuple[str, int], ...] = ()
    if device.type == "cuda":
        devices = ((torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]),) * ranks
    return Found(devices=devices, has_liger=importlib.util.find_spec("liger_kernel") is not None)
