"""Write samples during training: greedy completions of train.sample_prompts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distlora.config import DataConfig, ModelConfig, TrainConfig
from distlora.data.images import ImageTensors
from distlora.data.prompts import Prompt, asked
from distlora.generation.prompts import PromptEncoder, greedy
from distlora.generation.writer import Writer
from distlora.model.build import CausalLM
from distlora.parallel import Backend


class Sampler:
    """Greedy samples after train.sample_prompts during training.

    Raises UserError for a prompt that is too long or that the chat template refuses.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        base: ModelConfig,
        train: TrainConfig,
        settings: DataConfig,
        data: Mapping[str, Any],
    ) -> None:
        """Encode the prompts. `data` is RUN/data.json, which records how prompts were rendered."""
        self._prompts = train.sample_prompts
        layout = model.image_layout
        tensors = None if layout is None else ImageTensors(Path(base.path), settings, layout.names)
        self._encoder = PromptEncoder(model, base, data, image_tensors=tensors)
        prompts = [
            asked(place, [{"role": "user", "content": text}], image) if image else Prompt(place=place, text=text)
            for place, text, image in (
                (f"train.sample_prompts[{index}]", text, image)
                for index, (text, image) in enumerate(zip_longest(self._prompts, train.sample_images))
            )
        ]
        self._encoded = [self._encoder.encode(prompt) for prompt in prompts]
        self._images = [self._encoder.images(prompt) for prompt in prompts] if train.sample_images else None
        self._settings = greedy(self._encoder, base.path, train.sample_tokens)
        self._writer = Writer(model, backend, self._encoder.tokenizer)

    def __call__(self) -> list[tuple[str, str]]:
        """Return (prompt, completion) pairs. Every rank calls it at the same step; the model stays unchanged."""
        completions = self._writer.complete(self._encoded, self._settings, images=self._images)
        texts = map(self._encoder.decode, (each.tokens for each in completions))
        return list(zip(self._prompts, texts, strict=True))
