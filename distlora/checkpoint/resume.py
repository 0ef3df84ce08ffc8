"""Which checkpoint a start goes on from: found, checked and tidied up by one rank, the same on all."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from distlora.config import UserError
from distlora.parallel import Ranks, from_rank_0
from distlora.run_folder.checkpoints import (
    newest,
    set_aside,
    step_folder,
    step_of,
    steps,
    tidy,
)
from distlora.run_folder.layout import BEST_NAME, CHECKPOINT_PATTERN, PUBLISHED
from distlora_kernels import native

_NONE, _NONE_WHOLE = -1, -2


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None where nothing was saved; and on rank 0 a line for each newer one, which is
    set aside.

    Rank 0 alone reads them, every byte, and the others wait for its choice: a run of 64 ranks would otherwise read
    hundreds of GB 64 times. It also removes what a killed writer left. Every rank must call it alike.

    Raises UserError, on every rank, where there are checkpoints and none is whole: a folder that cannot be read now may
    be readable tomorrow, and a run that began anew would remove it.
    """
    step = _NONE
    damaged: list[str] = []
    if ranks.rank == 0:
        tidy(checkpoints, CHECKPOINT_PATTERN)
        for name in (BEST_NAME, *PUBLISHED.values()):
            tidy(checkpoints.parent, name)
        folder, damaged = newest(checkpoints)
        if folder is not None:
            step = step_of(folder)
            newer = reversed([path for path in steps(checkpoints) if step_of(path) > step])
            damaged = [f"{line}; it is now {set_aside(path)}" for line, path in zip(damaged, newer, strict=True)]
        elif damaged:
            step = _NONE_WHOLE
    step = from_rank_0(step, ranks)
    if step == _NONE_WHOLE:
        named = "; ".join(damaged) or "rank 0 names what is wrong with each"
        raise UserError(
            f"no checkpoint in {checkpoints} is whole: {named}. Make that folder readable or put whole copies back; to "
            "begin anew, move it out of the run folder"
        )
    return (None if step == _NONE else step_folder(checkpoints, step)), damaged


def environment(world: int, device: torch.device, *, compiles: bool = False) -> dict[str, Any]:
    """Plain values; a resume where they are equal continues bit for bit. `compiles`: train.compile, whose bits are
    those of a compiler that knows the processor."""
    is_cuda = device.type == "cuda"
    return {
        "ranks": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "distlora": importlib.metadata.version("distlora"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        **({"compiler": native.says(), "processor": _processor()} if compiles else {}),
    }


def _processor() -> str | None:
    """Its model, as Linux names it."""
    known = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", known.read_text(), re.MULTILINE) if known.is_file() else None
    return platform.machine() if found is None else found[1]
