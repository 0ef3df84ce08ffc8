"""The worker of `distlora analyze quantization`: weights, then perplexity, then the files and the tables."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from distlora.analysis.naming import layer_of, linear_of
from distlora.analysis.quantization import report
from distlora.analysis.quantization.request import NAMES, PLOT_NAME, REPORT_NAME, RESULT_NAME, QuantizationRequest
from distlora.analysis.quantization.roundtrip import (
    FORMATS,
    FourBit,
    Sums,
    Weight,
    block_weights,
    find_weights,
    measure_references,
    round_trip,
)
from distlora.config import TrainConfig
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.loading.quantize import DoubleQuantizedAbsmax
from distlora.output.results import Written
from distlora.parallel import Ranks, join_ranks
from distlora.post.divergence import Loss, Readings, compare, evenly, let_go
from distlora.post.load_trained import made_on
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress
from distlora.training.setup import start_model
from distlora.weights.reader import Reader
from distlora_kernels.formats.nf4 import GROUP

WRITTEN = Written(RESULT_NAME, REPORT_NAME, PLOT_NAME, report)


def run(request: QuantizationRequest) -> int:
    """Analyze all that the request asks for, tables to stdout and progress to stderr; return the exit code."""
    ranks = join_ranks()
    say = Progress()
    # The text first: what is wrong with it is said before minutes are spent on the weights.
    rows = None if request.text is None else read_rows(request)
    weights, total = find_weights(request.spec("nf4"))
    say.line(f"weights: {len(weights):,} tensors, {sum(weight.numel for weight in weights):,} of {total:,} parameters")
    found: dict[str, Any] = describe(request, ranks)
    found |= _of_weights(measured(weights, ranks, say), total)
    found["references"] = {name: _of_sums(sums) for name, sums in measure_references().items()}
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
            "formats": _of_losses(losses),
        }
    WRITTEN.write(Path(request.out), found)
    return DONE


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


def _of_weights(measured: Iterable[tuple[Weight, Sums]], total_parameters: int) -> dict[str, Any]:
    """{"overall", "layers": {number: ...}, "linears": {path: ...}, "tensors": [...], "model"}."""
    overall = Sums()
    layers: dict[int, Sums] = {}
    linears: dict[str, Sums] = {}
    tensors: list[dict[str, Any]] = []
    for weight, sums in measured:
        layer, linear = layer_of(weight.name), linear_of(weight.name)
        tensors.append(
            {"name": weight.name, "layer": layer, "linear": linear, "shape": list(weight.shape)} | _of_sums(sums)
        )
        overall.add(sums)
        layers.setdefault(layer, Sums()).add(sums)
        linears.setdefault(linear, Sums()).add(sums)
    rest = total_parameters - overall.numel
    model_bytes = {name: format.num_bytes + 2 * rest for name, format in overall.formats.items()}
    return {
        "overall": _of_sums(overall),
        "layers": {str(number): _of_sums(layers[number]) for number in sorted(layers)},
        "linears": {name: _of_sums(sums) for name, sums in linears.items()},
        "tensors": tensors,
        # Embeddings, norms and head stay in 16 bits.
        "model": {"parameters": total_parameters, "bytes": model_bytes},
    }


def _of_sums(sums: Sums) -> dict[str, Any]:
    """Return the figures of one tensor or of several together."""
    return {
        "weights": sums.numel,
        "std": sums.std,
        "excess_kurtosis": sums.excess_kurtosis,
        "formats": {
            name: {
                "relative_error": sums.relative_error(name),
                "snr_db": sums.snr_db(name),
                "largest_error": format.largest,
                "bytes": format.num_bytes,
                "bits": sums.bits(name),
            }
            for name, format in sums.formats.items()
        },
    }


def _of_losses(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """Return the loss of each format, and its perplexity in points over the dense model's."""
    dense = next(iter(losses.values())).perplexity
    return {
        name: {
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "divergence": loss.divergence,
            "loss_difference": loss.difference,
            "loss_standard_error": loss.standard_error,
            "points": loss.perplexity - dense,
            # d exp(loss) = exp(loss) d loss.
            "points_standard_error": (None if loss.standard_error is None else loss.perplexity * loss.standard_error),
        }
        for name, loss in losses.items()
    }


def measure_formats(
    request: QuantizationRequest, rows: PackedRows, weights: list[Weight], ranks: Ranks, say: Callable[[str], None]
) -> dict[str, Loss]:
    """Return the loss of every format by its name: `request.dtype`, then the 4-bit ones.

    Of the two models, dense and packed, one is in memory at a time.
    """
    dense, int4 = _of_dense_model(request, rows, weights, ranks, say)
    let_go(ranks.device)
    found = {request.dtype: dense, "nf4": _of_packed_model(request, dense, say), "int4": int4}
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    return {
        name: compare(readings.losses, dense.losses, readings.divergences, targets) for name, readings in found.items()
    }


def _of_dense_model(
    request: QuantizationRequest, rows: PackedRows, weights: list[Weight], ranks: Ranks, say: Callable[[str], None]
) -> tuple[Readings, Readings]:
    """Return (the base's readings, int4's). int4 has no packed path: a dense model holds the restored weights."""
    say(f"perplexity: loading the base in {request.dtype}")
    model, _, _ = start_model(
        request.spec("none"), ranks, train=TrainConfig(dtype=request.dtype), shard_degree=ranks.world
    )
    dense = Readings(rows, ranks, say)
    dense.take(model, request.dtype)
    by_name = {weight.name: weight for weight in weights}
    with Reader() as reader, torch.no_grad():
        for name, module in block_weights(model):
            if name in by_name:  # A router stays as it is.
                put_through(by_name[name], FORMATS["int4"], module.weight, reader)
    int4 = Readings(rows, ranks, say, dense)
    int4.take(model, "int4")
    return dense, int4


def _of_packed_model(request: QuantizationRequest, dense: Readings, say: Callable[[str], None]) -> Readings:
    """NF4's, which runs as in training."""
    say("perplexity: loading the base in nf4")
    model, _, _ = start_model(
        request.spec("nf4"), dense.ranks, train=TrainConfig(dtype=request.dtype), shard_degree=dense.ranks.world
    )
    nf4 = Readings(dense.rows, dense.ranks, say, dense)
    nf4.take(model, "nf4")
    return nf4


@torch.no_grad()
def put_through(weight: Weight, format: FourBit, into: Tensor, reader: Reader) -> None:
    """Fill `into` (the weight's shape, fp32 or bf16) with what `format` gives back of the weight on disk."""
    second = DoubleQuantizedAbsmax.of(weight.chunks(reader, into.device), weight.numel)
    flat, first = into.view(-1), 0
    for chunk in weight.chunks(reader, into.device):
        restored, _ = round_trip(chunk, format, second, first // GROUP, into.dtype)
        flat[first : first + chunk.numel()] = restored
        first += chunk.numel()


def main(request: QuantizationRequest) -> int:
    """Analyze; return the exit code."""
    transformers_logging.set_verbosity_error()
    return run_to_exit_code(lambda: run(request), names=NAMES)
