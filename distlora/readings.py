"""What models make of the same rows of text: each one's loss, and how far what it predicts is from the first one's.

A difference of losses on a text says little where it is small: what a change does pushes the loss up or down at first
order, one way for a whole model, and the rows' own noise does not show that. The divergence of the predictions has no
first order: it can only grow with what was changed.

N rows; what is summed of a row is over its target tokens. H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.attention import Documents
from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.head import IGNORED_LABEL, LOGITS_PER_CHUNK
from distlora.model import CausalLM
from distlora.parallel import Ranks

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
