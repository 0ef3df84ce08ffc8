"""quantization.json: every figure of one analysis as plain values, which the report and the plot are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distlora.analysis.quantization.perplexity import Loss
from distlora.analysis.quantization.roundtrip import Sums
from distlora.analysis.quantization.weights import Weight


def of_weights(measured: Iterable[tuple[Weight, Sums]], total_parameters: int) -> dict[str, Any]:
    """{"overall", "layers": {number: ...}, "linears": {path: ...}, "tensors": [...], "model"}."""
    overall = Sums()
    layers: dict[int, Sums] = {}
    linears: dict[str, Sums] = {}
    tensors: list[dict[str, Any]] = []
    for weight, sums in measured:
        tensors.append(
            {"name": weight.name, "layer": weight.layer, "linear": weight.linear, "shape": list(weight.shape)}
            | of_sums(sums)
        )
        overall.add(sums)
        layers.setdefault(weight.layer, Sums()).add(sums)
        linears.setdefault(weight.linear, Sums()).add(sums)
    rest = total_parameters - overall.numel
    model_bytes = {name: format.num_bytes + 2 * rest for name, format in overall.formats.items()}
    return {
        "overall": of_sums(overall),
        "layers": {str(number): of_sums(layers[number]) for number in sorted(layers)},
        "linears": {name: of_sums(sums) for name, sums in linears.items()},
        "tensors": tensors,
        # Embeddings, norms and head stay in 16 bits.
        "model": {"parameters": total_parameters, "bytes": model_bytes},
    }


def of_sums(sums: Sums) -> dict[str, Any]:
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


def of_losses(losses: Mapping[str, Loss]) -> dict[str, Any]:
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
