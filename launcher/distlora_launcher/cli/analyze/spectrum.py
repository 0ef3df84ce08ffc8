"""`distlora analyze spectrum RUN`: what training did to the singular values and vectors of a base's weights.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.analysis.spectrum`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.analysis.spectrum.request import EXACT_UP_TO, REPORT_NAME, RESULT_NAME, THRESHOLDS, TOP, SpectrumRequest
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import UserError, require
from distlora.post.trained import BASE_ALONE
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.named import ARGUMENTS, add_arguments, named
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER = "distlora.analysis.spectrum.worker:main"

USAGE = f"""usage: distlora analyze spectrum RUN [--against RUN] [--top K] [--threshold 0.5,...] [--out FOLDER]
                         [--checkpoint NAME] [--adapter PATH] [--model BASE] [--exact-up-to N]

What an adapter, or full fine-tuning, did to the weights of a base: singular values of dW, its effective rank, how much
of it is in each layer and linear, and intruder dimensions (arXiv 2410.21228): singular vectors among the first K of
W + dW that are like none of W's. Tables on the terminal; a report, a plot and JSON in FOLDER. Weights are read one at
a time and never held together. With N the smaller side of the largest and T the other, memory is two fp32 copies of
it and N^2 x 8 x 4 bytes (512 MiB at 4096), or N (T + N) x 8 bytes where that is more; a dense dW, of full fine-tuning
and of DoRA, takes as much again.

{ARGUMENTS}
  --against RUN        a second run of the same base, as one of full fine-tuning (adapter=full): the same of it, and the
                       angles between what the two changed
  --top K              singular vectors of W + dW that are looked at ({TOP})
  --threshold T,...    cosines below which such a vector is an intruder ({",".join(f"{t:g}" for t in THRESHOLDS)})
  --exact-up-to N      decompose matrices whole whose smaller side is at most N ({EXACT_UP_TO}); of larger ones the
                       first K vectors by a Krylov space, and bounds of each cosine: some counts may stay undecided
  --out FOLDER         where the results go (analysis/RUN-spectrum); must not hold an earlier one"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    request = checked(parse(arguments))
    what = request.first_name + (f" against {request.against_name}" if request.against else "")
    print(f"analysing {what} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises UserError for an unknown flag, with the nearest, and for values that are not numbers.
    """
    parser = Parser("distlora analyze spectrum", help="distlora analyze spectrum --help")
    add_arguments(parser)
    parser.add_argument("--against")
    parser.add_argument("--top", type=int, default=TOP)
    parser.add_argument("--threshold")
    parser.add_argument("--exact-up-to", type=int, default=EXACT_UP_TO)
    parser.add_argument("--out")
    return parser.parse_args(arguments)


def checked(options: argparse.Namespace) -> SpectrumRequest:
    """Return the request, with its base on this machine and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    require(
        options.adapter != BASE_ALONE,
        f"--adapter={BASE_ALONE} changed nothing, so there is no dW; leave it out, or name an adapter",
    )
    name, trained = named(options)
    other = None
    if options.against is not None:
        also = argparse.Namespace(run=options.against, checkpoint=None, adapter=None, model=None, quant=None)
        other, second = named(also)
        bases = [each.base for each in (trained, second)]
        require(
            bases[0] == bases[1] or CheckpointFiles(bases[0]).fingerprint == CheckpointFiles(bases[1]).fingerprint,
            f"--against={options.against} was trained on {shown(bases[1])} and {options.run} on {shown(bases[0])}, "
            "whose weights differ; name a run of the same base",
        )
    out = Path(options.out or f"analysis/{Path(name.place).name}-spectrum").expanduser().absolute()
    if any((out / result).exists() for result in (REPORT_NAME, RESULT_NAME)):
        raise UserError(f"{shown(out)} holds an earlier analysis; remove it, or name another folder with --out")
    check_writable(out, "--out")
    request = SpectrumRequest(
        first=name,
        first_name=Path(name.place).name,
        against=other,
        against_name=None if other is None else Path(other.place).name,
        out=str(out),
        top=options.top,
        thresholds=THRESHOLDS if options.threshold is None else cosines(options.threshold),
        exact_up_to=options.exact_up_to,
    )
    out.mkdir(parents=True, exist_ok=True)
    return request


def cosines(text: str) -> tuple[float, ...]:
    """`0.5,0.7`, each once and rising."""
    try:
        return tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        raise UserError(f"--threshold={text} are no numbers; write --threshold 0.5,0.7") from None
