"""`distlora bench memory`: the memory of a training step by category, planned and measured."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.bench.requests import MemoryBench
from distlora.config import nearest
from distlora.system.command_worker import encode_call
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.worker import OUTPUT_HELP, add_output, check_gpus, exec_worker, output_folder
from distlora_launcher.launch.workers import ENTRY
from distlora_launcher.terminal.arguments import Parser, numbers

MODELS = ("10M", "100M", "0.5B", "1.5B")
"""Sizes of the random Llamas."""

USAGE = f"""usage: distlora bench memory [--models 10M,100M] [--ranks 1,2] [--out FOLDER] [--json]

Measure the memory of a training step by category beside the plan, for random Llamas of {", ".join(MODELS)}
parameters on each number of ranks of this machine, in each mode; from a minute for the smallest on a CPU to half an
hour.

  --models SIZE,SIZE sizes of the models (10M,100M)
  --ranks N,N        number of processes, or GPUs (1,2)
{OUTPUT_HELP}"""


def main(arguments: list[str]) -> int:
    """Check the arguments and become the worker. Returns only for --help."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    exec_worker(ENTRY, [encode_call("distlora.bench.memory:main", parse(arguments))])


def parse(arguments: Sequence[str]) -> MemoryBench:
    """Return the request. UserError for an unknown size or more ranks than GPUs."""
    parser = Parser("distlora bench memory")
    parser.add_argument("--models", default="10M,100M")
    parser.add_argument("--ranks", default="1,2")
    add_output(parser)
    options = parser.parse_args(arguments)
    models = tuple(options.models.split(","))
    for name in models:
        if name not in MODELS:
            parser.error(f"--models={name} is not a known size{nearest(name, MODELS)}; write {', '.join(MODELS)}")
    ranks = tuple(numbers("--ranks", options.ranks))
    check_gpus(parser, ranks)
    return MemoryBench(models=models, ranks=ranks, out=output_folder(options), json=options.json)
