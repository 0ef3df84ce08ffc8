"""transformers' own `generate` over our decoder and head.

`Generator` shows a `CausalLM` (quantized, adapted, perhaps sharded) to transformers as one of its models; sampling,
stopping, streaming and the key-value cache are transformers'. Every rank of a sharded model calls alike and gets the
same tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from distlora.model.build import CausalLM, Past
from distlora.parallel import Backend

ROWS_AT_ONCE = 8
"""Prompts that are continued in one batch."""


class Completion(NamedTuple):
    """What a model wrote after one prompt."""

    tokens: list[int]
    """Without the token that ended it."""
    ended: bool
    """Whether the model ended it, rather than the limit of tokens."""


class Generator(PreTrainedModel, GenerationMixin):
    """A `CausalLM` as transformers generates with it: logits (B, 1, vocabulary) of the token after the last."""

    # The decoder has its attention already; this is about what the config may say.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, model: CausalLM, backend: Backend) -> None:
        super().__init__(copy.deepcopy(model.decoder.config))  # type: ignore[arg-type]
        # Not what transformers takes from config.json: use_cache=false, which training leaves there, is slow.
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
        """input_ids, position_ids (B, T); attention_mask (B, tokens in the cache + T).

        The cache has the name that this transformers gives it. use_cache and return_dict are its way to say what the
        cache and the result say already.
        """
        cache = past_key_values if cache is None else cache
        past = Past(attention_mask, cache)
        logits = self.causal_lm(input_ids, position_ids, None, past=past)
        if self.backend.ranks.world > 1:
            # The ranks compute the same; if one were off by a bit and stopped a token earlier, the rest would wait for
            # it for ever. So rank 0's logits are everyone's: a sum with zeros, which is exact.
            logits = self.backend.sum_over_ranks(logits if self.backend.writes else torch.zeros_like(logits))
        output = CausalLMOutputWithPast(logits=logits)
        output[self.causal_lm.cache_name] = cache
        return output


def context_limit(model: CausalLM) -> int:
    """Tokens that prompt and completion may have together: the model's positions, by its config.

    With longrope, those before its factors change: a cache holds keys that were turned with the factors before.
    """
    config = model.decoder.config
    limit = config.max_position_embeddings  # type: ignore[union-attr]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", limit
        )
        limit = min(limit, original)  # type: ignore[type-var]
    assert isinstance(limit, int)
    return limit


@contextlib.contextmanager
def aside(model: CausalLM, backend: Backend) -> Iterator[None]:
    """Generation within a run: afterwards the model cuts its batches, and the counters stand, as before."""
    num_micro, traffic = [block.num_micro for block in model.blocks], copy.copy(backend.traffic)
    model.set_num_micro(1)
    try:
        yield
    finally:
        for block, number in zip(model.blocks, num_micro, strict=True):
            block.num_micro = number
        backend.traffic.restore(traffic)


def generate(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteriaList | None = None,
) -> list[Completion]:
    """Continue a batch of prompts (token ids), none of which may be longer than `context_limit` less one."""
    longest = max(map(len, prompts))
    device, pad = generator.backend.ranks.device, settings.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = copy.deepcopy(settings)
    settings.max_new_tokens = min(settings.max_new_tokens, context_limit(generator.causal_lm) - longest)
    output = generator.generate(
        input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        streamer=streamer,
        stopping_criteria=stopping,
        synced_gpus=False,
    )
    stops = settings.eos_token_id or []
    return [_completion(row[longest:], stops) for row in output.tolist()]


def _completion(tokens: list[int], stops: list[int]) -> Completion:
    """A row of generate's result, which is padded behind its end."""
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    return Completion(tokens[:end], end is not None)


def generate_all(
    generator: Generator, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> Iterator[list[Completion]]:
    """Completions of any number of prompts, in order, a batch at a time.

    A prompt that the context leaves less room than it may use runs alone, so that it does not shorten others.
    """
    roomy = context_limit(generator.causal_lm) - settings.max_new_tokens
    start = 0
    while start < len(prompts):
        end = start + 1
        if len(prompts[start]) <= roomy:
            while end < min(start + ROWS_AT_ONCE, len(prompts)) and len(prompts[end]) <= roomy:
                end += 1
        yield generate(generator, prompts[start:end], settings)
        start = end
