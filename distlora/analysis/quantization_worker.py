"""The worker of `distlora analyze quantization`: weights, then perplexity, then the files and the tables."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distlora.analysis import layer_of, linear_of
from distlora.analysis.quantization import HARM_ROWS, QuantizationRequest, record
from distlora.analysis.roundtrip import (
    DENSE,
    MEASURED,
    Sensitivity,
    StoredWeight,
    Sums,
    block_weights,
    find_weights,
    measure_references,
    measure_sensitivity,
    restored,
)
from distlora.config import TrainConfig
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Ranks, join_ranks
from distlora.post.divergence import Loss, Readings, compare, evenly
from distlora.post.load_trained import made_on
from distlora.system.progress import ProgressLines
from distlora.training.setup import StartOptions, start_model
from distlora.weights.reader import Reader


def run(request: QuantizationRequest) -> None:
    """Analyze all that the request asks for, tables to stdout and progress to stderr."""
    ranks = join_ranks()
    say = ProgressLines()
    # The text first: what is wrong with it is said before minutes are spent on the weights.
    rows = None if request.text is None else read_rows(request)
    weights, total = find_weights(request.spec("nf4"))
    say.line(f"weights: {len(weights):,} tensors, {sum(weight.numel for weight in weights):,} of {total:,} parameters")
    figures: dict[str, Any] = describe(request, ranks)
    model, sensitivities, held_out = None, {}, rows
    if rows is not None:
        quant: Literal["nf4", "none"] = "nf4" if request.no_perplexity else "none"
        say(f"loading the base in {quant if request.no_perplexity else request.dtype}")
        train = TrainConfig(dtype=request.dtype, fused_kernels="none")  # Hooks on linears need them called.
        model, _, _ = start_model(
            request.spec(quant), ranks, StartOptions(training=False), train=train, shard_degree=ranks.world
        )
        if request.formats:
            # Every second sequence is for the harm, the others are held out.
            halves = [rows.take(np.arange(first, len(rows), 2)) for first in (0, 1)]
            measured_on, held_out = evenly(halves[0], request.harm_rows or HARM_ROWS), halves[1]
            figures["harm_rows"] = len(measured_on)
            sensitivities = measure_sensitivity(model, measured_on, ranks, say)
    figures |= _of_weights(measured(request, weights, sensitivities, ranks, say), total)
    figures["references"] = {name: _of_sums(sums) for name, sums in measure_references().items()}
    figures["perplexity"] = None
    if rows is not None and held_out is not None and model is not None and not request.no_perplexity:
        chosen = evenly(held_out, request.rows)
        losses = measure_losses(request, model, chosen, weights, ranks, say)
        figures["perplexity"] = {
            "text": request.text_name,
            "rows": len(chosen),
            "rows_in_all": len(rows),
            "sequence_length": request.sequence_length,
            "targets": int(chosen.targets.sum()),
            "formats": _of_losses(losses),
        }
    record(figures).write(Path(request.out), "quantization")


def read_rows(request: QuantizationRequest) -> PackedRows:
    """Return the text in rows, tokenized as training data is."""
    train = TrainConfig(dtype=request.dtype)
    return PackedRows.open(prepare(request.spec("nf4").model, request.data(), train), "train")


def measured(
    request: QuantizationRequest,
    weights: list[StoredWeight],
    sensitivities: Mapping[str, Sensitivity],
    ranks: Ranks,
    say: ProgressLines,
) -> Iterator[tuple[StoredWeight, Sums]]:
    """Each weight with what the formats do to it."""
    formats = request.formats or MEASURED
    with Reader() as reader:
        for number, weight in enumerate(weights, start=1):
            yield weight, weight.measure(reader, ranks.device, formats, sensitivities.get(weight.name))
            say(f"weights: {number:,}/{len(weights):,} tensors, {weight.name}")


def describe(request: QuantizationRequest, ranks: Ranks) -> dict[str, Any]:
    """Return the environment of the figures."""
    return made_on(ranks.device, "torch", "transformers") | {
        "model_name": request.model_name,
        "command": f"distlora analyze quantization {request.model_name}",
        "dtype": request.dtype,
        "formats": list(request.formats or MEASURED),
    }


def _of_weights(measured: Iterable[tuple[StoredWeight, Sums]], total_parameters: int) -> dict[str, Any]:
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
                **({} if format.harm is None else {"harm": format.harm}),
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


def measure_losses(
    request: QuantizationRequest,
    model: CausalLM,
    rows: PackedRows,
    weights: list[StoredWeight],
    ranks: Ranks,
    say: ProgressLines,
) -> dict[str, Loss]:
    """Return the loss of a dense model, and of each format, whose restored weights take the place of its own."""
    dense = Readings(rows, ranks, say)
    dense.take(model, request.dtype)
    modules = dict(block_weights(model))
    by_format: dict[str, Readings] = {request.dtype: dense}
    for format in request.formats or (name for name in MEASURED if name != DENSE):
        if format != request.dtype:
            with Reader() as reader:
                for weight in weights:
                    put_through(weight, format, modules[weight.name].weight, reader)
            by_format[format] = Readings(rows, ranks, say, dense)
            by_format[format].take(model, format)
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    return {
        name: compare(readings.losses, dense.losses, readings.divergences, targets)
        for name, readings in by_format.items()
    }


@torch.no_grad()
def put_through(weight: StoredWeight, format: str, into: Tensor, reader: Reader) -> None:
    """Fill `into` (the weight's shape, fp32 or bf16) with what a format gives back of the weight on disk."""
    flat = into.view(-1)
    chunks = functools.partial(weight.chunks, reader, into.device)
    for start, _, values in restored(chunks, weight.shape, (format,)):
        back, _ = values[format]
        flat[start : start + len(back)] = back
