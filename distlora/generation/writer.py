"""Complete prompts by the engine where it serves model and settings, else by transformers' generate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from distlora.generation.engine import Engine, aside, serves
from distlora.generation.sampling import Request, Sample
from distlora.generation.transformers_path import Completion, Generator, generate, generate_all
from distlora.model.build import CausalLM
from distlora.parallel import Backend

_BY_ENGINE = {"do_sample", "max_new_tokens", "temperature", "top_p", "top_k", "eos_token_id", "pad_token_id"}
_BY_ENGINE |= {"transformers_version"}
"""Settings of a GenerationConfig that the engine knows."""
_NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0}
"""Values of other settings that change nothing."""


class _Stopped(Exception):
    """The caller stopped a completion."""


class _Criterion(StoppingCriteria):
    """Stops all rows once `stopped` returns True."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return (B,) bool."""
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)


class Writer:
    """Completes prompts with one model. Every rank calls it alike."""

    def __init__(self, model: CausalLM, backend: Backend, tokenizer: Any, *, compiled: bool | None = None) -> None:
        """Prepare to complete prompts. `compiled`: as the engine has it."""
        self._model, self._backend, self._tokenizer, self._compiled = model, backend, tokenizer, compiled
        self._generator = Generator(model, backend)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationConfig,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Return the completions of prompts (token ids), each shorter than `context_limit`, in order.

        `seed` is that of the first prompt; the next ones have the next numbers. `stop`: texts that end a completion.
        `on_done(index, completion)` is called as soon as one is there, on the rank that writes it.
        """
        if self._by_engine(settings):
            ends = frozenset(settings.eos_token_id or ())

            def done(index: int, sample: Sample) -> None:
                if on_done is not None:
                    on_done(index, _completion(sample, ends))

            requests = [_request(prompt, settings, seed + number, stop) for number, prompt in enumerate(prompts)]
            return [_completion(sample, ends) for sample in self._engine(ends).run(requests, done)]
        criteria = [StopStringCriteria(self._tokenizer, list(stop))] if stop else []
        found: list[Completion] = []
        with self._seeded(seed), aside(self._model, self._backend):
            for completion in self._by_transformers(prompts, settings, StoppingCriteriaList(criteria)):
                if on_done is not None:
                    on_done(len(found), completion)
                found.append(completion)
        return found

    def stream(
        self,
        prompt: Sequence[int],
        settings: GenerationConfig,
        streamer: BaseStreamer,
        *,
        seed: int = 0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Complete one prompt and give `streamer` each token. It ends after the token at which `stopped` is True."""
        if not self._by_engine(settings):
            criteria = StoppingCriteriaList([_Criterion(stopped)])
            with self._seeded(seed):
                (completion,) = generate(self._generator, [prompt], settings, streamer=streamer, stopping=criteria)
            return completion
        tokens: list[int] = []

        def put(_index: int, token: int) -> None:
            tokens.append(token)
            streamer.put(torch.tensor([token]))
            if stopped():
                raise _Stopped

        ends = frozenset(settings.eos_token_id or ())
        streamer.put(torch.tensor([list(prompt)]))
        with contextlib.suppress(_Stopped):
            self._engine(ends).run([_request(prompt, settings, seed, ())], on_token=put)
        streamer.end()
        return _completion(Sample(tokens, [], tokens[-1] in ends), ends)

    def _engine(self, ends: frozenset[int]) -> Engine:
        model, backend = self._model, self._backend
        return Engine(model, backend, end_tokens=sorted(ends), tokenizer=self._tokenizer, compiled=self._compiled)

    def _by_engine(self, settings: GenerationConfig) -> bool:
        # Penalties, min_p and beams are transformers'.
        others = {name for name, value in settings.to_diff_dict().items() if _NEUTRAL.get(name, ...) != value}
        return serves(self._model) and others <= _BY_ENGINE

    def _by_transformers(
        self, prompts: Sequence[Sequence[int]], settings: GenerationConfig, stopping: StoppingCriteriaList
    ) -> Iterator[Completion]:
        for batch in generate_all(self._generator, prompts, settings, stopping):
            yield from batch

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Give torch's generators a seed within this context."""
        device = self._backend.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def _request(prompt: Sequence[int], settings: GenerationConfig, seed: int, stop: Sequence[str]) -> Request:
    samples = bool(settings.do_sample)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    return Request(
        tokens=list(prompt),
        seed=seed,
        max_new_tokens=settings.max_new_tokens,
        temperature=temperature if samples else 0.0,
        top_p=settings.top_p or 1.0,
        top_k=settings.top_k or 0,
        stop=tuple(stop),
    )


def _completion(sample: Sample, ends: frozenset[int]) -> Completion:
    """Return a sample without the token that ended it."""
    tokens = sample.tokens
    return Completion(tokens[:-1] if tokens and tokens[-1] in ends else tokens, sample.ended)
