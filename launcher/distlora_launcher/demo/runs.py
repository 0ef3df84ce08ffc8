"""The processes that the demo starts: training runs, as `distlora train` and `resume` do them, and its own helpers."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from distlora.config.file import load_config
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.launch import local


def run_settings(overrides: list[str]) -> int:
    """What `distlora train <overrides>` does; prints that command first. Returns its exit code."""
    print(command_line("train", overrides), flush=True)
    config = compose_config(overrides)
    check(config, new_run=True)
    return local.start_run(config)


def continue_run(run_dir: Path) -> int:
    """What `distlora resume` does; prints that command first. Returns its exit code."""
    print(command_line("resume", [str(run_dir)]), flush=True)
    return local.resume_run(run_dir, load_config(run_dir))


def command_line(command: str, arguments: list[str]) -> str:
    """`$ distlora COMMAND ...` as one could paste it into a shell, in lines of 100 characters where words allow."""
    text = f"distlora {command} {shlex.join(arguments)}"
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "$ " + " \\\n    ".join(lines)


def run_module(module: str, *arguments: str) -> None:
    """Run `python -m module arguments`. Its output, mostly notices of libraries, is shown only where it fails.

    Raises RuntimeError with that output.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stdout}")
