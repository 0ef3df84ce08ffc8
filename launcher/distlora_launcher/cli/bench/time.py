"""`distlora bench time`: a training step's seconds, beside what the plan says at rates that are measured here."""

from __future__ import annotations

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import become, check_counts
from distlora_launcher.terminal.arguments import Parser

TIME = "distlora.bench.step_time"

USAGE = """usage: distlora bench time [--threads N] [--repeats N] [--blocks N]

Seconds of a training step of a random Llama on one process, measured, beside what the planner says at the rates of
products and copies that are measured in the same minutes; on a GPU by its data sheet too. As Markdown.

  --threads N        of a CPU (1)
  --repeats N        turns of each (6)
  --blocks N         decoder blocks of the model (2)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    parser = Parser("distlora bench time")
    for name, default in {"threads": 1, "repeats": 6, "blocks": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    become(TIME, check_counts(parser, options, "threads", "repeats", "blocks"))
