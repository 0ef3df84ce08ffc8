"""Write samples during training: greedy completions of train.sample_prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.config import ModelConfig, TrainConfig
from distlora.data.prompts import Prompt
from distlora.generation.prompts import PromptEncoder, greedy
from distlora.generation.writer import Writer
from distlora.model.build import CausalLM
from distlora.parallel import Backend


class Sampler:
    """Greedy samples after train.sample_prompts during training.

    Raises UserError for a prompt that is too long or that the chat template refuses.
    """

    def __init__(
        self, model: CausalLM, backend: Backend, base: ModelConfig, train: TrainConfig, data: Mapping[str, Any]
    ) -> None:
        """Encode the prompts. `data` is RUN/data.json, which records how prompts were rendered."""
        self._prompts = train.sample_prompts
        self._encoder = PromptEncoder(model, base, data)
        self._encoded = [
            self._encoder.encode(Prompt(place=f"train.sample_prompts[{index}]", text=text))
            for index, text in enumerate(self._prompts)
        ]
        self._settings = greedy(self._encoder, base.path, train.sample_tokens)
        self._writer = Writer(model, backend, self._encoder.tokenizer)

    def __call__(self) -> list[tuple[str, str]]:
        """Return (prompt, completion) pairs. Every rank calls it at the same step; the model stays unchanged."""
        texts = map(
            self._encoder.decode, (each.tokens for each in self._writer.complete(self._encoded, self._settings))
        )
        return list(zip(self._prompts, texts, strict=True))
