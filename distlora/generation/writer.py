"""Complete prompts by the engine where it serves model and settings, else by transformers' generate.

For the latter `Generator` presents a `CausalLM` (quantized, adapted, perhaps sharded) as one of its models; sampling,
stopping, streaming and the key-value cache are transformers'. Every rank of a sharded model calls alike and gets the
same tokens.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from distlora.generation.engine import Engine, aside, serves
from distlora.generation.prompts import context_limit
from distlora.generation.sampling import Request, Sample
from distlora.model.build import CausalLM
from distlora.model.images import Images, ProcessedImage
from distlora.model.paged_cache import Past
from distlora.parallel import Backend

_BY_ENGINE = {"do_sample", "max_new_tokens", "temperature", "top_p", "top_k", "eos_token_id", "pad_token_id"}
_BY_ENGINE |= {"transformers_version"}
"""Settings of a GenerationConfig that the engine knows."""
_NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0}
"""Values of other settings that change nothing."""


ROWS_AT_ONCE = 8
"""Prompts per batch."""


class Completion(NamedTuple):
    """Text that a model generated after one prompt."""

    tokens: list[int]
    """Generated tokens without the one that ended them."""
    ended: bool
    """True if the model ended the completion, not the token limit."""


class Generator(PreTrainedModel, GenerationMixin):
    """A `CausalLM` for transformers' generate: logits (B, 1, vocabulary) of the token after the last."""

    # The decoder's attention is already set; this is about the values that its config may have.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, model: CausalLM, backend: Backend) -> None:
        super().__init__(copy.deepcopy(model.decoder.config))  # type: ignore[arg-type]
        # transformers would copy use_cache=false from config.json, which training leaves there and which is slow.
        self.generation_config = GenerationConfig()
        self.causal_lm = model
        self.backend = backend
        self._images: Sequence[ProcessedImage] = ()
        self._grid_shift: int | None = None

    def look_at(self, images: Sequence[ProcessedImage]) -> None:
        """Take the images of the next prompt, in the order of their placeholders. With any, it runs alone."""
        self._images, self._grid_shift = images, None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Run input_ids, position_ids (B, T) with attention_mask (B, tokens in the cache + T).

        The cache's keyword depends on the transformers version. use_cache and return_dict repeat what the cache and the
        result say.
        """
        cache = past_key_values if cache is None else cache
        images = self._images_of(input_ids, position_ids)
        if cache is not None:  # Later tokens find them there.
            self._images = ()
        past = Past(attention_mask, cache, grid_shift=self._grid_shift)
        logits = self.causal_lm(input_ids, position_ids, None, past=past, images=images)
        if self.backend.ranks.world > 1:
            # Ranks compute the same logits. If one differed by a bit and stopped a token earlier, the others would wait
            # forever, so all use rank 0's: a sum with zeros, which is exact.
            logits = self.backend.sum_over_ranks(logits if self.backend.writes else torch.zeros_like(logits))
        output = CausalLMOutputWithPast(logits=logits)
        output[self.causal_lm.cache_name] = cache
        return output

    def _images_of(self, input_ids: Tensor, position_ids: Tensor) -> Images | None:
        """Return the images of a prompt (1, T), and keep how they shift later positions; None for a later token."""
        if not self._images:
            return None
        model, ids, positions = self.causal_lm, input_ids.cpu(), position_ids.cpu()
        assert model.image_layout is not None, "images for a model that was built for text"
        is_image = ids == model.image_layout.token_id
        images = Images.of([self._images], is_image, ids, positions, model.merger, input_ids.device)
        if images is not None and images.grid is not None:
            self._grid_shift = int(images.grid.max()) + 1 - ids.shape[1]
        return images


def generate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    images: Sequence[ProcessedImage] = (),
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteriaList | None = None,
) -> list[Completion]:
    """Continue a batch of prompts (token ids), each shorter than `context_limit`, or a single one with images."""
    assert not images or len(prompts) == 1, "images of several prompts"
    generator.look_at(images)
    longest = max(map(len, prompts))
    device, pad = generator.backend.ranks.device, settings.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = copy.deepcopy(settings)
    if not generator.causal_lm.architecture.takes_cache:  # Every token is computed again.
        settings.use_cache = False
    settings.max_new_tokens = min(settings.max_new_tokens, context_limit(generator.causal_lm) - longest)
    output = generator.generate(
        input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        streamer=streamer,
        stopping_criteria=stopping,
        synced_gpus=False,
    )
    completions = []
    for row in output.tolist():  # Padded after its end.
        tokens, stops = row[longest:], settings.eos_token_id or []
        end = next((index for index, token in enumerate(tokens) if token in stops), None)
        completions.append(Completion(tokens[:end], end is not None))
    return completions


def generate_all(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    stopping: StoppingCriteriaList | None = None,
) -> Iterator[list[Completion]]:
    """Return completions of any number of prompts, in order, one batch at a time.

    A prompt near the context limit runs alone, so that it does not shorten others.
    """
    roomy = context_limit(generator.causal_lm) - settings.max_new_tokens
    start = 0
    while start < len(prompts):
        end = start + 1
        if len(prompts[start]) <= roomy and generator.causal_lm.architecture.takes_cache:
            while end < min(start + ROWS_AT_ONCE, len(prompts)) and len(prompts[end]) <= roomy:
                end += 1
        yield generate(generator, prompts[start:end], settings, stopping=stopping)
        start = end


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
        images: Iterable[Sequence[ProcessedImage]] | None = None,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Return the completions of prompts (token ids), each shorter than `context_limit`, in order.

        `images`: those of each prompt, read as they are needed, and every prompt runs alone; None: there are none.
        `seed` is that of the first prompt; the next ones have the next numbers. `stop`: texts that end a completion.
        `on_done(index, completion)` is called as soon as one is there, on the rank that writes it.
        """
        if self._by_engine(settings) and images is None:
            ends = frozenset(settings.eos_token_id or ())

            def done(index: int, sample: Sample) -> None:
                if on_done is not None:
                    on_done(index, _completion(sample, ends))

            requests = [_request(prompt, settings, seed + number, stop) for number, prompt in enumerate(prompts)]
            return [_completion(sample, ends) for sample in self._engine(ends).run(requests, done)]
        criteria = StoppingCriteriaList([StopStringCriteria(self._tokenizer, list(stop))] if stop else [])
        completions: list[Completion] = []
        with aside(self._model, self._backend):
            for completion in self._by_transformers(prompts, settings, seed, criteria, images):
                if on_done is not None:
                    on_done(len(completions), completion)
                completions.append(completion)
        return completions

    def _by_transformers(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationConfig,
        seed: int,
        criteria: StoppingCriteriaList,
        images: Iterable[Sequence[ProcessedImage]] | None,
    ) -> Iterator[Completion]:
        if images is None:
            with self._seeded(seed):
                yield from itertools.chain.from_iterable(generate_all(self._generator, prompts, settings, criteria))
            return
        for number, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            with self._seeded(seed + number):
                yield from generate(self._generator, [prompt], settings, images=own, stopping=criteria)

    def stream(
        self,
        prompt: Sequence[int],
        settings: GenerationConfig,
        streamer: BaseStreamer,
        *,
        seed: int = 0,
        images: Sequence[ProcessedImage] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Complete one prompt and give `streamer` each token. It ends after the token at which `stopped` is True."""
        if images or not self._by_engine(settings):
            criteria = StoppingCriteriaList([_Criterion(stopped)])
            with self._seeded(seed):
                (completion,) = generate(
                    self._generator, [prompt], settings, images=images, streamer=streamer, stopping=criteria
                )
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
        # Penalties, min_p and beams are transformers', and so are prompts with images.
        others = {name for name, value in settings.to_diff_dict().items() if _NEUTRAL.get(name, ...) != value}
        return serves(self._model) and others <= _BY_ENGINE

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
