"""From a bench's command to the process that measures."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distlora_launcher.compose.checks import check_writable
from distlora_launcher.terminal.arguments import Parser

OUTPUT = """  --out FOLDER       keep the results there as Markdown, CSV and a plot
  --json             every figure, for a program to read"""
"""Of a usage: the options that every bench has whose results distlora/output/result_files.py shows."""


def add_output(parser: Parser) -> None:
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")


def check_output(options: Namespace) -> Path | None:
    """The folder that --out names. UserError for one that cannot be written to."""
    if options.out is None:
        return None
    out: Path = options.out.expanduser().absolute()
    check_writable(out, "--out")
    return out


def output_words(options: Namespace) -> list[str]:
    """--out and --json for the process that measures. UserError for a folder that cannot be written to."""
    out = check_output(options)
    return [*(["--json"] if options.json else []), *([] if out is None else [f"--out={out}"])]


def check_counts(parser: Parser, options: Namespace, *names: str) -> list[str]:
    """These options for the process that measures. UserError for one below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} is no count; write --{name} 1 or more")
    return [f"--{name}={getattr(options, name)}" for name in names]


def become(module: str, words: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module words`, in the environment that the user has."""
    sys.stdout.flush()
    # In Triton's interpreter there would be nothing to compile or to measure.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    os.execve(sys.executable, [sys.executable, "-m", module, *words], environment | {"PYTHONSAFEPATH": "1"})
