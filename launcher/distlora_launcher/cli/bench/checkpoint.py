"""`distlora bench checkpoint`: a save and a resume of a run, beside the peers'."""

from __future__ import annotations

from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.measuring import (
    OUTPUT,
    add_output,
    become,
    check_counts,
    output_words,
)
from distlora_launcher.terminal.arguments import Parser, numbers

CHECKPOINT = "distlora.bench.checkpoint"

USAGE = f"""usage: distlora bench checkpoint [--r 16] [--rounds N] [--tokens N] [--layers N] [--out FOLDER] [--json]

A save and a resume on this machine's CPU, ours beside PEFT's save_pretrained, Trainer's checkpoints and accelerate's
save_state, on one process and two ranks: bytes beside the 12 of a trained parameter that a run needs to go on, what a
save takes of the thread that trains, seconds until the files are there, seconds of a resume. Three minutes on two idle
cores.

  --r N,N            ranks of the adapters, on every linear of a random Llama, 76M parameters in six blocks (16)
  --rounds N         rounds of three steps that are saved in the background, three at once, three not at all (4)
  --tokens N         of a step (64)
  --layers N         decoder blocks of the model (6)
{OUTPUT}"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that measures. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    parser = Parser("distlora bench checkpoint")
    parser.add_argument("--r", default="16")
    for name, default in {"rounds": 4, "tokens": 64, "layers": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    add_output(parser)
    options = parser.parse_args(arguments)
    words = check_counts(parser, options, "rounds", "tokens", "layers")
    become(CHECKPOINT, [f"--r={','.join(map(str, numbers('--r', options.r)))}", *words, *output_words(options)])
