"""Chat on a terminal: answers stream, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextStreamer

from distlora.config import UserError, nearest
from distlora.data.prompts import Prompt
from distlora.training.generator import Completion, Generator, PromptEncoder, generate

COMMANDS = ("/help", "/reset", "/system", "/exit")
HELP = "/reset starts again, /system TEXT sets the system message, Ctrl-C stops an answer, Ctrl-D or /exit leaves"
_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)


class Printer(TextStreamer):
    """Writes a completion to stdout as it grows, without the token that ends it."""

    def __init__(self, tokenizer: Any, settings: GenerationConfig) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._stops = settings.eos_token_id or []

    def put(self, value: Tensor) -> None:
        """Print new tokens, without the prompt and the end tokens."""
        if self.next_tokens_are_prompt or int(value[-1]) not in self._stops:
            super().put(value)


class Interruption(StoppingCriteria):
    """A stopping criterion that ends a completion after the current token."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return (B,) bool, True for every row after an interruption."""
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Stop the completion on Ctrl-C; a second Ctrl-C ends the program."""
    interruption = Interruption()

    def ask(_signum: int, _frame: FrameType | None) -> None:
        if interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """Reads prompts from the terminal and answers them. Without a chat template, each prompt is continued by itself."""

    def __init__(
        self, generator: Generator, encoder: PromptEncoder, settings: GenerationConfig, *, system: str | None
    ) -> None:
        self._generator, self._encoder, self._settings = generator, encoder, settings
        self._system = system
        self._messages: list[dict[str, Any]] = []

    def run(self) -> None:
        """Run until /exit or the end of the input."""
        with contextlib.suppress(ImportError):
            # readline gives input() an editable line and a history.
            import readline  # noqa: F401
        print(HELP)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            try:
                self._react(line)
            except UserError as error:
                print(f"error: {error}")

    def _react(self, line: str) -> None:
        """Act on one line of input."""
        command = _COMMAND.fullmatch(line)
        if command is None:
            if line:
                self._answer(line)
            return
        name, rest = command[1], command[2]
        if name == "/help":
            print(HELP)
        elif name == "/reset" and not rest:
            self._messages.clear()
            print("(a new conversation)")
        elif name == "/system":
            if self._encoder.template is None:
                raise UserError("/system needs a chat template, and the model has none; begin your text with it")
            self._system = rest
            self._messages.clear()
            print(f"(a new conversation, {'with this system message' if rest else 'without a system message'})")
        else:
            raise UserError(
                f"there is no {line.split()[0]}{nearest(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}"
            )

    def _answer(self, line: str) -> None:
        if self._encoder.template is None:
            self._stream(self._encoder.encode(Prompt(place="the prompt", text=line)))
            return
        messages = [*self._messages, {"role": "user", "content": line}]
        conversation = Prompt(place="the conversation (/reset starts again)", messages=tuple(messages))
        completion = self._stream(self._encoder.encode(conversation, system=self._system))
        self._messages = [*messages, {"role": "assistant", "content": self._encoder.decode(completion)}]

    def _stream(self, tokens: list[int]) -> Completion:
        """Print the completion of a prompt as it is generated, and why it ended if the model did not end it."""
        with interruptible() as interruption:
            (completion,) = generate(
                self._generator,
                [tokens],
                self._settings,
                streamer=Printer(self._encoder.tokenizer, self._settings),
                stopping=StoppingCriteriaList([interruption]),
            )
        if interruption.asked:
            print("(stopped)")
        elif not completion.ended:
            print(f"(cut after {len(completion.tokens):,} tokens; --max-new-tokens allows more)")
        return completion
