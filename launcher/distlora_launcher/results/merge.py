"""`distlora merge RUN`: a base and what was trained on it as one model, in Hugging Face format.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.merging`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from distlora.command_line import DONE
from distlora.config import require
from distlora.merging.request import Request, check_mergeable
from distlora.trained import Trained
from distlora_launcher.arguments import Parser
from distlora_launcher.checks import check_writable
from distlora_launcher.handover import become
from distlora_launcher.output import shown
from distlora_launcher.results.named import ARGUMENTS, add_arguments, named

WORKER = "distlora.merging"

USAGE = f"""usage: distlora merge RUN [--out FOLDER] [--onto trained|original] [--dtype fp32|bf16|fp16]

Write the base with what was trained on it as one model in Hugging Face format, a few rows at a time on the CPU, and
merge.json: what it was made from, SHA-256 of everything, and how much of the adapter's change was kept, tensor by
tensor. Works on an unfinished run too (its newest checkpoint).

{ARGUMENTS}

  --out FOLDER         where it goes: a new folder (RUN/merged, or ADAPTER-merged beside an adapter)
  --onto trained       the base as it was trained on, dequantized: computes what training computed (the default)
  --onto original      the base as it is on disk: other outputs than in training by what NF4 loses
  --dtype DTYPE        of the weights: fp32, which loses nothing; bf16 or fp16, which round (fp32)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    request = checked(arguments)
    print(f"merging into {shown(Path(request.out))} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request.as_json())


def checked(arguments: list[str]) -> Request:
    """The request. Raises UserError for whatever can be told here."""
    parser = Parser("distlora merge")
    add_arguments(parser)
    parser.add_argument("--out")
    parser.add_argument("--onto", choices=("trained", "original"), default="trained")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    options = parser.parse_args(arguments)
    name, trained = named(options)
    check_mergeable(trained, options.onto)
    out = default_out(trained) if options.out is None else Path(options.out).expanduser().absolute()
    require(not out.exists(), f"--out={shown(out)} exists already; name another folder, or remove it")
    check_writable(out, "--out")
    return Request(name=name, out=str(out), onto=options.onto, dtype=options.dtype)


def default_out(trained: Trained) -> Path:
    """In the run's folder, or beside an adapter that has none."""
    if trained.run_dir is not None:
        return trained.run_dir / "merged"
    place = Path(trained.place).expanduser().absolute()
    return place.with_name(f"{place.name}-merged")
