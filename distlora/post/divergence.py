"""What models make of the same rows of text: each one's loss, and how far what it predicts is from the first one's.

A difference of losses on a text says little where it is small: what a change does pushes the loss up or down at first
order, one way for a whole model, and the rows' own noise does not show that. The divergence of the predictions has no
first order: it can only grow with what was changed.

N rows; what is summed of a row is over its target tokens. B rows of T tokens at once. H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.model.head import IGNORED_LABEL, LossHead
from distlora.parallel import Ranks, sum_over_ranks

TOKENS_AT_ONCE = 4096
"""Of each rank."""
LOGITS_AT_ONCE = 2**22
"""In fp64, a handful of times: where two models are nearly one, a divergence in fp32 is the noise of its sum."""


LARGEST_EXPONENT = 709
"""e^709 is the last power that a float holds."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What one model makes of the text, and how it differs from the first, the dense one, on the same rows."""

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
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf


def evenly(rows: PackedRows, most: int) -> PackedRows:
    """All rows, or `most` of them at even distances."""
    if len(rows) <= most:
        return rows
    return rows.take(np.arange(most) * len(rows) // most)


class Readings:
    """What one model makes of the rows.

    What the others are compared with, the dense model, keeps the hidden states of its targets on the host (targets x H
    in its dtype, 2 GiB for 128 rows of 1,024 at 70B's 8,192) and its head, since logits of the whole text would be
    V / H times as much. Several ranks take the rows between them.
    """

    def __init__(
        self, rows: PackedRows, ranks: Ranks, say: Callable[[str], None], dense: Readings | None = None
    ) -> None:
        self.rows, self.ranks, self.say, self.dense = rows, ranks, say, dense
        self.losses = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): the sum of each row's -log p."""
        self.divergences = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): the sum of each row's KL(dense || this); 0 for the dense model."""
        self.largest = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): the largest |difference| between a logit of the dense model and this one's."""
        self.changed = torch.zeros(len(rows), dtype=torch.float64)
        """(N,): of how many targets the likeliest token is another than the dense model's."""
        self._hidden: list[Tensor] = []
        """(targets, H) of each batch of this rank; of the dense model."""
        self._head: LossHead | None = None
        """Of the dense model."""

    @torch.no_grad()
    def take(self, model: CausalLM, name: str) -> None:
        """Run the model over the rows. Every rank must call it alike."""
        at_once = max(1, min(TOKENS_AT_ONCE // self.rows.sequence_length, len(self.rows)))
        rank, world = self.ranks.rank, self.ranks.world
        loader = StepLoader(
            self.rows,
            global_batch=at_once * world,
            micro_batch=at_once,
            rank=rank,
            world=world,
            seed=0,
            shuffle=False,
        )
        for step in range(loader.steps_per_epoch):
            (batch,) = loader.batch(step).micro_batches
            self._take_batch(model, batch, step)
            done = min((step + 1) * loader.global_batch, len(self.rows))
            self.say(f"perplexity: {name}, {done:,}/{len(self.rows):,} rows")
        for sums in (self.losses, self.divergences, self.largest, self.changed):
            sum_over_ranks(sums, self.ranks)  # Each row is one rank's, and 0 on the others.

    def _take_batch(self, model: CausalLM, batch: MicroBatch, step: int) -> None:
        device = self.ranks.device
        documents = Documents.of(batch.position_ids).to(device) if model.attends_by_documents else None
        with model.head.read_by(lambda hidden: self._read(model.head, hidden, batch, step)):
            model(
                batch.input_ids.to(device),
                batch.position_ids.to(device),
                batch.labels.to(device),
                documents=documents,
            )

    def _read(self, head: LossHead, hidden: Tensor, batch: MicroBatch, step: int) -> None:
        """What the model makes of one batch, whose last hidden states (B, T, H) these are."""
        is_target = batch.labels != IGNORED_LABEL
        row_of = batch.rows[:, None].expand_as(batch.labels)[is_target]
        targets = batch.labels[is_target].to(hidden.device)
        at_targets = hidden[is_target.to(hidden.device)]
        theirs = their_head = None
        if self.dense is None:
            self._hidden.append(at_targets.cpu())
            self._head = self._head or head.copied()
        else:
            theirs, their_head = self.dense._hidden[step].to(hidden.device), self.dense._head
        size = max(16, LOGITS_AT_ONCE // head.weight.shape[0])
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            own, of_row = head.logits(at_targets[part]), row_of[part]
            log_q = own.double().log_softmax(-1)
            _add(self.losses, of_row, -log_q.gather(1, targets[part, None]).squeeze(1))
            if theirs is not None and their_head is not None:
                logits = their_head.logits(theirs[part])
                # Vocabularies of which one has grown are compared where both have a token.
                shared = min(logits.shape[1], own.shape[1])
                logits, own = logits[:, :shared], own[:, :shared]
                log_p = logits.double().log_softmax(-1)
                log_q = log_q if log_q.shape[1] == shared else own.double().log_softmax(-1)
                _add(self.divergences, of_row, (log_p.exp() * (log_p - log_q)).sum(-1))
                _add(self.changed, of_row, logits.argmax(-1) != own.argmax(-1))
                furthest = (logits - own).abs().amax(-1).double().cpu()
                self.largest.scatter_reduce_(0, of_row, furthest, "amax")


def _add(sums: Tensor, row_of: Tensor, values: Tensor) -> None:
    """Values of targets (n,) to the sums (N,) of their rows, `row_of` (n,)."""
    sums.index_add_(0, row_of, values.double().cpu())


def let_go(device: torch.device) -> None:
    """After the last name of a model is gone: a model is in cycles, as its modules know each other, so its memory is
    not free yet."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(sums: Tensor, dense: Tensor, divergences: Tensor, targets: Tensor) -> Loss:
    """Row sums of one model against the dense model's, (N,) each: a ratio of sums, its error by the delta method.

    The rows are paired, so what makes a text hard for both is no noise.
    """
    total, count = float(targets.sum()), len(targets)
    difference = float((sums - dense).sum()) / total
    error = None
    if count > 1:
        residual = (sums - dense) - difference * targets
        error = math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total
    return Loss(float(sums.sum()) / total, difference, error, float(divergences.sum()) / total)
