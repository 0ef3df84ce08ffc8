"""What the bits of a step depend on beside the data and the settings."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from distlora_kernels import native


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
