"""What the planner asks of this machine and of the hub, without torch: GPUs and host memory, and a model's sizes."""

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
    """The GPUs of this machine that processes of this shell may use, and its host memory; none of the former where the
    driver need not be asked.
    """
    return Found(
        devices=devices() if asks_driver else (),
        host_bytes=host_memory.available_bytes(),
        has_liger=importlib.util.find_spec("liger_kernel") is not None,
    )


@functools.cache
def devices() -> tuple[tuple[str, int], ...] | None:
    """(name, bytes of memory) of each GPU that processes of this shell may use, by nvidia-smi, in the order in which
    CUDA numbers them. Where it numbers the fastest first, of GPUs that differ: the largest first, as many as may be
    used. None where there are some, of which the program, which containers may lack, does not say that; and for slices
    of a GPU (MIG), of which it names the whole.
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
    """The GPUs of this machine by their places on its bus; None where nvidia-smi is not here, or fails."""
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
    """Those that CUDA_VISIBLE_DEVICES names (None: all), as `devices` orders them; None where it names what is not
    there.
    """
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
    """The model of a config, from the first place that has its config.json: its folder, the hub's cache, what is built
    in; only then the hub, whose small files are fetched. Raises UserError for a model that cannot be trained, and
    unless `any_length` for rows that are longer than it has positions.
    """
    return find_model(config, cache=hub_cache(), preview=with_small_files, any_length=any_length)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded; known without importing it, which takes longer than a plan.

    By huggingface_hub.constants 1.x.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser()


def _listed(visible: str) -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, which end at the first that is none."""
    gpus: list[str] = []
    for word in visible.split(","):
        if word.strip() in ("", "-1"):
            break
        gpus.append(word.strip())
    return gpus
