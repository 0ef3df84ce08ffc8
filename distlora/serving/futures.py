"""Calls that a client started and asks for later: their request ids, replies, and limits per user.

A request id is made of what the client counts (model and seq_id), so a call that it sends twice is done once. All
methods are called on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from distlora.config import UserError

log = logging.getLogger("distlora.serve")

KEEP_SECONDS = 600.0
"""How long a reply can be asked for again."""
KEEP_BYTES = 256_000_000
"""Bytes of replies that are kept; the oldest leave first, but none that nobody has asked for within `LEAST_SECONDS`."""
LEAST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The body of a call's result."""

    body: bytes
    media_type: str = "application/json"


def json_reply(**values: object) -> Reply:
    """Return a result in JSON."""
    return Reply(json.dumps(values).encode())


@dataclass(slots=True, eq=False)
class Call:
    """A call in flight, or its reply."""

    owner: str
    request_id: str
    fingerprint: bytes
    tokens: int
    done: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Reply | None = None
    ended: float = 0.0
    task: asyncio.Task[None] | None = None


class Calls:
    """All calls of a server."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.in_flight: Counter[str] = Counter()
        """Calls that wait or run, per user."""
        self.tokens: Counter[str] = Counter()
        """Tokens of those calls, per user."""
        self.bytes = 0

    def find(self, owner: str, request_id: str) -> Call | None:
        """Return a user's call; None if it is unknown, forgotten or another user's."""
        call = self.calls.get(request_id)
        return call if call is not None and call.owner == owner else None

    def start(self, call: Call, finish: Callable[[], Awaitable[Reply]]) -> Call:
        """Keep a call whose operations are submitted, and have `finish` wait for them and make its reply."""
        self.forget_old()
        self.calls[call.request_id] = call
        self.in_flight[call.owner] += 1
        self.tokens[call.owner] += call.tokens
        call.task = asyncio.get_running_loop().create_task(self._run(call, finish))
        return call

    async def _run(self, call: Call, finish: Callable[[], Awaitable[Reply]]) -> None:
        try:
            call.reply = await finish()
        except UserError as error:
            call.reply = json_reply(error=str(error), category="user")
        except Exception:
            log.exception("call failed request=%s user=%s", call.request_id, call.owner)
            call.reply = json_reply(error="the server failed in this call; its log has the reason", category="server")
        finally:
            self.in_flight[call.owner] -= 1
            self.tokens[call.owner] -= call.tokens
            call.ended = time.monotonic()
            call.done.set()
        self.bytes += len(call.reply.body)

    async def wait(self, call: Call, seconds: float) -> Reply | None:
        """Return the reply of a call, or None if it takes longer."""
        try:
            async with asyncio.timeout(seconds):
                await call.done.wait()
        except TimeoutError:
            return None
        return call.reply

    def forget_old(self) -> None:
        """Forget replies that are too old, and the oldest ones where there are too many."""
        now = time.monotonic()
        for request_id, call in list(self.calls.items()):
            if call.reply is None:
                continue
            age = now - call.ended
            if age < LEAST_SECONDS or (age < KEEP_SECONDS and self.bytes < KEEP_BYTES):
                break  # Calls behind it began later.
            self.bytes -= len(call.reply.body)
            del self.calls[request_id]

    async def drain(self, seconds: float) -> None:
        """Wait until no call is in flight, or the time is over."""
        tasks = [call.task for call in self.calls.values() if call.task is not None and not call.done.is_set()]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
