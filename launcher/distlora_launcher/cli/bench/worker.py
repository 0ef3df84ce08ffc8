"""Start the worker process of a benchmark, and the options that several benchmarks share."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distlora_launcher.compose.checks import check_writable, gpu_count
from distlora_launcher.terminal.arguments import Parser

OUTPUT_HELP = """  --out FOLDER       write the results there as Markdown, CSV and a plot
  --json             print every figure as JSON"""


def add_output(parser: Parser) -> None:
    """Add --out and --json."""
    parser.add_argument("--out")
    parser.add_argument("--json", action="store_true")


def output_folder(options: Namespace) -> str | None:
    """Return the absolute folder of --out. UserError if it cannot be written to."""
    if options.out is None:
        return None
    out = Path(options.out).expanduser().absolute()
    check_writable(out, "--out")
    return str(out)


def check_counts(parser: Parser, options: Namespace, *names: str) -> None:
    """Raise UserError for an option below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} is not a positive number; write --{name} 1 or more")


def check_gpus(parser: Parser, ranks: Sequence[int]) -> None:
    """Raise UserError if a number of ranks exceeds this machine's GPUs."""
    gpus = gpu_count()
    if 0 < gpus < max(ranks):
        parser.error(f"--ranks={max(ranks)} exceeds the {gpus} GPUs of this machine; write fewer")


def exec_worker(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module arguments`, in the user's environment."""
    sys.stdout.flush()
    # In Triton's interpreter there is nothing to compile or to measure.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment | {"PYTHONSAFEPATH": "1"})
