"""A process that computes rewards: `python -m distlora.rewards.worker`, started by `pool.py`.

It reads a line of JSON per request and writes one per reply. Whatever a function prints goes to stderr. First comes
the set-up (the settings as plain values), then requests {"number": n, "function": index, "arguments": {...}}; the
functions behind those of data.rewards are the environment or the tools. A reply is {"number": n, "value": x} or
{"number": n, reason: text}; the first one, to the set-up, has the number 0. One with "is_last" asks for another
process.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import os
import random
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distlora.config import DataConfig, UserError, require
from distlora.config.documents import BUILT_IN
from distlora.config.errors import in_one_line, short
from distlora.config.file import build
from distlora.rewards import sandbox
from distlora.rewards.built_in import reward_function
from distlora.system.atomic_io import sha256

_LONGEST, _LONGEST_TRACE = 400, 1200
_FAULTS = (Exception, SystemExit, KeyboardInterrupt)


def main() -> None:
    """Load the functions, then answer requests until the pipe is closed."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # A training process blocks the signals that ask it to stop.
    process, requests, replies = os.getpid(), os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(number: int, values: dict[str, Any]) -> None:
        replies.write(json.dumps({"number": number, **values}).encode() + b"\n")

    data = build(DataConfig, json.loads(requests.readline()))
    hard, limit = resource.getrlimit(resource.RLIMIT_DATA)[1], int(data.reward_memory_gb * 1e9)
    # Not of addresses: torch and CUDA reserve far more than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    sys.path.insert(0, data.reward_folder or os.getcwd())  # Behind no package: it is the user's own program.
    functions = []
    for name in (*data.reward_functions, *filter(None, [data.environment]), *data.tools):
        try:
            functions.append(reward_function(name, data) if name in BUILT_IN else load(name, data))
        except _FAULTS as error:
            text = str(error) if isinstance(error, UserError) else f"{name}: {described(error)}"
            reply(0, {"errors": text})
            return
    if "unit_tests" in data.rewards and (reason := sandbox.reason_against(data.rewards_isolation)) is not None:
        reply(0, {"errors": reason})
        return
    reply(0, {"value": None})
    for line in requests:
        request = json.loads(line)
        function, arguments = functions[request["function"]], request["arguments"]
        random.seed(line.partition(b",")[2])  # Without its number: an answer has the same reward in any order.
        if request["function"] < len(data.reward_functions):
            values = compute(function, arguments)
        else:
            values = converse(function, arguments) if data.environment is not None else call(function, arguments)
        if os.getpid() != process:  # The function forked, and its child came back too.
            os._exit(0)
        reply(request["number"], values)


def end_with_parent() -> None:
    """Fork a process that kills this one, and what it started, when the process that holds the pipe of requests dies.

    A function that hangs in C reads no end of a pipe, and the kernel's signal at a parent's death reaches no children.
    """
    if os.fork() == 0:
        os.close(1)  # Its reader must see when the worker itself ends.
        pipe = select.poll()
        pipe.register(0, 0)
        pipe.poll()
        os.killpg(0, signal.SIGKILL)


def load(name: str, data: DataConfig) -> Callable[..., Any]:
    """Return the function module.function. Raises AttributeError, ImportError, TypeError and what the module raises.

    Raises UserError if the module's file has changed since the run began.
    """
    module, _, attribute = name.rpartition(".")
    imported = importlib.import_module(module)
    if (began := data.reward_digests.get(module)) is not None:
        now = sha256(Path(imported.__file__ or os.devnull))
        require(
            now == began,
            f"{imported.__file__} has changed since the run began (SHA-256 {began[:12]} then, {now[:12]} now); restore "
            "it, or start a new run",
        )
    function: Callable[..., Any] = getattr(imported, attribute)
    if not callable(function):
        raise TypeError(f"{name} is not a function, but {short(function)}")
    return function


def compute(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request: a function's reward of one completion."""
    try:
        rewards = list(called(function, arguments))
    except _FAULTS as error:
        return fault(error)
    if len(rewards) != 1:
        return {"invalid": f"returned {len(rewards)} rewards for one completion; return a list of one number"}
    reward = rewards[0]
    if reward is None:
        return {"value": None}
    try:
        value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        return {"invalid": f"returned {short(reward)}, which is not a finite number"}
    return {"value": value}


def converse(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the environment's messages after a dialogue's last one, none where it ends, as the reply to a request.

    A new environment is told the dialogue from its beginning: any process can continue it, after a kill too.
    """
    columns = {name: values[0] for name, values in arguments.items() if name != "completion_ids"}
    prompt, dialogue = columns.pop("prompts"), columns.pop("completions")
    random.seed(json.dumps([prompt, columns], sort_keys=True))  # The answers of a group meet the same environment.
    replies: list[dict[str, Any]] = []
    try:
        environment = make()
        if called(environment.reset, {"prompt": prompt, **columns}) is not None:
            return {"invalid": "returned something from reset, which no model reads; write it into the prompts"}
        for place, message in enumerate(dialogue):
            if message["role"] != "assistant":
                continue
            value = called(environment.step, {}, message["content"])
            value = [] if value is None else value if isinstance(value, list) else [value]
            replies = [{"role": "user", "content": item} if isinstance(item, str) else item for item in value]
            for reply in replies:
                is_message = isinstance(reply, dict) and reply.get("role") in ("user", "system", "tool")
                if not is_message or not isinstance(reply.get("content"), str):
                    return {"invalid": f"returned {short(reply)} from step; return a text, messages or None"}
            before = dialogue[place + 1 : place + 1 + len(replies)]
            if place + 1 < len(dialogue) and before != replies:
                return {"invalid": f"replied {short(replies)} where it replied {short(before)} before; use no clock"}
    except _FAULTS as error:
        return fault(error)
    return {"value": replies}


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's result, as text, as the reply to a request."""
    try:
        value = called(function, arguments)
        return {"value": value if isinstance(value, str) else json.dumps(value)}
    except _FAULTS as error:
        return fault(error)


def called(function: Callable[..., Any], arguments: dict[str, Any], *values: Any) -> Any:
    """Return what a function returns, or what it has computed if it is async."""
    value = function(*values, **arguments)
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def fault(error: BaseException) -> dict[str, Any]:
    """Return the reply to a request whose function raised this."""
    trace = "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    reply = {"errors": f"{described(error)}\n{trace}"}
    # What filled the memory may be kept for ever: another process takes its place.
    return {**reply, "is_last": True} if isinstance(error, MemoryError) else reply


def described(error: BaseException) -> str:
    """Return an exception in one line: its type, its text, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, MemoryError):
        return f"needs more memory than data.reward_memory_gb allows{place}"
    return in_one_line(f"{type(error).__name__}: {error}"[:_LONGEST]) + place


if __name__ == "__main__":
    main()
