"""`distlora bench packed`: trials of a sweep on one base, packed and one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import (
    OUTPUT,
    add_output,
    become,
    output_words,
)
from distlora_launcher.demo.run import made_base
from distlora_launcher.terminal.arguments import Parser, numbers

PACKED = "distlora.bench.packed"

USAGE = f"""usage: distlora bench packed [--base FOLDER] [--trials 1,2,4,8] [--lengths 16,64] [--ranks 1,2] ...

A step of so many trials of a sweep on one base, with micro-batches of one row of so many tokens, beside one trial's and
all of them one after the other: time, bytes gathered; on the demo's base, or on the model in FOLDER. A few minutes.

{OUTPUT}"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    become(PACKED, checked(arguments))


def checked(arguments: Sequence[str]) -> list[str]:
    """The words for the process that measures. UserError for what is no number, and where there is no base."""
    parser = Parser("distlora bench packed")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--trials", default="1,2,4,8")
    parser.add_argument("--lengths", default="16,64")
    parser.add_argument("--ranks", default="1,2")
    add_output(parser)
    options = parser.parse_args(arguments)
    base = made_base() if options.base is None else options.base.expanduser()
    if not (base / "config.json").is_file():
        parser.error(f"--base {base} holds no model (no config.json); leave it out for the demo's")
    words = [str(base)]
    for name in ("trials", "lengths", "ranks"):
        words.append(f"--{name}={','.join(map(str, numbers(f'--{name}', getattr(options, name))))}")
    return [*words, *output_words(options)]
