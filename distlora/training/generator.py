"""Generate text with a model in training form, through transformers' `generate`.

`Generator` presents a `CausalLM` (quantized, adapted, perhaps sharded) to transformers as one of its models; sampling,
stopping, streaming and the key-value cache are transformers'. Every rank of a sharded model calls alike and gets the
same tokens. `PromptEncoder` turns prompts into tokens, and `Sampler` writes samples during training.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelConfig, TrainConfig, UserError
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.data.prompts import Prompt
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


def context_limit(model: CausalLM) -> int:
    """Return the maximum length of prompt and completion in tokens: the model's positions, by its config.

    With longrope, those before its factors change: the cache holds keys that were rotated with the earlier factors.
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
    """Generate within a run: restore the model's slicing and the traffic counters afterwards."""
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
    generator: Generator, prompts: Sequence[Sequence[int]], settings: GenerationConfig
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
        yield generate(generator, prompts[start:end], settings)
        start = end


_WITHOUT_SAMPLING = ("repetition_penalty", "no_repeat_ngram_size")
_WITH_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Entries of a model's generation_config.json that apply by default. Others (lengths, beams, caches) would change what
a completion is or how it streams."""


class PromptEncoder:
    """Encode prompts as the model was trained: through the chats' template, or as plain text if it saw no chats.

    `data` is RUN/data.json. as_chat=True always uses the template, False always plain text. Raises UserError for a
    tokenizer that cannot be loaded or lacks a requested template.
    """

    def __init__(
        self, model: CausalLM, base: ModelConfig, data: Mapping[str, Any], *, as_chat: bool | None = None
    ) -> None:
        folder = base.path
        self.tokenizer = load_tokenizer(Path(folder), base.new_tokens, base.special_tokens)
        self.template: ChatTemplate | None = None
        """None: prompts are continued as they are."""
        if data["chats"] if as_chat is None else as_chat:
            self.template = ChatTemplate(self.tokenizer, folder, source=data["chat_template"])
        self._eot_tokens = data.get("settings", {}).get("eot_tokens", [])
        self._limit = context_limit(model)
        self._stops = _as_set(model.decoder.config.eos_token_id)  # type: ignore[union-attr, arg-type]
        # The tokens that training puts in front of a text, without others that the tokenizer would add (an end token).
        self._start = start_tokens(self.tokenizer)

    def encode(self, prompt: Prompt, *, system: str | None = None) -> list[int]:
        """Return token ids up to the completion. `system` is the first message, unless the prompt has one.

        Raises UserError for a prompt that the template refuses, and for one that leaves no room for an answer.
        """
        if self.template is not None:
            messages = list(prompt.messages) if prompt.text is None else [{"role": "user", "content": prompt.text}]
            if system is not None and messages[0]["role"] not in ("system", "developer"):
                messages.insert(0, {"role": "system", "content": system})
            self.template.check_tools(prompt.place, messages, prompt.tools)
            ids = self._tokenize(self.template.render(prompt.place, messages, prompt.tools, prompt=True))
        else:
            if prompt.text is None:
                raise UserError(
                    f"{prompt.place} holds messages, and the model has no chat template to write them with; "
                    'write {"prompt": ...} instead'
                )
            ids = self._start + self._tokenize(prompt.text)
        if not ids:
            raise UserError(f"{prompt.place}: an empty prompt gives this model nothing to continue; write a word")
        if len(ids) >= self._limit:
            raise UserError(
                f"{prompt.place}: {len(ids):,} tokens, and the model has {self._limit:,} positions for the prompt and "
                "its completion; shorten it"
            )
        return ids

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def stop_tokens(self, folder: str | Path) -> list[int]:
        """Return the tokens that end a completion: ends of text of the tokenizer, config.json, generation_config.json.

        The token that the chat template writes after an assistant's turn also counts: a base may be trained on a
        template that its authors did not know.
        """
        stops = self._stops | {self.tokenizer.eos_token_id} | _as_set(_model_defaults(folder).eos_token_id)
        if self.template is not None:
            stops.update(self.template.end_of_turn())
            stops.update(self.tokenizer.convert_tokens_to_ids(token) for token in self._eot_tokens)
        return sorted(stops - {None})

    def decode(self, completion: Completion) -> str:
        """Decode with special tokens, which may mark a tool call."""
        text = self.tokenizer.decode(completion.tokens)
        assert isinstance(text, str)
        return text


def greedy(encoder: PromptEncoder, folder: str | Path, max_new_tokens: int) -> GenerationConfig:
    """Return settings that always take the likeliest token."""
    stops, pad = encoder.stop_tokens(folder), encoder.tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (*stops, 0)[0],
    )


def sampling(
    encoder: PromptEncoder,
    folder: str | Path,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> GenerationConfig:
    """Return the model's generation_config.json, changed by the arguments; greedy if neither asks for sampling.

    temperature=0 is greedy; a temperature above 0, top_p and top_k each ask for sampling. A repetition penalty in the
    model's file always applies.
    """
    settings = greedy(encoder, folder, max_new_tokens)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    defaults = _model_defaults(folder)
    if temperature == 0 or (not given and not defaults.do_sample):
        settings.update(**{name: getattr(defaults, name) for name in _WITHOUT_SAMPLING})
        return settings
    values = {name: getattr(defaults, name) for name in (*_WITHOUT_SAMPLING, *_WITH_SAMPLING)} | given
    if values["top_k"] is None:
        values["top_k"] = 0  # No limit; transformers would take 50.
    settings.update(do_sample=True, **values)
    return settings


def _as_set(value: int | list[int] | None) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}


def _model_defaults(folder: str | Path) -> GenerationConfig:
    if not (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:  # transformers raises these for a file that is not JSON.
        first = str(error).partition("\n")[0]
        raise UserError(f"{folder}/generation_config.json cannot be read ({first}); mend it or remove it") from error


class Sampler:
    """Greedy samples after train.sample_prompts during training.

    Raises UserError for a prompt that is too long or that the chat template refuses.
    """

    def __init__(
        self, model: CausalLM, backend: Backend, base: ModelConfig, train: TrainConfig, data: Mapping[str, Any]
    ) -> None:
        """Encode the prompts. `data` is RUN/data.json, which records how prompts were rendered."""
        self._model, self._backend = model, backend
        self._prompts = train.sample_prompts
        self._encoder = PromptEncoder(model, base, data)
        self._encoded = [
            self._encoder.encode(Prompt(place=f"train.sample_prompts[{index}]", text=text))
            for index, text in enumerate(self._prompts)
        ]
        self._settings = greedy(self._encoder, base.path, train.sample_tokens)
        self._generator = Generator(model, backend)

    def __call__(self) -> list[tuple[str, str]]:
        """Return (prompt, completion) pairs. Every rank calls it at the same step; the model stays unchanged."""
        with aside(self._model, self._backend):
            batches = list(generate_all(self._generator, self._encoded, self._settings))
        texts = [self._encoder.decode(completion) for batch in batches for completion in batch]
        return list(zip(self._prompts, texts, strict=True))
