"""Refuse a command whose optional packages are missing, with the `pip install` line. Imports no torch."""

from __future__ import annotations

import importlib.util

from distlora.config import UserError

EXTRAS = {"gguf": "gguf", "lm_eval": "eval", "peft": "demo", "bitsandbytes": "bnb", "accelerate": "bnb"}
"""Optional package, as it is imported, to the extra of distlora that installs it."""


def require_package(package: str, argument: str, *, otherwise: str = "") -> None:
    """Raise UserError if a package that `argument` needs is missing. `otherwise` is another cure, such as a flag."""
    if importlib.util.find_spec(package) is None:
        extra = EXTRAS.get(package)
        install = f"'distlora[{extra}]'" if extra else package.replace("_", "-")
        raise UserError(f"{argument} needs {package}, which is not installed; `pip install {install}`{otherwise}")
