"""What the planner asks of this machine and of the hub, without torch: GPUs and host memory, and a model's sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from distlora import host_memory
from distlora.config import Config
from distlora.plan.machine import Found
from distlora.plan.model import PlannedModel, find_model
from distlora_launcher.hub_preview import with_small_files

SECONDS = 20.0
"""nvidia-smi is waited for so long: it wakes cards, which takes several where no process keeps them awake."""


def found_here() -> Found:
    """The GPUs of this machine that processes of this shell may use, and its host memory."""
    return Found(devices=devices(), host_bytes=host_memory.available_bytes())


def devices() -> tuple[tuple[str, int], ...] | None:
    """(name, bytes of memory) of each GPU, by nvidia-smi; none where there is no such program, or it fails: a machine
    whose driver does not answer trains on its CPU. None for slices of a card (MIG), of which it names the whole."""
    program, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or (visible is not None and not _listed(visible)):
        return ()
    if visible is not None and any(card.startswith("MIG") for card in _listed(visible)):
        return None
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    command += [f"--id={','.join(_listed(visible))}"] if visible is not None else []
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = finished.stdout.splitlines() if finished.returncode == 0 else []
    fields = (line.rpartition(",") for line in lines)
    return tuple((name.strip(), int(mib) * 2**20) for name, _, mib in fields if mib.strip().isdecimal())


def planned_model(config: Config, *, any_length: bool = False) -> PlannedModel:
    """The model of a config, from the first place that has its config.json: its folder, the hub's cache, what is built
    in; only then the hub, whose small files are fetched. Raises UserError for a model that cannot be trained, and
    unless `any_length` for rows that are longer than it has positions."""
    return find_model(config, cache=hub_cache(), preview=with_small_files, any_length=any_length)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded; known without importing it, which takes longer than a plan.

    By huggingface_hub.constants 1.x.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(named)).expanduser()


def _listed(visible: str) -> list[str]:
    """The cards of CUDA_VISIBLE_DEVICES, which end at the first that is none."""
    cards: list[str] = []
    for word in visible.split(","):
        if word.strip() in ("", "-1"):
            break
        cards.append(word.strip())
    return cards
