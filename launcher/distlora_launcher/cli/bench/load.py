"""`distlora bench load`: time and memory of loading a model, with and without the quantized-weights cache."""

from __future__ import annotations

import os
from collections.abc import Sequence

from distlora.bench.requests import LoadBench
from distlora.system.command_worker import encode_call
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.worker import OUTPUT_HELP, add_output, check_counts, exec_worker, output_folder
from distlora_launcher.launch.workers import ENTRY, ON_CPU
from distlora_launcher.terminal.arguments import Parser, numbers

USAGE = f"""usage: distlora bench load [--layers N] [--ranks 1,2] [--rounds N] [--out FOLDER] [--json]

Load a random model of 0.76 billion parameters into NF4 on this machine's CPU: without the quantized-weights cache,
filling it, and from it, on each number of ranks, beside transformers + bitsandbytes. All take turns; five minutes on
two idle cores.

  --layers N         decoder layers of the model (14)
  --ranks N,N        number of processes, which share two threads (1,2)
  --rounds N         turns of each (3)
{OUTPUT_HELP}"""


def main(arguments: list[str]) -> int:
    """Check the arguments and become the worker. Returns only for --help."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    exec_worker(ENTRY, [encode_call("distlora.bench.load:main", parse(arguments))])


def parse(arguments: Sequence[str]) -> LoadBench:
    """Return the request. UserError for an unknown option or a wrong value."""
    parser = Parser("distlora bench load")
    parser.add_argument("--layers", type=int, default=LoadBench().layers)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=LoadBench().rounds)
    add_output(parser)
    options = parser.parse_args(arguments)
    check_counts(parser, options, "layers", "rounds")
    return LoadBench(
        layers=options.layers,
        ranks=tuple(numbers("--ranks", options.ranks)),
        rounds=options.rounds,
        environment={name: value for name, value in ON_CPU.items() if name not in os.environ},
        out=output_folder(options),
        json=options.json,
    )
