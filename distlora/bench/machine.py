"""The machine that a measurement runs on, as the planner takes it and as its figures are said."""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from distlora.plan.machine import Found


def found_by(device: torch.device, *, ranks: int = 1) -> Found:
    """What so many ranks have that each have a device like this one."""
    devices: tuple[tuple[str, int], ...] = ()
    if device.type == "cuda":
        devices = ((torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]),) * ranks
    return Found(devices=devices, has_liger=importlib.util.find_spec("liger_kernel") is not None)


def print_rows(rows: Sequence[Any], table: Callable[[Sequence[Any]], Iterable[str]], *, as_json: bool) -> None:
    """The rows (dataclasses) of a measurement: for programs, or as a table with the day and the machine."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1), flush=True)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    print("\n".join(table(rows)), f"\n\n{datetime.date.today()}, {device}, torch {torch.__version__}", flush=True)
