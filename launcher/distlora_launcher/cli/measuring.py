"""Choose what `distlora merge` measures of its result, before anything is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from distlora.config import UserError, require
from distlora.post.evaluate.request import EvaluateRequest, Merged, Subject
from distlora.post.trained import Name, Trained
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.evaluate import base_of, text_of
from distlora_launcher.cli.named import num_weights
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.workers import check_processes
from distlora_launcher.terminal.arguments import Parser

ARGUMENTS = """\
  --text FILE          what it is measured on: anything that data.path of `distlora train` takes; without it, what the
                       run held out
  --rows N             rows of that, at even distances where there are more (128; without a GPU as many as take some
                       ten minutes)
  --compare            measure the other forms too: bf16, fp16, NF4 again, the sum on the base on disk
  --processes N        share each measured model among N processes, one a GPU
  --no-measure         write the folder alone, without a model in memory"""
"""For the command's usage."""

SPARE_BYTES = 2**30
"""Beside a model's weights: torch, hidden states, logits."""
HOST_OPERATIONS = 3e13
"""Operations of a CPU with 50 GFLOP/s in ten minutes."""
MOST_ROWS = 128


def add_arguments(parser: Parser) -> None:
    """Add the options of the measurement to a parser."""
    parser.add_argument("--text")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--processes", type=int, default=1)
    for name in ("--compare", "--no-measure"):
        parser.add_argument(name, action="store_true")


def to_measure(
    options: argparse.Namespace, name: Name, trained: Trained, out: Path, dtype: str
) -> tuple[EvaluateRequest | None, str]:
    """Return (the measurement, or None; the reason if None).

    Raises UserError for a measurement that was requested and is not possible.
    """
    given = {"text": options.text is not None, "rows": options.rows is not None, "compare": options.compare}
    asked = next((flag for flag, is_given in given.items() if is_given), None)
    if options.no_measure:
        if asked is None and options.processes != 1:
            asked = "processes"
        value = "" if asked == "compare" else f"={getattr(options, asked or 'text')}"
        require(asked is None, f"--{asked}{value} says what is measured; leave it out, or --no-measure")
        return None, "--no-measure"
    check_processes(options.processes)
    try:
        require_memory(trained)
        adapted = Subject(label="as trained", kind="adapted", name=name)
        base = base_of(trained, adapted)
        rows = rows_in_time(trained) if options.rows is None else options.rows
        text = text_of(options.text, adapted, [trained], rows=rows)
    except UserError as error:
        if asked is not None:
            raise
        return None, str(error)
    merged = Subject(label=f"merged ({dtype})", kind="merged", model=str(out))
    receipt = Merged(folder=str(out), name=name, compares=options.compare)
    # In fp32, so that what differs is the weights and no rounding of what is computed with them.
    return EvaluateRequest(subjects=(adapted, merged, base), text=text, dtype="fp32", merged=receipt), ""


def require_memory(trained: Trained) -> None:
    """Raise UserError if host memory cannot hold the whole model in fp32.

    With a GPU the worker checks its memory.
    """
    needed, available = 4 * num_weights(trained) + SPARE_BYTES, available_bytes()
    require(
        gpu_count() > 0 or available is None or needed <= available,
        f"measuring takes {needed / 2**30:,.1f} GiB of host memory for the model in fp32, and "
        f"{(available or 0) / 2**30:,.1f} GiB are left; write --no-measure, and measure elsewhere with "
        "`distlora eval RUN MERGED`",
    )


def rows_in_time(trained: Trained) -> int:
    """Rows that a receipt is measured on where nobody says how many: of two models, 2 operations a weight and token."""
    if gpu_count() > 0:
        return MOST_ROWS
    of_row = 2 * 2 * num_weights(trained) * max(0 if trained.data is None else trained.data.sequence_length, 256)
    return max(1, min(MOST_ROWS, int(HOST_OPERATIONS / of_row)))
