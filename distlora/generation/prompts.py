"""Turn prompts into tokens as the model was trained, and read how its completions are chosen and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig

from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelConfig, UserError
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.data.encoding import tokenize
from distlora.data.image_records import images_of
from distlora.data.images import ImageTensors, ImageText
from distlora.data.prompts import Prompt
from distlora.data.turns import Conversation
from distlora.model.build import CausalLM
from distlora.model.images import ProcessedImage


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


class PromptEncoder:
    """Encode prompts as the model was trained: through the chats' template, or as plain text if it saw no chats.

    `data` is RUN/data.json. as_chat=True always uses the template, False always plain text. `image_tensors`: for
    prompts with images. Raises UserError for a tokenizer that cannot be loaded or lacks a requested template.
    """

    def __init__(
        self,
        model: CausalLM,
        base: ModelConfig,
        data: Mapping[str, Any],
        *,
        as_chat: bool | None = None,
        image_tensors: ImageTensors | None = None,
    ) -> None:
        folder = base.path
        self.tokenizer = load_tokenizer(Path(folder), base.new_tokens, base.special_tokens)
        self.template: ChatTemplate | None = None
        """None: prompts are continued as they are."""
        if data["chats"] if as_chat is None else as_chat:
            self.template = ChatTemplate(self.tokenizer, folder, source=data["chat_template"])
        self._eot_tokens = data.get("settings", {}).get("eot_tokens", [])
        self._limit = context_limit(model)
        self._image_tensors = image_tensors
        self._image_text = None if image_tensors is None else ImageText(image_tensors.processor, self.tokenizer)
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
            text = self.template.render(prompt.place, messages, prompt.tools, prompt=True)
            images = images_of(messages)
            ids = self._with_images(prompt.place, text, images) if images else self._tokenize(text)
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

    def images(self, prompt: Prompt) -> list[ProcessedImage]:
        """Return the tensors of a prompt's images, in the order of their places."""
        images = images_of(prompt.messages)
        if not images:
            return []
        assert self._image_tensors is not None, "a prompt with images for a model of text"
        return [self._image_tensors(i if isinstance(i, bytes) else Path(i).read_bytes()) for i in images]

    def _with_images(self, place: str, text: str, images: tuple[str | bytes, ...]) -> list[int]:
        assert self._image_text is not None, "a prompt with images for a model of text"
        conversation = Conversation(place, text, (), marked=False, inverse=False, images=images)
        expanded, placed = self._image_text.expand(conversation)
        batch = tokenize(self.tokenizer, [expanded.text])
        tokens = np.array(batch.input_ids[0], np.int32)
        flags = np.zeros(len(tokens), np.uint8)
        tokens, flags, _ = self._image_text.spread(tokens, flags, placed, batch.encodings[0])
        self._image_text.check_places(place, tokens, flags)
        return [int(token) for token in tokens]

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

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode with special tokens, which may mark a tool call."""
        text = self.tokenizer.decode(list(tokens))
        assert isinstance(text, str)
        return text


def _as_set(value: int | list[int] | None) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}


_WITHOUT_SAMPLING = ("repetition_penalty", "no_repeat_ngram_size")
_WITH_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Entries of a model's generation_config.json that apply by default. Others (lengths, beams, caches) would change what
a completion is or how it streams."""


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


def _model_defaults(folder: str | Path) -> GenerationConfig:
    if not (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:  # transformers raises these for a file that is not JSON.
        first = str(error).partition("\n")[0]
        raise UserError(f"{folder}/generation_config.json cannot be read ({first}); mend it or remove it") from error
