"""`distlora merge RUN`: a base and what was trained on it as one model, in Hugging Face format."""

import dataclasses

from distlora.config import UserError, require
from distlora.post.evaluate import NAMES as evaluation_names
from distlora.post.evaluate import EvaluateRequest, Merged, Subject
from distlora.post.merge import SHIPPED, MergeRequest, check_mergeable, check_shipped, default_dtype
from distlora.post.trained import Trained
from distlora.system.exit_codes import DONE
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.evaluate import base_of, text_of
from distlora_launcher.cli.named import default_place, named, new_place, num_weights
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.workers import become, check_processes, run_alone, run_several
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import shown, warn

WORKER, MEASURER = "distlora.post.merge_worker:run", "distlora.post.evaluate_worker:main"
NAMES = evaluation_names | {"model.path": "--model"}
SPARE_BYTES = 2**30
"""Beside a model's weights: torch, hidden states, logits."""
HOST_OPERATIONS = 3e13
"""Operations of a CPU with 50 GFLOP/s in ten minutes."""
MOST_ROWS = 128


def main(arguments: list[str]) -> int:
    """Check the arguments, then merge, then become the process that measures."""
    options = read(MergeRequest, "distlora merge", arguments)
    name, trained = named(options)
    check_mergeable(trained, options.onto)
    dtype = options.dtype or default_dtype(trained)
    if dtype == SHIPPED:
        check_shipped(trained, options.onto)
    out = new_place(options.out, default_place(trained, options, "merged"))
    request = dataclasses.replace(options, name=name, out=str(out), dtype=dtype)
    measured = to_measure(request, trained)
    warn(f"merging into {shown(out)} (importing torch takes a few seconds)")
    if measured is None:
        become(WORKER, request)
    code = run_alone(WORKER, request)
    if code != DONE:
        return code
    assert measured.source is not None
    warn(f"measuring on {measured.source.name}")
    if options.processes > 1:
        return run_several(MEASURER, measured, options.processes)
    become(MEASURER, measured)


def to_measure(options: MergeRequest, trained: Trained) -> EvaluateRequest | None:
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
        adapted = Subject(label="as trained", kind="adapted", name=options.name)
        base = base_of(trained, adapted)
        rows = rows_in_time(trained) if options.rows is None else options.rows
        text = text_of(options.text, adapted, [trained], rows=rows)
    except UserError as error:
        if requested:
            raise
        warn(f"not measured: {error}")
        return None
    merged = Subject(label=f"merged ({options.dtype})", kind="merged", model=options.out)
    receipt = Merged(folder=options.out, name=options.name, compares=options.compare)
    # In fp32, so that what differs is the weights and no rounding of what is computed with them.
    return EvaluateRequest(places=[], subjects=(adapted, merged, base), source=text, dtype="fp32", merged=receipt)


def rows_in_time(trained: Trained) -> int:
    """Return the rows to measure where none are named, for two models of 2 operations per weight and token."""
    if gpu_count() > 0:
        return MOST_ROWS
    operations_per_row = (
        2 * 2 * num_weights(trained) * max(0 if trained.data is None else trained.data.sequence_length, 256)
    )
    return max(1, min(MOST_ROWS, int(HOST_OPERATIONS / operations_per_row)))
