"""`distlora bench load`: what a start takes, with and without the cache of quantized shards, beside the peers."""

from __future__ import annotations

import json
import os

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import (
    OUTPUT,
    add_output,
    become,
    check_counts,
    output_words,
)
from distlora_launcher.launch.workers import ON_CPU
from distlora_launcher.terminal.arguments import Parser, numbers

LOAD = "distlora.bench.load"

USAGE = f"""usage: distlora bench load [--layers N] [--ranks 1,2] [--rounds N] [--out FOLDER] [--json]

What a start takes on this machine's CPU, for a random model of 0.76 billion parameters: quantizing its checkpoint,
keeping the shards, and reading them again, on each number of ranks, beside transformers + bitsandbytes. All take turns;
five minutes on two idle cores.

  --layers N         decoder blocks of the model (14)
  --ranks N,N        processes that share two threads (1,2)
  --rounds N         turns of each (3)
{OUTPUT}"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    parser = Parser("distlora bench load")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser)
    options = parser.parse_args(arguments)
    ranks = ",".join(map(str, numbers("--ranks", options.ranks)))
    words = check_counts(parser, options, "layers", "rounds")
    own = {name: value for name, value in ON_CPU.items() if name not in os.environ}
    become(LOAD, [*words, f"--ranks={ranks}", f"--environment={json.dumps(own)}", *output_words(options)])
