"""What the bits of a step depend on beside the data and the settings."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch


def environment(world: int, device: torch.device) -> dict[str, Any]:
    """Plain values; a resume where they are equal continues bit for bit."""
    is_cuda = device.type == "cuda"
    return {
        "ranks": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "distlora": importlib.metadata.version("distlora"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }
