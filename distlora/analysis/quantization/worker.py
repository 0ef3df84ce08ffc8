"""The worker of `distlora analyze quantization`: weights, then perplexity, then the files and the tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from distlora.analysis.quantization import figures, report
from distlora.analysis.quantization.perplexity import measure_formats
from distlora.analysis.quantization.plots import plot_quantization
from distlora.analysis.quantization.request import NAMES, PLOT_NAME, REPORT_NAME, RESULT_NAME, QuantizationRequest
from distlora.analysis.quantization.roundtrip import Sums, measure_references
from distlora.analysis.quantization.weights import Weight, find_weights
from distlora.config import TrainConfig
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.output.result_files import Written
from distlora.parallel import Ranks, join_ranks
from distlora.post.divergence import evenly
from distlora.post.workers import made_on
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress
from distlora.weights.reader import Reader

WRITTEN = Written(RESULT_NAME, REPORT_NAME, PLOT_NAME, report, plot_quantization)


def run(request: QuantizationRequest) -> None:
    """Everything that the request asks for; tables on stdout, progress on stderr."""
    ranks = join_ranks()
    say = Progress()
    # The text first: what is wrong with it is said before minutes are spent on the weights.
    rows = None if request.text is None else read_rows(request)
    weights, total = find_weights(request.spec("nf4"))
    say.line(f"weights: {len(weights):,} tensors, {sum(weight.numel for weight in weights):,} of {total:,} parameters")
    found: dict[str, Any] = describe(request, ranks)
    found |= figures.of_weights(measured(weights, ranks, say), total)
    found["references"] = {name: figures.of_sums(sums) for name, sums in measure_references().items()}
    found["perplexity"] = None
    if rows is not None:
        chosen = evenly(rows, request.rows)
        losses = measure_formats(request, chosen, weights, ranks, say)
        found["perplexity"] = {
            "text": request.text_name,
            "rows": len(chosen),
            "rows_in_all": len(rows),
            "sequence_length": request.sequence_length,
            "targets": int(chosen.targets.sum()),
            "formats": figures.of_losses(losses),
        }
    WRITTEN.write(Path(request.out), found)


def read_rows(request: QuantizationRequest) -> PackedRows:
    """Return the text in rows, tokenized as training data is."""
    train = TrainConfig(dtype=request.dtype)
    return PackedRows.open(prepare(request.spec("nf4").model, request.data(), train), "train")


def measured(weights: list[Weight], ranks: Ranks, say: Progress) -> Iterator[tuple[Weight, Sums]]:
    """Each weight with what the formats do to it."""
    with Reader() as reader:
        for number, weight in enumerate(weights, start=1):
            yield weight, weight.measure(reader, ranks.device)
            say(f"weights: {number:,}/{len(weights):,} tensors, {weight.name}")


def describe(request: QuantizationRequest, ranks: Ranks) -> dict[str, Any]:
    """Return the environment of the figures."""
    return made_on(ranks.device, "torch", "transformers") | {
        "model_name": request.model_name,
        "command": f"distlora analyze quantization {request.model_name}",
        "dtype": request.dtype,
    }


def main(request: QuantizationRequest) -> int:
    """Analyze; return the exit code."""
    transformers_logging.set_verbosity_error()

    def work() -> int:
        run(request)
        return DONE

    return run_to_exit_code(work, names=NAMES)
