"""Complete words on Tab: Hydra completes the settings of `distlora train` and `plan`, this module the commands."""

from __future__ import annotations

import os
import sys

from distlora_launcher.cli.main import COMMANDS

TAKE_SETTINGS = ("train", "plan")
"""Commands whose arguments are settings."""


def main(words: list[str]) -> int:
    """Answer `distlora -sc install=bash|uninstall=bash|query=bash`, as Hydra's shell functions call it."""
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()
    if any(word.startswith("query=") for word in words):
        if len(typed) < 2 or (len(typed) == 2 and not line.endswith(" ")):
            prefix = typed[1] if len(typed) == 2 else ""
            print(" ".join(name for name in COMMANDS if name.startswith(prefix)))
            return 0
        if typed[1] not in TAKE_SETTINGS:
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {typed[1]}", "", 1)
    from distlora_launcher.cli.train import run_hydra

    return run_hydra(words, program=sys.argv[0])
