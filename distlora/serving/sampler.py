"""Sample for many calls at once with the generation engine: rows choose adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distlora.config import UserError
from distlora.generation.engine import Engine, serves
from distlora.generation.sampling import Request
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.serving.adapters import ServedAdapter, in_slots
from distlora.serving.losses import TARGETS, WEIGHTS, check_tokens
from distlora.serving.operations import ForwardBackward, Row, Sample, SampledSequence, SampleResult
from distlora.serving.passes import BASE_SLOT, Call, Passes

MOST_SAMPLES = 1024
"""Maximum num_samples of a call."""
_SEEDS = 64
"""Bits of a call's seed; its samples differ above them."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampling:
    """A call to sample."""

    operation: Sample
    adapter: ServedAdapter | None
    """None: the base alone."""


class Sampler:
    """Samples with the adapters of a service."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        passes: Passes,
        *,
        end_tokens: Sequence[int],
        tokenizer: Any,
        context: int,
    ) -> None:
        """`end_tokens` end a completion of a call that names no tokens. `context`: most tokens of a sequence.

        `tokenizer`: of transformers, for texts that end a completion.
        """
        self._model, self._passes, self._ends, self._context = model, passes, frozenset(end_tokens), context
        self._engine = Engine(model, backend, tokenizer=tokenizer) if serves(model) else None

    def check(self, operation: Sample) -> None:
        """Raise UserError for a call that cannot be run, before anything runs."""
        if self._engine is None:
            raise UserError(f"sampling from {self._model.hf_config.model_type} is not supported by this server")
        check_sample(operation, vocabulary=self._model.vocabulary.rows, context=self._context)

    def run(self, calls: Sequence[Sampling]) -> list[SampleResult]:
        """Return the results of calls, in their order. Every rank must call it alike, and gets all results."""
        assert self._engine is not None, "check refuses the call"
        adapters = list(dict.fromkeys(call.adapter for call in calls if call.adapter is not None))
        slots = {adapter: slot for slot, adapter in enumerate(adapters)}
        requests = [
            request
            for call in calls
            for request in self._requests(call.operation, BASE_SLOT if call.adapter is None else slots[call.adapter])
        ]
        with in_slots(adapters):
            samples = iter(self._engine.run(requests))
        scores = self._scores(calls)
        results = []
        for call in calls:
            mine = [next(samples) for _ in range(call.operation.num_samples)]
            sequences = [
                SampledSequence(each.tokens, each.logprobs, "stop" if each.ended else "length") for each in mine
            ]
            results.append(SampleResult(sequences, scores.get(id(call))))
        return results

    def _requests(self, operation: Sample, slot: int) -> list[Request]:
        assert operation.seed is not None, "the engine chooses a seed"
        ends = self._ends if operation.stop_tokens is None else frozenset(operation.stop_tokens)
        room = self._context - len(operation.tokens)
        return [
            Request(
                tokens=list(operation.tokens),
                seed=operation.seed + (number << _SEEDS),
                max_new_tokens=min(operation.max_tokens or room, room),
                temperature=operation.temperature,
                top_p=operation.top_p,
                top_k=max(operation.top_k, 0),
                stop=tuple(operation.stop_texts),
                stop_tokens=ends,
                slot=slot,
            )
            for number in range(operation.num_samples)
        ]

    def _scores(self, calls: Sequence[Sampling]) -> dict[int, list[float | None]]:
        """Return the log-probabilities of the prompts' tokens that calls want, by the id of the call."""
        wanted = [call for call in calls if call.operation.prompt_logprobs]
        scored = [call for call in wanted if len(call.operation.tokens) > 1]
        rows = [np.asarray(call.operation.tokens, np.int64) for call in scored]
        forwards = [
            Call(
                ForwardBackward(
                    "", [Row(row[:-1], {TARGETS: row[1:], WEIGHTS: np.zeros(len(row) - 1, np.float32)})],
                    "cross_entropy", backward=False,
                ),
                call.adapter,
            )
            for row, call in zip(rows, scored, strict=True)
        ]  # fmt: skip
        results = self._passes.run(forwards, backward=False) if forwards else []
        found: dict[int, list[float | None]] = {id(call): [None] for call in wanted}
        for call, result in zip(scored, results, strict=True):
            found[id(call)] += result.logprobs[0].tolist()
        return found


def check_sample(operation: Sample, *, vocabulary: int, context: int) -> None:
    """Raise UserError for a call that cannot be run. vocabulary: number of tokens. context: most of a sequence."""
    number, new = len(operation.tokens), operation.max_tokens or 1
    if not 0 < number <= context - new:
        raise UserError(f"a prompt of {number:,} tokens and {new:,} new ones; this model's context is {context:,}")
    check_tokens(np.asarray(operation.tokens), "prompt", vocabulary)
    valid = {
        f"num_samples={operation.num_samples}": 0 < operation.num_samples <= MOST_SAMPLES,
        f"max_tokens={operation.max_tokens}": operation.max_tokens is None or operation.max_tokens > 0,
        f"temperature={operation.temperature}": 0 <= operation.temperature <= 100,
        f"top_p={operation.top_p}": 0 < operation.top_p <= 1,
        f"top_k={operation.top_k}": -1 <= operation.top_k < 2**31,
        f"seed={operation.seed}": operation.seed is None or 0 <= operation.seed < 2**_SEEDS,
        f"stop={operation.stop_tokens}": all(0 <= token < vocabulary for token in operation.stop_tokens or ()),
    }
    for setting, is_valid in valid.items():
        if not is_valid:
            raise UserError(f"{setting:.160} is not a valid sampling parameter")
