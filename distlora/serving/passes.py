"""Run the rows of many calls in one forward, or forward and backward: rows choose adapters.

Rows are sorted by length, cut into micro-batches and dealt to the ranks; each rank runs as many micro-batches, of empty
rows where it has none. A loss is a sum over its own row, so neither the cut nor the number of ranks changes it but by
rounding.

Letters: B rows of a micro-batch, L tokens of the longest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distlora.data.loader import IGNORED, MicroBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.parallel import Backend, watch
from distlora.parallel.fsdp2 import gather_head_in_backward
from distlora.parallel.ranks import sum_over_ranks
from distlora.serving.adapters import ServedAdapter, in_slots
from distlora.serving.losses import TARGETS, token_losses
from distlora.serving.operations import ForwardBackward, ForwardBackwardResult, Row
from distlora.system.transfer import to_device
from distlora.training.objectives.objective import run, send

BASE_SLOT = -1
"""Slot of rows that use no adapter."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call whose rows run with those of others."""

    operation: ForwardBackward
    adapter: ServedAdapter | None
    """None: the base alone."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A row, by its call and its number there."""

    call: int
    number: int
    slot: int


def cut(lengths: Sequence[int], world: int, most_tokens: int) -> list[list[list[int]]]:
    """Return micro-batches, of each the rows of every rank, from the longest rows to the shortest.

    A rank's rows have at most `most_tokens` in one micro-batch, padding included, or are one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        count = world * max(1, most_tokens // lengths[order[start]])
        rows = order[start : start + count]
        batches.append([rows[rank::world] for rank in range(world)])
        start += count
    return batches


class Passes:
    """Forward and backward passes of a model's served rows."""

    def __init__(self, model: CausalLM, backend: Backend, *, most_tokens: int) -> None:
        """`most_tokens`: of a rank's micro-batch, padding included."""
        self._model, self._backend, self._most_tokens = model, backend, most_tokens
        self._is_cold = True

    def run(self, calls: Sequence[Call], *, backward: bool) -> list[ForwardBackwardResult]:
        """Return the results of calls, in their order; `backward`: add the gradients to those of their adapters.

        Every rank must call it alike, and gets all results.
        """
        adapters = list(dict.fromkeys(call.adapter for call in calls if call.adapter is not None))
        slots = {adapter: slot for slot, adapter in enumerate(adapters)}
        places = [
            _Place(index, number, BASE_SLOT if call.adapter is None else slots[call.adapter])
            for index, call in enumerate(calls)
            for number in range(len(call.operation.rows))
        ]
        lengths = [len(_row(calls, place).tokens) for place in places]
        own: dict[int, Tensor] = {}
        batches = cut(lengths, self._backend.ranks.world, self._most_tokens)
        with in_slots(adapters), contextlib.nullcontext() if backward else torch.no_grad():
            gather_head_in_backward(self._model, any(adapter.adapter.unembed for adapter in adapters))
            self._backend.gradients[:] = [adapter.gradients for adapter in adapters] if backward else []
            try:
                for index, ranks in enumerate(batches):
                    watch.at(None, "forward of served rows, micro-batch", index + 1, long=self._is_cold)
                    mine = sorted(ranks[self._backend.ranks.rank], key=lambda row: places[row].slot)
                    outputs = self._micro_batch(calls, [places[row] for row in mine], len(adapters), backward=backward)
                    own |= zip(mine, outputs, strict=True)
            finally:
                self._backend.gradients.clear()
        self._is_cold = False
        for adapter in adapters if backward else ():
            adapter.has_gradients = True
        return self._results(calls, places, lengths, own)

    def _micro_batch(
        self, calls: Sequence[Call], places: Sequence[_Place], adapters: int, *, backward: bool
    ) -> list[Tensor]:
        """Run this rank's rows; return (2, tokens) fp32 of each on the host: log-probabilities and losses."""
        device = self._backend.ranks.device
        rows = [_row(calls, place) for place in places]
        batch = _assembled(rows, [place.slot for place in places])
        sent = send(batch, device)
        logps = -run(self._model, batch, sent, None, LossForm(by_token=True))
        losses = torch.zeros_like(logps)
        for index in dict.fromkeys(place.call for place in places):
            of_call = [at for at, place in enumerate(places) if place.call == index]
            chosen = to_device(torch.tensor(of_call), device)
            operation = calls[index].operation
            names = operation.rows[0].inputs.keys() - {TARGETS}
            inputs = {
                name: to_device(_padded([rows[at].inputs[name] for at in of_call], logps.shape[1], 0.0), device)
                for name in names
            }
            losses = losses.index_copy(0, chosen, token_losses(logps[chosen], inputs, operation))
        if backward:
            # Connects the gradient of every adapter on every rank, and adds nothing: a rank without rows runs backward.
            nothing = logps.masked_fill(torch.ones_like(logps, dtype=torch.bool), 0.0).sum()
            watch.at(None, "backward of served rows", long=self._is_cold)
            self._backend.backward(*(self._loss(losses, places, slot, nothing) for slot in range(adapters)), last=False)
        both = torch.stack([logps.detach(), losses.detach()], dim=1).cpu()
        return [both[at, :, : len(row.tokens)] for at, row in enumerate(rows)]

    @staticmethod
    def _loss(losses: Tensor, places: Sequence[_Place], slot: int, nothing: Tensor) -> Tensor:
        """Return the loss of one adapter's rows, from the losses of tokens (B, L)."""
        of_slot = [at for at, place in enumerate(places) if place.slot == slot]
        return losses[of_slot[0] : of_slot[-1] + 1].sum() + nothing if of_slot else nothing

    def _results(
        self, calls: Sequence[Call], places: Sequence[_Place], lengths: Sequence[int], own: dict[int, Tensor]
    ) -> list[ForwardBackwardResult]:
        """Return the results from the rows of all ranks."""
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        table = torch.zeros(2, starts[-1])
        for row, values in own.items():
            table[:, starts[row] : starts[row + 1]] = values
        # Exact: each row is one rank's, and zeros are added.
        both = sum_over_ranks(table, self._backend.ranks).numpy()
        columns = [both[:, first:last] for first, last in itertools.pairwise(starts)]
        results = [ForwardBackwardResult([], [], {}) for _ in calls]
        for place, (logps, losses) in zip(places, columns, strict=True):
            results[place.call].logprobs.append(logps)
            results[place.call].losses.append(losses)
        for result in results:
            result.metrics["loss:sum"] = float(sum(losses.sum(dtype=np.float64) for losses in result.losses))
        return results


