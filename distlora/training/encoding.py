"""How a run's model reads prompts and chooses tokens: chat template, token ids, what ends an answer, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, UserError
from distlora.data.chat import ChatTemplate, start_tokens
from distlora.data.prompts import Prompt
from distlora.model.build import CausalLM
from distlora.training.generator import Completion, context_limit

_WITHOUT_SAMPLING = ("repetition_penalty", "no_repeat_ngram_size")
_WITH_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""What of a model's generation_config.json counts where the user says nothing. The rest of it (lengths, beams, kinds of
caches) would change what a completion is or how it streams."""


class PromptEncoder:
    """Prompts to token ids, as a run's model was taught to read them: through the chat template that its chats were
    rendered with, or as text to continue where it was trained on no chats.

    `data` is RUN/data.json. as_chat=True asks for the template whatever was trained, False for text to continue.
    Raises UserError, when it is built, for a tokenizer that cannot be loaded or has no template that was asked for.
    """

    def __init__(
        self, model: CausalLM, config: Config, data: Mapping[str, Any], *, as_chat: bool | None = None
    ) -> None:
        folder = config.model.path
        self.tokenizer = load_tokenizer(Path(folder), config.model.new_tokens)
        self.template: ChatTemplate | None = None
        """None: prompts are continued as they are."""
        if data["chats"] if as_chat is None else as_chat:
            self.template = ChatTemplate(self.tokenizer, folder, source=data["chat_template"])
        self._limit = context_limit(model)
        self._stops = _as_set(model.decoder.config.eos_token_id)  # type: ignore[union-attr, arg-type]
        # What training puts in front of a text; not every special token that the tokenizer would add (an end).
        self._start = start_tokens(self.tokenizer)

    def encode(self, prompt: Prompt, *, system: str | None = None) -> list[int]:
        """Token ids up to where the model goes on. `system` is the first message, unless the prompt has one.

        Raises UserError for a prompt that the template refuses, and for one that leaves no room for an answer.
        """
        if self.template is not None:
            ids = self._tokenize(self._render(self.template, prompt, system))
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

    def _render(self, template: ChatTemplate, prompt: Prompt, system: str | None) -> str:
        messages = list(prompt.messages) if prompt.text is None else [{"role": "user", "content": prompt.text}]
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        template.check_tools(prompt.place, messages, prompt.tools)
        return template.render(prompt.place, messages, prompt.tools, prompt=True)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def stop_tokens(self, folder: str | Path) -> list[int]:
        """The tokens that end a completion: the ends of text of the tokenizer, of config.json and of
        generation_config.json, and what the chat template writes behind an assistant's turn.

        The last counts where a base was taught a template that its makers did not know.
        """
        stops = self._stops | {self.tokenizer.eos_token_id} | _as_set(_model_defaults(folder).eos_token_id)
        if self.template is not None:
            behind = self._tokenize(self.template.behind_answer())
            stops.update([token for token in behind if token in self.tokenizer.added_tokens_decoder][:1])
        return sorted(stops - {None})

    def decode(self, completion: Completion) -> str:
        """The text, with any special tokens in it: they may mark a call of a tool."""
        text = self.tokenizer.decode(completion.tokens)
        assert isinstance(text, str)
        return text


def greedy(encoder: PromptEncoder, folder: str | Path, max_new_tokens: int) -> GenerationConfig:
    """The likeliest token each time."""
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
    """What the model's generation_config.json says, changed by what is given; greedy where neither asks for more.

    temperature=0 is greedy; a temperature above 0, top_p and top_k each ask for sampling. A penalty for repetition that
    the model's file asks for holds in all cases.
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
    except (OSError, ValueError) as error:  # What transformers makes of a file that is not JSON.
        first = str(error).partition("\n")[0]
        raise UserError(f"{folder}/generation_config.json cannot be read ({first}); mend it or remove it") from error
