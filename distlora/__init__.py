"""distlora: multi-GPU QLoRA training. Importing it has no effects.

The Python API (docs/python.md) is in distlora_launcher/api.py, which is imported at the first use of its names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlora.config import UserError
    from distlora_launcher.api import Callback, Run, RunFailedError, load, plan, train

__version__ = "0.1.0"
__all__ = ["Callback", "Run", "RunFailedError", "UserError", "load", "plan", "train"]


def __getattr__(name: str) -> Any:
    """Return a name of the Python API: the one way from this package up to the launcher."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("distlora_launcher.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
