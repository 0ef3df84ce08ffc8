"""Run the worker of `distlora generate`: answer prompts from a file, from stdin or on a terminal.

It is one process or the ranks that the launcher started. Answers go to stdout or to the requested file, progress to
stderr.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import TextStreamer

from distlora.architecture.images import image_layout
from distlora.config import UserError, nearest
from distlora.config.file import load_config
from distlora.data.image_records import images_of
from distlora.data.images import ImageTensors
from distlora.data.prompts import GenerateRequest, Prompt, asked, read_prompts
from distlora.generation.prompts import PromptEncoder, sampling
from distlora.generation.writer import Completion, Writer
from distlora.parallel import Ranks
from distlora.post.load_trained import load_trained, require_whole_embedding, run_on_ranks
from distlora.post.trained import of_run
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.progress import PROGRESS_SECONDS, say, still

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


class Interruption:
    """Stops a completion on Ctrl-C, after the current token; a second Ctrl-C ends the program."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Chat:
    """Reads prompts from the terminal and answers them. Without a chat template, each prompt is continued by itself."""

    def __init__(
        self,
        writer: Writer,
        encoder: PromptEncoder,
        settings: GenerationConfig,
        *,
        system: str | None,
        image: str | None = None,
        seed: int = 0,
    ) -> None:
        self._writer, self._encoder, self._settings = writer, encoder, settings
        self._system, self._image, self._seeds = system, image, itertools.count(seed)
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
            self._stream(Prompt(place="the prompt", text=line))
            return
        messages = [*self._messages, {"role": "user", "content": line}]
        completion = self._stream(asked("the conversation (/reset starts again)", messages, self._image))
        self._messages = [*messages, {"role": "assistant", "content": self._encoder.decode(completion.tokens)}]

    def _stream(self, prompt: Prompt) -> Completion:
        """Print the completion of a prompt as it is generated, and why it ended if the model did not end it."""
        tokens, images = self._encoder.encode(prompt, system=self._system), self._encoder.images(prompt)
        with Interruption() as interruption:
            printer = Printer(self._encoder.tokenizer, self._settings)
            completion = self._writer.stream(
                tokens,
                self._settings,
                printer,
                seed=next(self._seeds),
                images=images,
                stopped=lambda: interruption.requested,
            )
        if interruption.requested:
            print("(stopped)")
        elif not completion.ended:
            print(f"(cut after {len(completion.tokens):,} tokens; --max-new-tokens allows more)")
        return completion


def run(request: GenerateRequest, ranks: Ranks) -> None:
    """Load the model and answer the prompts on this rank."""
    config = load_config(request.run)
    speaks = ranks.rank == 0
    began = time.monotonic()
    trained = of_run(config, request.weights, foreign=request.foreign)
    prompts = None if request.prompts is None else read_prompts(Path(request.prompts))
    has_images = request.image is not None or any(images_of(prompt.messages) for prompt in prompts or ())
    if has_images:
        require_whole_embedding(image_layout(config.spec.path), config.spec.path, ranks.world)
    trained = replace(trained, spec=replace(trained.spec, images=has_images))
    with still("loading") if speaks else contextlib.nullcontext():
        model, backend = load_trained(trained, ranks)
    data = read_record(Path(request.run) / DATA_NAME)
    holds_messages = any(prompt.text is None for prompt in prompts or ())
    asks_chat = request.system is not None or request.image is not None
    as_chat = True if asks_chat or (holds_messages and request.as_chat is None) else request.as_chat
    layout = model.image_layout
    image_tensors = None if layout is None else ImageTensors(config.spec.path, config.data, layout.names)
    encoder = PromptEncoder(model, config.model, data, as_chat=as_chat, image_tensors=image_tensors)
    choice = sampling(
        encoder,
        config.model.path,
        request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
    )
    if speaks:
        say(f"loaded in {time.monotonic() - began:.1f} s; {described(encoder, choice)}")
    writer = Writer(model, backend, encoder.tokenizer, compiled=config.train.compile is not False)
    if prompts is not None:
        answer_file(prompts, request, writer, encoder, choice, writes=speaks)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        Chat(writer, encoder, choice, system=request.system, image=request.image, seed=request.seed).run()
    else:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():  # As it comes, as text.
                place, text = f"line {number} of stdin", line.rstrip("\n")
                prompt = Prompt(place=place, text=text)
                if request.image is not None:
                    prompt = asked(place, [{"role": "user", "content": text}], request.image)
                tokens, seed = encoder.encode(prompt, system=request.system), request.seed + number - 1
                printer = Printer(encoder.tokenizer, choice)
                writer.stream(tokens, choice, printer, seed=seed, images=encoder.images(prompt))


def described(encoder: PromptEncoder, settings: GenerationConfig) -> str:
    """Return one line on how prompts are read and tokens are chosen."""
    prompts = "prompts are continued as text" if encoder.template is None else "prompts go through the chat template"
    choice = "the likeliest token each time"
    if settings.do_sample:
        names = ("temperature", "top_p", "top_k", "min_p", "typical_p")
        values = {name: getattr(settings, name) for name in names}
        shown = ", ".join(f"{name} {value}" for name, value in values.items() if value)
        choice = f"sampling ({shown or 'temperature 1'})"
    return f"{prompts}; {choice}; up to {settings.max_new_tokens:,} tokens"


def answer_file(
    prompts: list[Prompt],
    request: GenerateRequest,
    writer: Writer,
    encoder: PromptEncoder,
    settings: GenerationConfig,
    *,
    writes: bool,
) -> None:
    """Write one JSON line per prompt, in order, on the rank that `writes`.

    Its keys: the prompt, "completion", "tokens" (their number) and "ended" (false: cut at the limit).
    """
    encoded = [encoder.encode(prompt, system=request.system) for prompt in prompts]
    images = map(encoder.images, prompts) if any(images_of(prompt.messages) for prompt in prompts) else None
    complete = functools.partial(writer.complete, encoded, settings, seed=request.seed, images=images)
    if not writes:
        complete()
        return
    began = shown = time.monotonic()
    num_tokens, written, waiting = 0, 0, dict[int, Completion]()
    stdout = contextlib.nullcontext(sys.stdout)
    with stdout if request.out is None else Path(request.out).open("x", encoding="utf-8") as result:

        def done(index: int, completion: Completion) -> None:
            nonlocal shown, num_tokens, written
            if index < written or index in waiting:
                return
            waiting[index] = completion
            num_tokens += len(completion.tokens)
            while written in waiting:
                completion = waiting.pop(written)
                line = prompts[written].record() | {
                    "completion": encoder.decode(completion.tokens),
                    "tokens": len(completion.tokens),
                    "ended": completion.ended,
                }
                result.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
            result.flush()
            now = time.monotonic()
            if now - shown >= PROGRESS_SECONDS or written == len(prompts):
                shown = now
                rate = num_tokens / (now - began)
                say(f"{written + len(waiting):,}/{len(prompts):,} prompts  {rate:,.0f} tokens/s")

        for index, completion in enumerate(complete(on_done=done)):
            done(index, completion)  # Those of other ranks.


def main(request: GenerateRequest) -> int:
    """Answer prompts; return the exit code. Errors of several ranks go to the launcher."""
    return run_on_ranks(
        lambda ranks: run(request, ranks),
        when_memory_is_out="shard the model over several GPUs with --processes N, or reduce the number of tokens",
    )
