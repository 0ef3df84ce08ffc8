"""One base in several formats on the same rows (distlora/post/divergence.py): the dense one, NF4 and int4."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distlora.analysis.quantization.request import QuantizationRequest
from distlora.analysis.quantization.roundtrip import FORMATS, FourBit, round_trip
from distlora.analysis.quantization.weights import Weight, block_weights
from distlora.config import TrainConfig
from distlora.data.rows import PackedRows
from distlora.loading.quantize import DoubleQuantizedAbsmax
from distlora.parallel import Ranks
from distlora.post.divergence import Loss, Readings, compare, let_go
from distlora.training.setup import start_model
from distlora.weights.reader import Reader
from distlora_kernels.nf4 import GROUP


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
