"""Prompts in a file, and the request of `distlora generate` to its worker.

Imports no torch: the command refuses a broken file, or a flag out of range, before anything is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError, require
from distlora.data.files import read_file
from distlora.data.formats import MEDIA_KEYS, check_chat
from distlora.data.image_records import COLUMNS, images_of, with_images
from distlora.data.json_values import kind_name, listed

_GOOD = 'a good line: {"prompt": "What is a list?"} or {"messages": [{"role": "user", "content": "What is a list?"}]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt: a text, or the messages of a conversation that the assistant is to answer, perhaps with images."""

    place: str
    """Place in the file, for messages to the user."""
    text: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def record(self) -> dict[str, Any]:
        """Return its part of a line of the result."""
        if self.text is not None:
            return {"prompt": self.text}
        messages = [message | {"content": _written(message.get("content"))} for message in self.messages]
        return {"messages": messages} | ({"tools": list(self.tools)} if self.tools else {})


def asked(place: str, messages: Sequence[dict[str, Any]], image: str | None) -> Prompt:
    """Return a conversation, with the file of an image before its first message of the user, or at its `<image>`."""
    if image is not None:
        messages = with_images({"messages": list(messages)}, {"image": image}, place, Path())["messages"]
    return Prompt(place=place, messages=tuple(messages))


def _written(content: Any) -> Any:
    """Return a content as JSON can hold it: without the bytes of images."""
    if not isinstance(content, list):
        return content
    return [part | {"image": "bytes"} if isinstance(part.get("image"), bytes) else part for part in content]


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file: lines of a text file, or {"prompt"} or {"messages"} of a jsonl file.

    Images are in parts of a content or in "images", as in data (docs/data.md); relative paths begin at the file's
    folder. Raises UserError for a file that is absent, empty or of another kind, and for a broken line.
    """
    require(path.suffix in (".txt", ".jsonl"), f"--prompts={path} ends in {path.suffix!r}; name a .txt or .jsonl file")
    require(path.is_file(), f"--prompts={path} is not a file; name a .txt or .jsonl file")
    try:
        records = list(read_file(path, _GOOD, "line"))
    except UserError as error:  # It begins with the file.
        raise UserError(f"--prompts={error}") from error
    require(bool(records), f"--prompts={path} holds no prompt; write one per line")
    if path.suffix == ".txt":
        return [Prompt(place=record.place, text=record.value["text"]) for record in records]
    return [_prompt(record.place, record.value, path.parent) for record in records]


def _prompt(place: str, value: Any, folder: Path) -> Prompt:
    require(isinstance(value, dict), f"{place} is {kind_name(value)}, not an object; {_GOOD}")
    keys = {"prompt", "messages"} & value.keys()
    require(bool(keys), f"{place} has neither 'prompt' nor 'messages' among its keys: {listed(value)}; {_GOOD}")
    require(len(keys) == 1, f"{place} has both 'prompt' and 'messages'; keep one of them")
    media = [key for key in sorted(MEDIA_KEYS.difference(COLUMNS)) if value.get(key)]
    require(not media, f"{place}: {', '.join(media)}: no model here reads video or audio; leave the key out")
    if "prompt" in value:
        text = value["prompt"]
        require(isinstance(text, str), f"{place}: 'prompt' is {kind_name(text)}, not a string; {_GOOD}")
        if not any(value.get(key) for key in COLUMNS):
            return Prompt(place=place, text=text)
        value = value | {"messages": [{"role": "user", "content": text}]}
    chat = check_chat(value, place, _GOOD)
    if images_of(chat["messages"]) or any(value.get(key) for key in COLUMNS):
        chat = with_images(chat, value, place, folder)
    last = chat["messages"][-1]["role"]
    require(last != "assistant", f"{place}: the last message is the assistant's own; end with what it is to answer")
    return Prompt(place=place, messages=tuple(chat["messages"]), tools=tuple(chat.get("tools", ())))


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """request.json, from the command to its worker.

    The docstring of a field is the help text of its argument; a field without one is no argument.
    """

    run: str
    """RUN: folder of a run."""
    # Folder of what was trained: an adapter in PEFT's format or a whole model, or a folder of checkpoints, whose newest
    # whole one is meant; null: the base alone.
    weights: str | None = None
    foreign: bool = False  # True if `weights` is an adapter of another run with its own rank, scale and targets.
    prompts: str | None = None
    """FILE: answer the prompts of a .txt file (one per line) or of a .jsonl file ({"prompt": TEXT} or {"messages":
    [...]}) and print one JSON line per prompt, with "completion", "tokens" and "ended"."""
    out: str | None = None
    """FILE: write the answers to --prompts to this new file instead of stdout."""
    max_new_tokens: int = 256
    """N: maximum length of an answer, in tokens."""
    temperature: float | None = None
    """T: sampling temperature; 0 takes the most likely token (default: from the model's generation_config.json, else
    0)."""
    top_p: float | None = None
    """P: sample among the most likely tokens whose probabilities sum to P (nucleus sampling)."""
    top_k: int | None = None
    """K: sample among the K most likely tokens."""
    seed: int = 0
    """S: sampling seed."""
    system: str | None = None
    """TEXT: system message for every conversation without one."""
    image: str | None = None
    """FILE: image before the first message of each conversation, for a run with data.images=true. Prompts of a .jsonl
    file name their own: "images": [FILE]."""
    # Through the chat template (--chat), as text to continue (--raw), or as the run was trained; a system message and
    # messages ask for the template themselves.
    as_chat: bool | None = None

    def __post_init__(self) -> None:
        tokens, temperature, top_p, top_k = self.max_new_tokens, self.temperature, self.top_p, self.top_k
        require(tokens > 0, f"--max-new-tokens={tokens} is not a valid number of tokens; write 1 or more")
        require(
            temperature is None or 0 <= temperature < math.inf,
            f"--temperature={temperature} must be 0 (the most likely token) or more; 0.7 is usual",
        )
        require(top_p is None or 0 < top_p <= 1, f"--top-p={top_p} must be above 0 and at most 1; 0.9 is usual")
        require(top_k is None or top_k > 0, f"--top-k={top_k} is not a valid number of tokens; write 1 or more")
        require(0 <= self.seed < 2**63, f"--seed={self.seed} must be from 0 to 2^63 - 1; write --seed 0")
        require(
            temperature != 0 or (top_p is None and top_k is None),
            "--temperature=0 takes the most likely token, so --top-p and --top-k have no effect; leave them out",
        )
        require(
            self.image is None or self.prompts is None,
            f"--image={self.image} belongs to a chat or to the lines of stdin, and each of --prompts names its own; "
            'leave --image out and write {"prompt": "What is this?", "images": ["cat.png"]}',
        )
        require(
            self.image is None or self.as_chat is not False,
            "--image is a part of a chat, and --raw continues prompts without one; leave one of them out",
        )
        require(
            self.as_chat is not False or self.system is None,
            "--system is a message of a chat, and --raw continues prompts without one; leave one of them out",
        )
