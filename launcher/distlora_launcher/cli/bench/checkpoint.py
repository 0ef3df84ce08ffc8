"""`distlora bench checkpoint`: a save and a resume of a run, beside other libraries."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.bench.requests import CheckpointBench
from distlora.system.command_worker import encode_call
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.bench.worker import OUTPUT_HELP, add_output, check_counts, exec_worker, output_folder
from distlora_launcher.launch.workers import ENTRY
from distlora_launcher.terminal.arguments import Parser, numbers

USAGE = f"""usage: distlora bench checkpoint [--r 16] [--rounds N] [--tokens N] [--layers N] [--out FOLDER] [--json]

Save and resume a run on this machine's CPU, ours beside PEFT's save_pretrained, Trainer's checkpoints and accelerate's
save_state, on one process and two ranks: bytes beside the 12 per trained parameter that a resume needs, time of the
training thread, seconds until the files are on disk, seconds of a resume. Three minutes on two idle cores.

  --r N,N            ranks of the adapters, on every linear of a random Llama, 76M parameters in six layers (16)
  --rounds N         rounds of three steps each: saved in the background, saved on the training thread, not saved (4)
  --tokens N         tokens per step (64)
  --layers N         decoder layers of the model (6)
{OUTPUT_HELP}"""


def main(arguments: list[str]) -> int:
    """Check the arguments and become the worker. Returns only for --help."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    exec_worker(ENTRY, [encode_call("distlora.bench.checkpoint:main", parse(arguments))])


def parse(arguments: Sequence[str]) -> CheckpointBench:
    """Return the request. UserError for an unknown option or a wrong value."""
    parser, default = Parser("distlora bench checkpoint"), CheckpointBench()
    parser.add_argument("--r", default="16")
    for name in ("rounds", "tokens", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    add_output(parser)
    options = parser.parse_args(arguments)
    check_counts(parser, options, "rounds", "tokens", "layers")
    return CheckpointBench(
        r=tuple(numbers("--r", options.r)),
        rounds=options.rounds,
        tokens=options.tokens,
        layers=options.layers,
        out=output_folder(options),
        json=options.json,
    )
