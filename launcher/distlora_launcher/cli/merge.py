"""`distlora merge RUN`: a base and what was trained on it as one model, in Hugging Face format."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.config import UserError, require
from distlora.post.evaluate.request import NAMES as evaluation_names
from distlora.post.evaluate.request import EvaluateRequest, Merged, Subject
from distlora.post.merge.request import SHIPPED, MergeRequest, check_mergeable, check_shipped, default_dtype
from distlora.post.trained import Name, Trained
from distlora.system.exit_codes import DONE
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.evaluate import base_of, text_of
from distlora_launcher.cli.named import Named, default_place, named, num_weights
from distlora_launcher.compose.checks import check_writable, gpu_count
from distlora_launcher.launch.workers import become, check_processes, run_alone, run_several
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import shown

WORKER, MEASURER = "distlora.post.merge.merge:main", "distlora.post.evaluate.worker:main"
NAMES = evaluation_names | {"model.path": "--model"}
SPARE_BYTES = 2**30
"""Beside a model's weights: torch, hidden states, logits."""
HOST_OPERATIONS = 3e13
"""Operations of a CPU with 50 GFLOP/s in ten minutes."""
MOST_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeArguments(Named):
    """Merge a base and the adapter trained on it into one model in Hugging Face format, on the CPU.

    An unfinished run is merged from its newest checkpoint. merge.json lists the sources, SHA-256 hashes, and per tensor
    how much of the adapter's change survived rounding. Then the merged model is compared with the model as trained:
    loss, KL divergence and the largest logit difference are added to merge.json and merge.md.

    example: distlora merge runs/first --dtype bf16
    """

    out: str | None = None
    """FOLDER: new folder for the model (default: RUN/merged, RUN/merged-CHECKPOINT or ADAPTER-merged)."""
    onto: Literal["trained", "original"] = "trained"
    """Base to merge into: trained is the dequantized base that training computed with; original is the base on disk,
    whose outputs differ by the NF4 error."""
    dtype: Literal["fp32", "bf16", "fp16", "shipped"] | None = None
    """Dtype of the weights: fp32 is exact; bf16 and fp16 round; shipped quantizes what the adapter changes to the low
    bits that the base is shipped in, and copies the rest (default: fp32; bf16 for a base that is shipped in low
    bits)."""
    text: str | None = None
    """FILE: text to measure on, in any format of data.path (default: the run's held-out data)."""
    rows: int | None = None
    """N: maximum number of sequences to measure, evenly spaced (default: 128; without a GPU as many as take ten
    minutes)."""
    compare: bool = False
    """Measure the other options too: bf16, fp16, NF4 again, and --onto original."""
    processes: int = 1
    """N: shard each measured model over N processes, one per GPU."""
    no_measure: bool = False
    """Only write the folder; needs no memory for a whole model."""


def main(arguments: list[str]) -> int:
    """Check the arguments, then merge, then become the process that measures."""
    options = read(MergeArguments, "distlora merge", arguments)
    name, trained = named(options)
    check_mergeable(trained, options.onto)
    dtype = options.dtype or default_dtype(trained)
    if dtype == SHIPPED:
        check_shipped(trained, options.onto)
    out = (
        default_place(trained, options, "merged") if options.out is None else Path(options.out).expanduser().absolute()
    )
    require(not out.exists(), f"--out={shown(out)} exists already; name another folder, or remove it")
    check_writable(out, "--out")
    measured = to_measure(dataclasses.replace(options, dtype=dtype), name, trained, out)
    request = MergeRequest(name=name, out=str(out), onto=options.onto, dtype=dtype)
    print(f"merging into {shown(out)} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    if measured is None:
        become(WORKER, request)
    code = run_alone(WORKER, request)
    if code != DONE:
        return code
    assert measured.text is not None
    print(f"measuring on {measured.text.name}", file=sys.stderr, flush=True)
    if options.processes > 1:
        return run_several(MEASURER, measured, options.processes)
    become(MEASURER, measured)


def to_measure(options: MergeArguments, name: Name, trained: Trained, out: Path) -> EvaluateRequest | None:
    """Return the measurement; None with --no-measure, and after printing why it is not possible.

    Raises UserError for a measurement that was requested and is not possible.
    """
    given = {"text": options.text is not None, "rows": options.rows is not None, "compare": options.compare}
    requested = [f"--{name}" for name, is_given in given.items() if is_given]
    if options.no_measure:
        requested += ["--processes"] if options.processes != 1 else []
        require(not requested, f"{' '.join(requested)} has no effect with --no-measure; leave one of them out")
        return None
    check_processes(options.processes)
    try:
        needed, available = 4 * num_weights(trained) + SPARE_BYTES, available_bytes()
        require(  # With a GPU the worker checks its memory.
            gpu_count() > 0 or available is None or needed <= available,
            f"measuring takes {needed / 2**30:,.1f} GiB of host memory for the model in fp32, and "
            f"{(available or 0) / 2**30:,.1f} GiB are available; add --no-measure, and measure on another node with "
            "`distlora eval RUN MERGED`",
        )
        adapted = Subject(label="as trained", kind="adapted", name=name)
        base = base_of(trained, adapted)
        rows = rows_in_time(trained) if options.rows is None else options.rows
        text = text_of(options.text, adapted, [trained], rows=rows)
    except UserError as error:
        if requested:
            raise
        print(f"not measured: {error}", file=sys.stderr, flush=True)
        return None
    merged = Subject(label=f"merged ({options.dtype or default_dtype(trained)})", kind="merged", model=str(out))
    receipt = Merged(folder=str(out), name=name, compares=options.compare)
    # In fp32, so that what differs is the weights and no rounding of what is computed with them.
    return EvaluateRequest(subjects=(adapted, merged, base), text=text, dtype="fp32", merged=receipt)


def rows_in_time(trained: Trained) -> int:
    """Return the rows to measure where none are named, for two models of 2 operations per weight and token."""
    if gpu_count() > 0:
        return MOST_ROWS
    operations_per_row = (
        2 * 2 * num_weights(trained) * max(0 if trained.data is None else trained.data.sequence_length, 256)
    )
    return max(1, min(MOST_ROWS, int(HOST_OPERATIONS / operations_per_row)))
