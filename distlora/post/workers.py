"""Run the worker of a command alone or as one of several ranks, and describe its environment."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distlora.config.errors import named_settings
from distlora.parallel import Ranks, join_ranks, leave_ranks
from distlora.system.exit_codes import DONE, FAILED, run_to_exit_code
from distlora.system.progress import say


def run_on_ranks(
    work: Callable[[Ranks], None], *, when_memory_is_out: str, names: Mapping[str, str] | None = None
) -> int:
    """Do `work` on this rank and return the exit code.

    0 done, 2 bad input, 130 Ctrl-C, 1 if a GPU runs out of memory, which prints `when_memory_is_out`. With several
    ranks, errors go to torchrun. `names` maps settings to the command's arguments for UserErrors.
    """
    ranks = join_ranks()
    if ranks.world > 1:
        with named_settings(names or {}):
            work(ranks)
        leave_ranks(ranks)
        return DONE

    def alone() -> int:
        try:
            work(ranks)
        except torch.OutOfMemoryError as error:
            say(f"error: {str(error).partition('. ')[0]}; {when_memory_is_out}")
            return FAILED
        return DONE

    return run_to_exit_code(alone, names=names)


def made_on(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return the date, device and versions to report with figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "device": f"{device.type} ({name})",
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
