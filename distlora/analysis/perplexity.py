"""One base in several formats on the same rows: its loss, and how far what it predicts is from the dense base's.

A difference of losses on a text says little of a format where it is small: rounding pushes the loss up or down at first
order, one way for a whole model, and the rows' own noise does not show that. The divergence of the predictions has no
first order: it can only grow with what quantization changes.

N rows; what is summed of a row is over its target tokens. H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.analysis.request import Request
from distlora.analysis.roundtrip import FORMATS, FourBit, SecondLevel, round_trip
from distlora.analysis.weights import Weight, block_weights
from distlora.attention import Documents
from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.head import IGNORED_LABEL, LOGITS_PER_CHUNK
from distlora.loading.reader import Reader
from distlora.model import CausalLM
from distlora.parallel import Ranks
from distlora.startup import start_model
from distlora_kernels.nf4 import GROUP

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Loss:
    """What one format's model makes of the text, and how it differs from the dense one's on the same rows."""

    loss: float
    """Mean -log p over every target token, nats."""
    difference: float
    """loss - the dense model's."""
    standard_error: float | None
    """Of `difference`, rows taken as the sample; None for a single row. 0 for the dense model itself."""
    divergence: float
    """Mean KL(dense model's prediction || this one's) at a target token, nats."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evenly(rows: PackedRows, most: int) -> PackedRows:
    """All rows, or `most` of them at even distances."""
    if len(rows) <= most:
        return rows
    return rows.take(np.arange(most) * len(rows) // most)


def measure_formats(
    request: Request, rows: PackedRows, weights: list[Weight], ranks: Ranks, say: Callable[[str], None]
) -> dict[str, Loss]:
    """The loss of every format by its name: `request.dtype`, then the 4-bit ones.

    Of the two models, dense and packed, one is in memory at a time.
    """
    dense, int4 = _of_dense_model(request, rows, weights, ranks, say)
    # A model is in cycles (its modules know each other), so the last name that goes frees nothing yet.
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    found = {request.dtype: dense, "nf4": _of_packed_model(request, dense, say), "int4": int4}
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    return {
        name: compare(readings.losses, dense.losses, readings.divergences, targets) for name, readings in found.items()
    }


def _of_dense_model(
    request: Request, rows: PackedRows, weights: list[Weight], ranks: Ranks, say: Callable[[str], None]
) -> tuple[Readings, Readings]:
    """(the base's, int4's). int4 has no packed path: a dense model holds what int4 gives back."""
    say(f"perplexity: loading the base in {request.dtype}")
    model, _, _ = start_model(request.config("none"), ranks)
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


def _of_packed_model(request: Request, dense: Readings, say: Callable[[str], None]) -> Readings:
    """NF4's, which runs as in training."""
    say("perplexity: loading the base in nf4")
    model, _, _ = start_model(request.config("nf4"), dense.ranks)
    nf4 = Readings(dense.rows, dense.ranks, say, dense)
    nf4.take(model, "nf4")
    return nf4


@torch.no_grad()
def put_through(weight: Weight, format: FourBit, into: Tensor, reader: Reader) -> None:
    """Fill `into` (the weight's shape, fp32 or bf16) with what `format` gives back of the weight on disk."""
    second = SecondLevel.of(weight.chunks(reader, into.device), weight.numel)
    flat, first = into.view(-1), 0
    for chunk in weight.chunks(reader, into.device):
        restored, _ = round_trip(chunk, format, second, first // GROUP, into.dtype)
        flat[first : first + chunk.numel()] = restored
        first += chunk.numel()


class Readings:
    """What one model makes of the rows.

    The dense model's hidden states are kept on the host (targets x H in its dtype, 2 GiB for 128 rows of 1,024 at 70B's
    8,192), since logits of the whole text would be V / H times as much; the head is the same in every format.
    """

    def __init__(
        self, rows: PackedRows, ranks: Ranks, say: Callable[[str], None], dense: Readings | None = None
    ) -> None:
        self.rows, self.ranks, self.say, self.dense = rows, ranks, say, dense
        self.losses = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): the sum of each row's -log p."""
        self.divergences = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): the sum of each row's KL(dense || this); 0 for the dense model."""
        self._hidden: list[Tensor] = []
        """(targets, H) of each batch; of the dense model."""

    @torch.no_grad()
    def take(self, model: CausalLM, name: str) -> None:
        """Run the model over the rows."""
        at_once = max(1, min(TOKENS_AT_ONCE // self.rows.sequence_length, len(self.rows)))
        loader = StepLoader(
            self.rows, global_batch=at_once, micro_batch=at_once, rank=0, world=1, seed=0, shuffle=False
        )
        for step in range(loader.steps_per_epoch):
            (batch,) = loader.batch(step).micro_batches
            self._take_batch(model, batch, step)
            self.say(f"perplexity: {name}, {min((step + 1) * at_once, len(self.rows)):,}/{len(self.rows):,} rows")

    def _take_batch(self, model: CausalLM, batch: MicroBatch, step: int) -> None:
        device = self.ranks.device
        documents = Documents.of(batch.position_ids).to(device) if model.attends_by_documents else None
        hidden = model.hidden_states(batch.input_ids.to(device), batch.position_ids.to(device), documents=documents)
        is_target = batch.labels != IGNORED_LABEL
        row_of = batch.rows[:, None].expand_as(batch.labels)[is_target]
        targets = batch.labels[is_target].to(device)
        at_targets = hidden[is_target.to(device)]
        theirs = None if self.dense is None else self.dense._hidden[step].to(device)
        if theirs is None:
            self._hidden.append(at_targets.cpu())
        size = max(16, LOGITS_PER_CHUNK // model.head.weight.shape[0])
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            log_q = model.head.logits(at_targets[part]).log_softmax(-1)
            losses = -log_q.gather(1, targets[part, None]).squeeze(1)
            self.losses.index_add_(0, row_of[part], losses.double().cpu())
            if theirs is not None:
                log_p = model.head.logits(theirs[part]).log_softmax(-1)
                divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
                self.divergences.index_add_(0, row_of[part], divergences.double().cpu())


def compare(sums: Tensor, dense: Tensor, divergences: Tensor, targets: Tensor) -> Loss:
    """Row sums of one format against the dense model's, (N,) each: a ratio of sums, its error by the delta method.

    The rows are paired, so what makes a text hard for both is no noise.
    """
    total, count = float(targets.sum()), len(targets)
    difference = float((sums - dense).sum()) / total
    error = None
    if count > 1:
        residual = (sums - dense) - difference * targets
        error = math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total
    return Loss(float(sums.sum()) / total, difference, error, float(divergences.sum()) / total)
