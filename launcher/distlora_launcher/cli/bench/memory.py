"""`distlora bench memory`: what a training step has in memory, planned and measured by kind."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.config import nearest
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import (
    OUTPUT,
    add_output,
    become,
    output_words,
)
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.terminal.arguments import Parser, numbers

MEMORY = "distlora.bench.against_plan"
MODELS = ("10M", "100M", "0.5B", "1.5B")
"""Sizes of the random Llamas."""

USAGE = f"""usage: distlora bench memory [--models 10M,100M] [--ranks 1,2] [--out FOLDER] [--json]

What a training step has in memory, planned and measured by kind, of random Llamas of {", ".join(MODELS)} parameters on
so many ranks of this machine, in each mode; from a minute for the smallest on a CPU to half an hour.

{OUTPUT}"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    become(MEMORY, checked(arguments))


def checked(arguments: Sequence[str]) -> list[str]:
    """The words for the process that measures. UserError for a size or a number of ranks that cannot be."""
    parser = Parser("distlora bench memory")
    parser.add_argument("--models", default="10M,100M")
    parser.add_argument("--ranks", default="1,2")
    add_output(parser)
    options = parser.parse_args(arguments)
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"--models={name} is no size that is known{nearest(name, MODELS)}; write {', '.join(MODELS)}")
    ranks, gpus = numbers("--ranks", options.ranks), gpu_count()
    if 0 < gpus < max(ranks):
        parser.error(f"--ranks={max(ranks)} are more than the {gpus} GPUs that this machine shows; write fewer")
    return [f"--models={options.models}", f"--ranks={','.join(map(str, ranks))}", *output_words(options)]
