"""`distlora merge RUN`: a base and what was trained on it as one model, in Hugging Face format.

Everything that can be refused is refused here, before torch is imported. Then the worker
(`python -m distlora.post.merge`) writes the folder, and this process becomes the one that measures it
(`python -m distlora.post.evaluate`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from distlora.config import require
from distlora.post.evaluate.request import NAMES as evaluation_names
from distlora.post.evaluate.request import EvaluateRequest
from distlora.post.merge.request import MergeRequest, check_mergeable
from distlora.system.exit_codes import DONE
from distlora_launcher.cli import measuring
from distlora_launcher.cli.named import ARGUMENTS, add_arguments, default_place, named
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.launch.workers import become, run_alone, run_several
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER, MEASURER = "distlora.post.merge.merge:main", "distlora.post.evaluate.worker:main"

NAMES = evaluation_names | {"model.path": "--model"}
USAGE = f"""usage: distlora merge RUN [--out FOLDER] [--onto trained|original] [--dtype fp32|bf16|fp16]
                      [--text FILE] [--rows N] [--compare] [--processes N] [--no-measure]

Write the base with what was trained on it as one model in Hugging Face format, a few rows at a time on the CPU, and
merge.json: what it was made from, SHA-256 of everything, and how much of the adapter's change was kept, tensor by
tensor. Then the merged model is measured beside the model as it was trained: loss, divergence and the largest
difference of a logit go into merge.json and merge.md. Works on an unfinished run too (its newest checkpoint).

{ARGUMENTS}

  --out FOLDER         where it goes: a new folder (RUN/merged, RUN/merged-CHECKPOINT, or ADAPTER-merged)
  --onto trained       the base as it was trained on, dequantized: computes what training computed (the default)
  --onto original      the base as it is on disk: other outputs than in training by what NF4 loses
  --dtype DTYPE        of the weights: fp32, which loses nothing of what was added, nor of the base as training held it
                       (NF4's values; what is not in NF4 rounded to train.dtype, of an adapter without a run as it is
                       on disk); bf16 or fp16, which round (fp32)
{measuring.ARGUMENTS}"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    request, measured, processes = checked(arguments)
    print(f"merging into {shown(Path(request.out))} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    if measured is None:
        become(WORKER, request)
    code = run_alone(WORKER, request)
    if code != DONE:
        return code
    assert measured.text is not None
    print(f"measuring on {measured.text.name}", file=sys.stderr, flush=True)
    if processes > 1:
        return run_several(MEASURER, measured, processes)
    become(MEASURER, measured)


def checked(arguments: list[str]) -> tuple[MergeRequest, EvaluateRequest | None, int]:
    """Return (the request, the measurement afterwards, its number of processes).

    Raises UserError for anything that can be checked before the run.
    """
    parser = Parser("distlora merge")
    add_arguments(parser)
    parser.add_argument("--out")
    parser.add_argument("--onto", choices=("trained", "original"), default="trained")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    measuring.add_arguments(parser)
    options = parser.parse_args(arguments)
    name, trained = named(options)
    check_mergeable(trained, options.onto)
    out = (
        default_place(trained, options, "merged") if options.out is None else Path(options.out).expanduser().absolute()
    )
    require(not out.exists(), f"--out={shown(out)} exists already; name another folder, or remove it")
    check_writable(out, "--out")
    measured, why_not = measuring.to_measure(options, name, trained, out, options.dtype)
    if measured is None and not options.no_measure:
        print(f"not measured: {why_not}", file=sys.stderr, flush=True)
    request = MergeRequest(name=name, out=str(out), onto=options.onto, dtype=options.dtype)
    return request, measured, options.processes
