"""`distlora verify RUN`: look through a run folder and say of each thing in it whether it is whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from distlora.checkpoint.verify import verify
from distlora_launcher.terminal.arguments import Parser

USAGE = """usage: distlora verify RUN [--json]

Check everything in the run folder RUN: settings, data and packed rows, every byte of the checkpoints and that they are
this run's, results by headers and values, figures line by line, and what killed processes left. A line for each thing:
ok, note (worth knowing) or damaged, with the reason and what to do. Changes nothing.

  --json    one JSON object: {"run", "damaged": how many, "items": [{"name", "state", "said"}]}

Exit codes: 0 nothing is damaged, 1 something is, 2 RUN is no run folder."""

DAMAGED = 1


def main(arguments: list[str]) -> int:
    """Check the run that the arguments name. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    parser = Parser("distlora verify")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run_dir = Path(options.run).expanduser().absolute()
    items = []
    for item in verify(run_dir):
        items.append(item)
        if not options.json:
            print(f"{item.state:8} {item.name}{': ' if item.said else ''}{item.said}", flush=True)
    num_damaged = sum(item.state == "damaged" for item in items)
    if options.json:
        values = {"run": str(run_dir), "damaged": num_damaged, "items": [dataclasses.asdict(item) for item in items]}
        print(json.dumps(values, indent=2))
    return DAMAGED if num_damaged else 0
