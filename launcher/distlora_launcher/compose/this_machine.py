"""Read GPUs and host memory of this node, and find a model's sizes, without torch."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.config import Config
from distlora.planner.machine import Found
from distlora.planner.model import PlannedModel, find_model
from distlora.system import host_memory
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.compose.hub_preview import with_small_files

SECONDS = 20.0
"""nvidia-smi is waited for so long: it wakes GPUs, which takes several where no process keeps them awake."""


def found_here(*, asks_driver: bool = True) -> Found:
    """Return the GPUs that processes of this shell may use, and host memory.

    GPUs are left out if `asks_driver` is false.
    """
    return Found(
        devices=devices() if asks_driver else (),
        host_bytes=host_memory.available_bytes(),
        has_liger=importlib.util.find_spec("liger_kernel") is not None,
    )


@functools.cache
def devices() -> tuple[tuple[str, int], ...] | None:
    """Return (name, bytes of memory) of each GPU that processes may use, by nvidia-smi, in CUDA's order.

    If CUDA numbers the fastest first and the GPUs differ, the largest come first, as many as may be used. Returns None
    if there are GPUs that nvidia-smi does not describe, and for MIG slices.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = None if visible is None else _listed(visible)
    if words == []:
        return ()
    gpus = _asked()
    if not gpus:
        return None if gpu_count() else ()
    used = _visible(gpus, words)
    if used is None or any(gpu.memory is None or gpu.is_sliced for gpu in used):
        return None
    return tuple((gpu.name, gpu.memory) for gpu in used if gpu.memory is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gpu:
    """A GPU, as nvidia-smi has it."""

    name: str
    uuid: str
    memory: int | None
    """Bytes; None of one that has the host's."""
    is_sliced: bool


def _asked() -> list[_Gpu] | None:
    """Return the GPUs of this node in bus order; None if nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.total,uuid,mig.mode.current", "--format=csv,noheader,nounits"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[field.strip() for field in line.rsplit(",", 3)] for line in finished.stdout.splitlines()]
    if finished.returncode != 0 or any(len(row) != 4 for row in rows):
        return None
    return [
        _Gpu(name=name, uuid=uuid, memory=int(mib) * 2**20 if mib.isdecimal() else None, is_sliced=mig == "Enabled")
        for name, mib, uuid, mig in rows
    ]


def _visible(gpus: Sequence[_Gpu], words: Sequence[str] | None) -> Sequence[_Gpu] | None:
    """Return the GPUs in CUDA_VISIBLE_DEVICES (None: all), in the order of `devices`; None if one is missing."""
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({(c.name, c.memory) for c in gpus}) == 1
    numbered = gpus if by_bus else sorted(gpus, key=lambda gpu: -(gpu.memory or 0))
    if words is None:
        return numbered
    if not by_bus and all(word.isdecimal() for word in words):  # Any of the GPUs may have these numbers.
        return numbered[: len(words)] if len(words) <= len(gpus) else None
    found = [
        [gpu for number, gpu in enumerate(gpus) if gpu.uuid.startswith(word) or (by_bus and word == str(number))]
        for word in words
    ]
    return [each[0] for each in found] if all(len(each) == 1 for each in found) else None


def planned_model(config: Config, *, any_length: bool = False) -> PlannedModel:
    """Return the model of a config from its folder, the hub's cache, the built-in sizes, or the hub.

    From the hub only small files are downloaded. Raises UserError for a model that cannot be trained, and unless
    `any_length` for sequences longer than its positions.
    """
    return find_model(config, cache=hub_cache(), preview=with_small_files, any_length=any_length)


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder without importing it, which takes longer than a plan.

    By huggingface_hub.constants 1.x.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser()


def _listed(visible: str) -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES up to the first invalid one."""
    gpus: list[str] = []
    for word in visible.split(","):
        if word.strip() in ("", "-1"):
            break
        gpus.append(word.strip())
    return gpus