def _row(calls: Sequence[Call], place: _Place) -> Row:
    return calls[place.call].operation.rows[place.number]


def _assembled(rows: Sequence[Row], slots: Sequence[int]) -> MicroBatch:
    """Return rows padded to the longest; one token without a label if there is none."""
    longest = max((len(row.tokens) for row in rows), default=1)
    labels = [row.inputs[TARGETS] for row in rows] or [np.full(1, IGNORED)]
    tokens, lengths = [row.tokens for row in rows] or [np.zeros(1)], [len(row.tokens) for row in rows] or [1]
    positions = torch.arange(longest).repeat(len(tokens), 1)
    for position, length in zip(positions, lengths, strict=True):
        position[length:] -= length  # Padding is a document of its own.
    return MicroBatch(
        input_ids=_padded(tokens, longest, 0).long(),
        labels=_padded(labels, longest, IGNORED).long(),
        position_ids=positions,
        rows=torch.arange(len(tokens)),
        slots=torch.tensor(list(slots) or [BASE_SLOT]),
    )


def _padded(values: Sequence[np.ndarray], length: int, fill: float) -> Tensor:
    """Return (N, length) from N arrays that may be shorter: fp32 of floats, int64 of integers."""
    kind = np.float32 if isinstance(fill, float) else np.int64
    padded = np.full((len(values), length), fill, kind)
    for row, each in zip(padded, values, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(padded)
