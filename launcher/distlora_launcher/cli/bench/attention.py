"""`distlora bench attention`: the CPU's attention in bf16 beside torch's."""

from __future__ import annotations

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import become, check_counts
from distlora_launcher.terminal.arguments import Parser

ATTENTION = "distlora.bench.attention"

USAGE = """usage: distlora bench attention [--threads N] [--rounds N]

How long the CPU's attention in bf16 takes, by products of matrices and compiled (train.compile), forward and backward,
beside torch's flash attention on the same documents, in turns, as Markdown.

  --threads N        (1)
  --rounds N         of which the fastest counts (7)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    parser = Parser("distlora bench attention")
    for name, default in {"threads": 1, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    become(ATTENTION, check_counts(parser, parser.parse_args(arguments), "threads", "rounds"))
