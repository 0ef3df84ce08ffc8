"""Run the worker of `distlora generate`: answer prompts from a file, from stdin or on a terminal.

It is one process or the ranks that torchrun started. Answers go to stdout or to the requested file, progress to stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from transformers import GenerationConfig

from distlora.config.file import load_config
from distlora.data.prompts import GenerateRequest, Prompt, read_prompts
from distlora.parallel import Ranks
from distlora.post.chat import Chat, Printer
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.post.workers import run_on_ranks
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.progress import PROGRESS_SECONDS, quieten, say, still_loading
from distlora.training.generator import Generator, PromptEncoder, generate, generate_all, sampling


def run(request: GenerateRequest, ranks: Ranks) -> None:
    """Load the model and answer the prompts on this rank."""
    config = load_config(request.run)
    speaks = ranks.rank == 0
    began = time.monotonic()
    with still_loading() if speaks else contextlib.nullcontext():
        model, backend = load_trained(of_run(config, request.weights, foreign=request.foreign), ranks)
    data = read_record(Path(request.run) / DATA_NAME)
    prompts = None if request.prompts is None else read_prompts(Path(request.prompts))
    holds_messages = any(prompt.text is None for prompt in prompts or ())
    as_chat = True if request.system is not None or (holds_messages and request.as_chat is None) else request.as_chat
    encoder = PromptEncoder(model, config.model, data, as_chat=as_chat)
    choice = sampling(
        encoder,
        config.model.path,
        request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
    )
    torch.manual_seed(request.seed)
    if speaks:
        say(f"loaded in {time.monotonic() - began:.1f} s; {described(encoder, choice)}")
    generator = Generator(model, backend)
    if prompts is not None:
        answer_file(prompts, request, generator, encoder, choice)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        Chat(generator, encoder, choice, system=request.system).run()
    else:
        answer_lines(sys.stdin, generator, encoder, choice, system=request.system)


def described(encoder: PromptEncoder, settings: GenerationConfig) -> str:
    """Return one line on how prompts are read and tokens are chosen."""
    prompts = (
        "prompts go through the chat template" if encoder.template is not None else "prompts are continued as text"
    )
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
    generator: Generator,
    encoder: PromptEncoder,
    settings: GenerationConfig,
) -> None:
    """Write one JSON line per prompt, in order.

    Its keys: the prompt, "completion", "tokens" (their number) and "ended" (false: cut at the limit).
    """
    encoded = [encoder.encode(prompt, system=request.system) for prompt in prompts]
    if not generator.backend.writes:
        for _ in generate_all(generator, encoded, settings):
            pass
        return
    began = shown = time.monotonic()
    done = num_tokens = 0
    with open_result(request.out) as result:
        for completions in generate_all(generator, encoded, settings):
            for prompt, completion in zip(prompts[done:], completions, strict=False):
                line = prompt.record() | {
                    "completion": encoder.decode(completion),
                    "tokens": len(completion.tokens),
                    "ended": completion.ended,
                }
                result.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_tokens += len(completion.tokens)
            result.flush()
            done += len(completions)
            now = time.monotonic()
            if now - shown >= PROGRESS_SECONDS or done == len(prompts):
                shown = now
                say(f"{done:,}/{len(prompts):,} prompts  {num_tokens / (now - began):,.0f} tokens/s")


@contextlib.contextmanager
def open_result(out: str | None) -> Iterator[TextIO]:
    """Open a new file, or yield stdout."""
    if out is None:
        yield sys.stdout
        return
    with Path(out).open("x", encoding="utf-8") as file:
        yield file


def answer_lines(
    lines: TextIO, generator: Generator, encoder: PromptEncoder, settings: GenerationConfig, *, system: str | None
) -> None:
    """Answer each line as it comes, as text; skip blank lines."""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\n")
        if text.strip():
            prompt = Prompt(place=f"line {number} of stdin", text=text)
            tokens = encoder.encode(prompt, system=system)
            generate(generator, [tokens], settings, streamer=Printer(encoder.tokenizer, settings))


def main(request: GenerateRequest) -> int:
    """Answer prompts; return the exit code. Errors of several ranks go to torchrun."""
    quieten()
    return run_on_ranks(
        lambda ranks: run(request, ranks),
        when_memory_is_out="share the model among several GPUs with --processes N, or ask for fewer tokens",
    )
