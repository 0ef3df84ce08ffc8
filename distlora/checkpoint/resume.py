"""Choose the checkpoint that a start resumes from, and record the environment that its bits depend on."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from distlora.config import UserError
from distlora.parallel import Ranks, from_rank_0
from distlora.run_folder.checkpoint_manifest import newest, set_aside, step_folder, step_of, steps, tidy
from distlora.run_folder.layout import BEST_NAME, CHECKPOINT_PATTERN, PUBLISHED
from distlora_kernels import native

_NONE, _NONE_WHOLE = -1, -2


def choose(checkpoints: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint (None if nothing was saved), and on rank 0 one line per newer, damaged one.

    Rank 0 alone reads the checkpoints, every byte, and broadcasts its choice; 64 ranks would otherwise read hundreds of
    GB each. It sets damaged newer checkpoints aside and removes what a killed writer left. Every rank must call it
    alike.

    Raises UserError on every rank if there are checkpoints and none is whole: the folder may be readable again later,
    and a run that began anew would remove it.
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
        named = "; ".join(damaged) or "rank 0 reports the damage of each"
        raise UserError(
            f"no checkpoint in {checkpoints} is whole: {named}. Make that folder readable or restore whole copies; "
            "to start over, move it out of the run folder"
        )
    return (None if step == _NONE else step_folder(checkpoints, step)), damaged


def environment(world: int, device: torch.device, *, compiles: bool = False) -> dict[str, Any]:
    """Return the versions and hardware that the bits of a step depend on, beside the data and the settings.

    A resume with equal values continues bit for bit. `compiles`: train.compile, whose bits depend on compiler and CPU.
    """
    is_cuda = device.type == "cuda"
    return {
        "ranks": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "distlora": importlib.metadata.version("distlora"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        **({"compiler": native.compiler_version(), "processor": _processor()} if compiles else {}),
    }


def _processor() -> str | None:
    """Return the CPU's model name."""
    known = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", known.read_text(), re.MULTILINE) if known.is_file() else None
    return platform.machine() if match is None else match[1]
