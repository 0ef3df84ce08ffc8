"""`distlora bench dora`: what DoRA costs beside LoRA."""

from __future__ import annotations

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import become, check_counts
from distlora_launcher.terminal.arguments import Parser, numbers

DORA = "distlora.bench.dora"

USAGE = """usage: distlora bench dora [--rows N] [--sizes 1024,2048] [--threads N] [--repeats N]

What DoRA costs beside LoRA in one adapted linear, forward and backward: counted for a GPU, measured on this CPU, as
Markdown. A minute on an idle core.

  --rows N           of a step (2048)
  --sizes N,N        inputs and outputs of the linears that are measured (1024,2048)
  --threads N        (1)
  --repeats N        turns of each (15)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    parser = Parser("distlora bench dora")
    parser.add_argument("--sizes", default="1024,2048")
    for name, default in {"rows": 2048, "threads": 1, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    words = check_counts(parser, options, "rows", "threads", "repeats")
    become(DORA, [f"--sizes={','.join(map(str, numbers('--sizes', options.sizes)))}", *words])
