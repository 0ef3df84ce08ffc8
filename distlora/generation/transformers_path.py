"""Generate with transformers' `generate`: for models and settings that the engine does not serve.

`Generator` presents a `CausalLM` (quantized, adapted, perhaps sharded) to transformers as one of its models; sampling,
stopping, streaming and the key-value cache are transformers'. Every rank of a sharded model calls alike and gets the
same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from distlora.generation.prompts import context_limit
from distlora.model.build import CausalLM, Past
from distlora.parallel import Backend

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
        past = Past(attention_mask, cache)
        logits = self.causal_lm(input_ids, position_ids, None, past=past)
        if self.backend.ranks.world > 1:
            # Ranks compute the same logits. If one differed by a bit and stopped a token earlier, the others would wait
            # forever, so all use rank 0's: a sum with zeros, which is exact.
            logits = self.backend.sum_over_ranks(logits if self.backend.writes else torch.zeros_like(logits))
        output = CausalLMOutputWithPast(logits=logits)
        output[self.causal_lm.cache_name] = cache
        return output


def generate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteriaList | None = None,
) -> list[Completion]:
    """Continue a batch of prompts (token ids), each shorter than `context_limit`."""
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
