"""`distlora verify RUN`: check everything in a run folder and print what is damaged."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from distlora_launcher.terminal.arguments import read

DAMAGED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """Check all files of a run and change nothing.

    It checks settings, data and packed sequences, every byte of the checkpoints and that they belong to this run,
    headers and values of the results, each line of metrics.jsonl, and left-over temporary files. Prints one line per
    item: ok, note (information) or damaged, with the reason and what to do.

    Exit codes: 0 nothing is damaged, 1 something is damaged, 2 RUN is not a run folder.

    example: distlora verify runs/first
    """

    run: Path
    """RUN: folder of a run."""
    json: bool = False
    """Print one JSON object: {"run", "damaged": count, "items": [{"name", "state", "message"}]}."""


def main(arguments: list[str]) -> int:
    """Check the run that the arguments name. Returns the exit code."""
    options = read(VerifyRequest, "distlora verify", arguments)
    run_dir = options.run.expanduser().absolute()
    from distlora.checkpoint.verify import verify

    items = []
    for item in verify(run_dir):
        items.append(item)
        if not options.json:
            print(f"{item.state:8} {item.name}{': ' if item.message else ''}{item.message}", flush=True)
    num_damaged = sum(item.state == "damaged" for item in items)
    if options.json:
        values = {"run": str(run_dir), "damaged": num_damaged, "items": [dataclasses.asdict(item) for item in items]}
        print(json.dumps(values, indent=2))
    return DAMAGED if num_damaged else 0
