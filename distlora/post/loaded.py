"""Hold a trained model in the calling process, for Python: text and logits."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from distlora.config import UserError, require
from distlora.data.formats import check_chat
from distlora.data.image_records import refuse_images
from distlora.data.prompts import GenerateRequest, Prompt
from distlora.generation.prompts import PromptEncoder, sampling
from distlora.generation.writer import Writer
from distlora.parallel import Ranks
from distlora.post.load_trained import load_in_fp32, load_trained
from distlora.post.trained import Trained
from distlora.run_folder.layout import DATA_NAME, read_record

Message = dict[str, Any]
"""A message of a conversation: {"role": "user", "content": "..."}."""

_GOOD = '{"role": "user", "content": "What is a list?"}'


class LoadedModel:
    """A trained model on one device, with its base as in training."""

    def __init__(self, trained: Trained, *, device: str | None, dtype: Literal["bf16", "fp32"] | None) -> None:
        """Load the model. device: None for the first GPU, else the CPU. dtype: None as in training."""
        base = trained.base
        require(base.is_dir(), f"the run's base is missing: model.path={base} does not exist; put the model back there")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        ranks = Ranks(0, 1, self.device, None)
        with self._current_device():
            if dtype == "fp32" and trained.spec.dtype != "fp32":
                self.model, backend = load_in_fp32(trained, ranks)
            else:
                spec = replace(trained.spec, dtype=dtype or trained.spec.dtype)
                self.model, backend = load_trained(replace(trained, spec=spec), ranks)
        self._backend = backend
        self._base, self._compiled = trained.spec.model, trained.train.compile is not False
        assert trained.run_dir is not None, "a run's data say how prompts are written"
        self._data = read_record(trained.run_dir / DATA_NAME)
        self._encoders: dict[bool | None, PromptEncoder] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with the run's new tokens."""
        return self._encoder(None).tokenizer

    def generate(
        self,
        prompt: str | list[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        system: str | None = None,
        chat: bool | None = None,
    ) -> str:
        """Return the answer to a prompt: a text, or the messages of a conversation.

        It equals that of `distlora generate` with the same options. temperature, top_p, top_k: None for those of
        the model's generation_config.json, else the likeliest token each time. seed: of the sampling; torch's own
        random state is left alone. system: the system message of conversations without one. chat: True to apply the
        chat template, False to continue texts as they are, None as in training.

        Raises UserError for options out of range, and for a prompt that the template refuses or that is too long.
        """
        with in_python():
            request = GenerateRequest(
                run="",
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                system=system,
                as_chat=chat,
            )
            checked = _prompt(prompt)
            is_chat = system is not None or (chat is None and checked.text is None)
            encoder = self._encoder(True if is_chat else chat)
            tokens = encoder.encode(checked, system=system)
        settings = sampling(
            encoder,
            self._base.path,
            request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
        )
        writer = Writer(self.model, self._backend, encoder.tokenizer, compiled=self._compiled)
        with self._current_device():
            (completion,) = writer.complete([tokens], settings, seed=request.seed)
        return encoder.decode(completion.tokens)

    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return the logits (T, vocabulary) fp32 after each token of a text, or of token ids.

        A text is encoded as in training, without a chat template.
        """
        if isinstance(text, str):
            text = self._encoder(False).encode(Prompt(place="the text", text=text))
        require(len(text) > 0, "logits: the text has no tokens; give a text or a list of token ids")
        with self._current_device(), torch.no_grad():
            return self.model.logits(torch.tensor([list(text)], device=self.device))[0]

    def _encoder(self, as_chat: bool | None) -> PromptEncoder:
        if as_chat not in self._encoders:
            self._encoders[as_chat] = PromptEncoder(self.model, self._base, self._data, as_chat=as_chat)
        return self._encoders[as_chat]

    def _current_device(self) -> AbstractContextManager[Any]:
        """Make the model's GPU the current one, on which Triton starts its kernels."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _prompt(prompt: str | list[Message]) -> Prompt:
    """Return a text or a list of messages as a prompt. Raises UserError for anything else."""
    if isinstance(prompt, str):
        return Prompt(place="the prompt", text=prompt)
    messages = check_chat({"messages": prompt}, "the prompt", f"a good message: {_GOOD}")["messages"]
    refuse_images(messages, "the prompt", "write the prompt as text")
    is_open = messages[-1]["role"] != "assistant"
    require(is_open, "the prompt: the last message is the assistant's own; end with what it is to answer")
    return Prompt(place="the prompt", messages=tuple(messages))


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Raise UserErrors of the block with arguments of Python in place of flags: max_new_tokens for --max-new-tokens."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise UserError(*text.splitlines()) from error
