"""Compare models on the same sequences of text: their losses, and the KL divergence of their predictions.

A small change shifts the loss up or down at first order, the same way for the whole model, so a small difference of
losses says little. The divergence has no first-order term: it only grows with the change.

N sequences (rows), B rows of T tokens per batch, H hidden size, V vocabulary. Sums per row run over its target tokens.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.data.images import ImageTensors
from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.model.build import CausalLM
from distlora.model.images import Images
from distlora.model.lm_head import IGNORED_LABEL, LossHead
from distlora.parallel import Ranks, sum_over_ranks

TOKENS_AT_ONCE = 4096
"""Tokens per forward and rank."""
LOGITS_AT_ONCE = 2**22
"""Logits per fp64 computation. In fp32, the divergence of two nearly equal models is rounding noise."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one model and its difference from the first, dense model on the same rows."""

    loss: float
    """Mean -log p per target token, in nats."""
    difference: float
    """The loss minus the dense model's, in nats per token."""
    standard_error: float | None
    """Standard error of `difference` over rows; None for one row, 0 for the dense model."""
    divergence: float
    """Mean KL(dense model || this model) per target token, in nats."""

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinity beyond fp64."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evenly(rows: PackedRows, most: int) -> PackedRows:
    """Return all rows, or `most` of them at even distances."""
    if len(rows) <= most:
        return rows
    return rows.take(np.arange(most) * len(rows) // most)


class Readings:
    """The losses and divergences of one model on the rows.

    The dense model, which the others are compared with, keeps the hidden states of its targets on the host (targets x H
    in its dtype, 2 GiB for 128 rows of 1,024 tokens with H 8,192) and its LM head: logits would take V / H times as
    much. Ranks divide the rows among them.
    """

    def __init__(
        self,
        rows: PackedRows,
        ranks: Ranks,
        say: Callable[[str], None],
        dense: Readings | None = None,
        image_tensors: ImageTensors | None = None,
    ) -> None:
        """`image_tensors`: makes the tensors of the rows' images; None: the rows have none."""
        self.rows, self.ranks, self.say, self.dense, self.image_tensors = rows, ranks, say, dense, image_tensors
        self.losses = torch.zeros(len(rows), dtype=torch.float64)
        """(N,) sums of -log p per row."""
        self.divergences = torch.zeros(len(rows), dtype=torch.float64)
        """(N,) sums of KL(dense || this model) per row; 0 for the dense model."""
        self.largest = torch.zeros(len(rows), dtype=torch.float64)
        """(N,) largest absolute differences between the logits of the dense model and this one."""
        self.changed = torch.zeros(len(rows), dtype=torch.float64)
        """(N,) numbers of targets whose likeliest token differs from the dense model's."""
        self._hidden: list[Tensor] = []
        """(targets, H) hidden states of the dense model, per batch of this rank."""
        self._head: LossHead | None = None
        """LM head of the dense model."""

    @torch.no_grad()
    def take(self, model: CausalLM, name: str) -> None:
        """Run the model over the rows. Every rank must call it."""
        at_once = max(1, min(TOKENS_AT_ONCE // self.rows.sequence_length, len(self.rows)))
        rank, world, device = self.ranks.rank, self.ranks.world, self.ranks.device
        loader = StepLoader(
            self.rows,
            global_batch=at_once * world,
            micro_batch=at_once,
            rank=rank,
            world=world,
            seed=0,
            shuffle=False,
            image_tensors=self.image_tensors,
        )
        for step in range(loader.steps_per_epoch):
            (batch,) = loader.batch(step).micro_batches
            positions = batch.position_ids
            documents = model.documents_of(positions, device)
            inputs = (each.to(device) for each in (batch.input_ids, positions, batch.labels))
            images = Images.of(batch.images, batch.is_image, batch.input_ids, positions, model.merger, device)
            with model.head.read_by(functools.partial(self._read, model.head, batch=batch, step=step)):
                model(*inputs, documents=documents, images=images)
            done = min((step + 1) * loader.global_batch, len(self.rows))
            self.say(f"perplexity: {name}, {done:,}/{len(self.rows):,} rows")
        for sums in (self.losses, self.divergences, self.largest, self.changed):
            sum_over_ranks(sums, self.ranks)  # Each row belongs to one rank and is 0 on the others.

    def _read(self, head: LossHead, hidden: Tensor, batch: MicroBatch, step: int) -> None:
        """Add the figures of one batch, given its last hidden states (B, T, H)."""
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
        size = max(16, LOGITS_AT_ONCE // head.num_rows)
        for first in range(0, len(targets), size):
            span = slice(first, first + size)
            own, of_row = head.logits(at_targets[span]), row_of[span]
            log_q = own.double().log_softmax(-1)
            _add(self.losses, of_row, -log_q.gather(1, targets[span, None]).squeeze(1))
            if theirs is not None and their_head is not None:
                logits = their_head.logits(theirs[span])
                # If one vocabulary has grown, compare the tokens that both have.
                shared = min(logits.shape[1], own.shape[1])
                logits, own = logits[:, :shared], own[:, :shared]
                log_p = logits.double().log_softmax(-1)
                log_q = log_q if log_q.shape[1] == shared else own.double().log_softmax(-1)
                _add(self.divergences, of_row, (log_p.exp() * (log_p - log_q)).sum(-1))
                _add(self.changed, of_row, logits.argmax(-1) != own.argmax(-1))
                furthest = (logits - own).abs().amax(-1).double().cpu()
                self.largest.scatter_reduce_(0, of_row, furthest, "amax")


def _add(sums: Tensor, row_of: Tensor, values: Tensor) -> None:
    """Add the values (n,) of targets to the sums (N,) of their rows, `row_of` (n,)."""
    sums.index_add_(0, row_of, values.double().cpu())


def let_go(device: torch.device) -> None:
    """Free a deleted model's memory: its modules reference each other in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(sums: Tensor, dense: Tensor, divergences: Tensor, targets: Tensor) -> Loss:
    """Return one model's loss against the dense model's, from row sums (N,) each.

    The mean is a ratio of sums; its standard error follows from the delta method. Rows are paired, so text that is hard
    for both models adds no noise.
    """
    total, count = float(targets.sum()), len(targets)
    difference = float((sums - dense).sum()) / total
    error = None
    if count > 1:
        residual = (sums - dense) - difference * targets
        error = math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total
    return Loss(float(sums.sum()) / total, difference, error, float(divergences.sum()) / total)
