"""Samples: what a model writes between the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.config import Config
from distlora.data.prompts import Prompt
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.training.encoding import PromptEncoder, greedy
from distlora.training.generator import Generator, aside, generate_all


class Sampler:
    """What the model writes after train.sample_prompts, greedily, while it is trained.

    Raises UserError, when it is built, for a prompt that is too long or that the chat template refuses.
    """

    def __init__(self, model: CausalLM, backend: Backend, config: Config, data: Mapping[str, Any]) -> None:
        """`data` is RUN/data.json, which says how the prompts of the training documents were written."""
        self._model, self._backend = model, backend
        self._prompts = config.train.sample_prompts
        self._encoder = PromptEncoder(model, config, data)
        self._encoded = [
            self._encoder.encode(Prompt(place=f"train.sample_prompts[{index}]", text=text))
            for index, text in enumerate(self._prompts)
        ]
        self._settings = greedy(self._encoder, config.model.path, config.train.sample_tokens)
        self._generator = Generator(model, backend)

    def __call__(self) -> list[tuple[str, str]]:
        """(prompt, completion) pairs. Every rank calls it at the same step; it leaves the model as it was."""
        with aside(self._model, self._backend):
            batches = list(generate_all(self._generator, self._encoded, self._settings))
        texts = [self._encoder.decode(completion) for batch in batches for completion in batch]
        return list(zip(self._prompts, texts, strict=True))
