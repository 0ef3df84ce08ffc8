"""`distlora data preview`: what a run would be trained on, before it is started; `distlora data row`: what it was.

For the preview the settings are composed and the model and the data checked as for `distlora train`. A process of its
own, which may import transformers, then reads and prints (`python -m distlora.data.preview`, `...show_row`). Nothing is
written.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distlora.config import UserError, nearest
from distlora.config.file import load_config
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check_data, check_model
from distlora_launcher.compose.compose import compose_config, expand_home
from distlora_launcher.compose.hub_preview import with_small_files
from distlora_launcher.launch.local import create_run
from distlora_launcher.terminal.arguments import Parser

USAGE = """usage: distlora data preview model.path=FOLDER data.path=FILE [setting=value ...]
                             [--rows N] [--all] [--no-color] [--config-dir FOLDER]
       distlora data row RUN N [N ...] [--no-color]

preview: print documents as the model sees them, with the trained tokens in green (between [[ and ]] in a file or a
pipe, with NO_COLOR or --no-color), then the figures: lengths, what is too long and what becomes of it, what is left out
and why, the shares of a mixture, what packing leaves empty. The settings are those of `distlora train`.

  --rows N       documents of each source to print (2)
  --all          read everything; without it, the first 1,000 documents of each source
  --no-color     mark trained tokens with [[ ]] on a terminal too
  --config-dir   a folder with groups of your own, as for `distlora train`

row: print packed training rows of the run folder RUN by their numbers, as messages name them."""


def main(arguments: list[str]) -> int:
    """Check everything, then run the process that prints. Returns its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    if arguments[0] == "row":
        return show_rows(arguments[1:])
    if arguments[0] != "preview":
        raise UserError(
            f"distlora data: there is no command {arguments[0]!r}{nearest(arguments[0], ['preview', 'row'])}; write "
            "distlora data preview ... or distlora data row RUN N"
        )
    options, overrides = parse([expand_home(word) for word in arguments[1:]])
    config = compose_config(overrides, config_dir=options.config_dir)
    check_model(config)
    check_data(config)
    with with_small_files(config.model) as model, tempfile.TemporaryDirectory(prefix="distlora-preview-") as folder:
        create_run(Path(folder), dataclasses.replace(config, model=model))
        flags = ["--rows", str(options.rows), *(["--all"] if options.all else [])]
        flags += ["--no-color"] if options.no_color else []
        return _run("distlora.data.preview", folder, *flags)


def show_rows(arguments: list[str]) -> int:
    """Run the process that prints rows of a run. Returns its exit code."""
    words = [word for word in arguments if word != "--no-color"]
    if len(words) < 2 or not all(word.isdecimal() for word in words[1:]):
        raise UserError(
            f"distlora data row takes a run folder and row numbers, not "
            f"{' '.join(words) or 'nothing'!r}; write distlora data row RUN 0"
        )
    load_config(words[0])
    return _run("distlora.data.show_row", *arguments)


def _run(module: str, *arguments: str) -> int:
    command = [sys.executable, "-m", module, *arguments]
    code = subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False).returncode
    return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, overrides). UserError for an unknown flag, with the nearest, and for values that are no numbers."""
    parser = Parser("distlora data preview", help="distlora data --help")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--no-color", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    if options.rows < 0:
        parser.error(f"--rows={options.rows} is no number of documents; write 0 or more")
    return options, options.overrides
