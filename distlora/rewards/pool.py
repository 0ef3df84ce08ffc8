"""Compute rewards in processes of their own, so that a function that hangs, raises or dies costs one answer.

A request is one reward of one answer, the environment's reply in one dialogue, or a call of a tool. The process of a
request that takes longer than `data.reward_timeout` is killed with all that it started, and another one takes its
place. Results are merged by position: they depend on time in no other way than by timeouts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distlora.config import DataConfig, UserError
from distlora.config.errors import short
from distlora.config.file import as_plain
from distlora.system.progress import say

START_SECONDS = 300.0
"""Time for a process to import the functions; a cold network file system takes minutes for torch."""
CODE_SECONDS = 30.0
"""Time that unit_tests and math get beyond data.reward_timeout, which they enforce by themselves."""
EXIT_SECONDS = 1.0
"""Time for a process to end that has closed its pipe."""
REASONS = ("timeouts", "errors", "invalid")
"""Causes for a missing reward: too slow; raised or ended its process; returned no finite number."""
_START = -1

Text = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardInput:
    """A sampled answer to score."""

    prompt: Text
    """The prompt: a text, or messages."""
    completion: Text
    """The answer: a text, or messages."""
    columns: Mapping[str, Any]
    """The record's columns, which functions get by name: plain values of JSON."""
    completion_ids: Sequence[int] = ()
    """The answer's tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Rewards of answers, and the number of those that are missing by reason."""

    values: list[list[float | None]]
    """Per answer, per reward: a finite number, or None where the reward does not apply or failed."""
    failed: list[bool]
    """Per answer: whether a reward of it failed."""
    counts: dict[str, int]
    """Failed rewards by name and reason: rewards/<name>/timeouts, rewards/<name>/errors, rewards/<name>/invalid."""


class _Request(NamedTuple):
    """Call of a function."""

    function: int
    """Number among data.reward_functions, the environment and the tools, in this order."""
    arguments: bytes
    """Keyword arguments as JSON."""
    seconds: float
    """Time limit."""


@dataclass(slots=True)
class _Worker:
    """A process, the request that it works on, and the bytes of it that are on their way."""

    process: subprocess.Popen[bytes]
    job: int | None
    """Number of the request among those of the call; `_START` while it loads the functions; None: it waits."""
    deadline: float
    outgoing: bytes
    incoming: bytes = b""
    number: int = 0
    """Number of the request."""
    is_lost: bool = False

    @property
    def pipes(self) -> tuple[int, int]:
        """File descriptors of its stdin and stdout."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin.fileno(), self.process.stdout.fileno()

    def ask(self, job: int, request: _Request) -> None:
        """Begin to send a request."""
        self.number += 1
        self.outgoing = b'{"number": %d, "function": %d, "arguments": %b}\n' % (self.number, *request[:2])
        self.job, self.incoming, self.deadline = job, b"", time.monotonic() + request.seconds

    def advance(self) -> dict[str, Any] | None:
        """Send and receive what the pipes take now. Return the reply once it is whole, or there will be none."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self.outgoing = self.outgoing[os.write(self.pipes[0], self.outgoing) :]
        chunk = None
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.pipes[1], 1 << 16)
        if chunk == b"":
            self.is_lost = True
            return {"errors": self._end()}
        self.incoming += chunk or b""
        if not self.incoming.endswith(b"\n"):
            return None
        try:
            reply: dict[str, Any] = json.loads(self.incoming)
            if reply.pop("number") == self.number:
                self.is_lost = reply.pop("is_last", False)
                return reply
        except (ValueError, KeyError, AttributeError):
            pass
        # A function wrote into the pipe: no later reply could be trusted.
        self.is_lost = True
        return {"errors": "wrote what is no reply into the pipe of replies"}

    def _end(self) -> str:
        """Describe how the process ended that closed its pipe."""
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed the pipe of replies"
        cause = f"with exit code {code}" if code >= 0 else f"by signal {-code} ({signal.strsignal(-code)})"
        return f"ended its process {cause}"

    def kill(self) -> None:
        """End the process and those of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:  # Closes the pipes, and waits.
            pass


@dataclass
class RewardPool:
    """The processes that compute the functions of `data.rewards`; as a context, they run within it.

    `log` gets a line per new fault.
    """

    data: DataConfig
    log: Callable[[str], None] = say
    moved: Callable[[], None] = lambda: None
    """Called every second while they work: each request has a time limit, so all end, after hours perhaps."""
    first_failure: str | None = None
    """The first failure, with its traceback if a function raised."""
    _workers: list[_Worker] = field(default_factory=list)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def __enter__(self) -> RewardPool:
        """Start the processes. Raises UserError if they cannot load a function."""
        try:
            self._workers = [self._start() for _ in range(self.data.reward_processes)]
            while any(worker.job is not None for worker in self._workers):
                self._replies()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def score(self, samples: Sequence[RewardInput]) -> Scores:
        """Return the rewards of answers. Raises UserError for a column that is no JSON."""
        names = self.data.reward_functions
        seconds = [self.data.reward_timeout + CODE_SECONDS * (name in ("unit_tests", "math")) for name in names]
        requests = [
            _Request(reward, arguments, seconds[reward])
            for arguments in map(self._arguments, samples)
            for reward in range(len(names))
        ]
        values: list[list[float | None]] = [[None] * len(names) for _ in samples]
        failed = [False] * len(samples)
        counts = {f"rewards/{name}/{reason}": 0 for name in names for reason in REASONS}
        for index, reply in enumerate(self._answered(requests)):
            sample, reward = divmod(index, len(names))
            if "value" in reply:
                values[sample][reward] = reply["value"]
                continue
            [(reason, text)] = reply.items()
            failed[sample] = True
            counts[f"rewards/{names[reward]}/{reason}"] += 1
            answer = f"the answer {short(samples[sample].completion)} to {short(samples[sample].prompt)}"
            self.leave_out(f"reward {names[reward]}", f"rewards/{names[reward]}/{reason}", text, answer)
        return Scores(values=values, failed=failed, counts=counts)

    def converse(self, dialogues: Sequence[RewardInput]) -> list[dict[str, Any]]:
        """Return the environment's reply to the last message of each dialogue.

        A reply is {"value": messages}, none of them where the dialogue ends, or {reason: text} of REASONS for a fault.
        """
        arguments = map(self._arguments, dialogues)
        requests = [_Request(len(self.data.reward_functions), text, self.data.reward_timeout) for text in arguments]
        replies = self._answered(requests)
        for reply, dialogue in zip(replies, dialogues, strict=True):
            if "value" not in reply:
                [(reason, text)] = reply.items()
                where = f"the dialogue about {short(dialogue.prompt)}"
                self.leave_out(f"data.environment={self.data.environment}", f"environment/{reason}", text, where)
        return replies

    def call(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
        """Return the results of calls (name of a tool without its module, arguments).

        A result is {"value": text} or {reason: text} of REASONS for a fault.
        """
        names = [name.rpartition(".")[2] for name in self.data.tools]
        first, seconds = len(self.data.reward_functions), self.data.reward_timeout
        requests = [(first + names.index(name), json.dumps(arguments).encode()) for name, arguments in calls]
        return self._answered([_Request(*request, seconds) for request in requests])

    def _answered(self, requests: Sequence[_Request]) -> list[dict[str, Any]]:
        """Return the replies to requests, in their order."""
        queue, replies = deque(enumerate(requests)), dict[int, dict[str, Any]]()
        while len(replies) < len(requests):
            for index, worker in enumerate(self._workers):
                if worker.job is None and worker.process.poll() is not None:  # Between two calls: no answer's fault.
                    worker.kill()
                    self._workers[index] = worker = self._start()
                if worker.job is None and queue:
                    worker.ask(*queue.popleft())
            replies.update(self._replies())
        return [replies[index] for index in range(len(requests))]

    def _start(self) -> _Worker:
        # In a session of its own: Ctrl-C reaches it through this process alone.
        process = subprocess.Popen(
            [sys.executable, "-m", "distlora.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # A file ./json.py must not shadow what it imports of ours.
            bufsize=0,
            start_new_session=True,
        )
        settings = json.dumps(as_plain(dataclasses.asdict(self.data))).encode() + b"\n"
        worker = _Worker(process, _START, time.monotonic() + START_SECONDS, settings)
        for pipe in worker.pipes:
            os.set_blocking(pipe, False)
        return worker

    def _replies(self) -> list[tuple[int, dict[str, Any]]]:
        """Wait for a pipe or a deadline. Return the replies to requests; replace the processes that are lost."""
        busy = [index for index, worker in enumerate(self._workers) if worker.job is not None]
        waiting = select.poll()
        for worker in (self._workers[index] for index in busy):
            waiting.register(worker.pipes[1], select.POLLIN)
            if worker.outgoing:
                waiting.register(worker.pipes[0], select.POLLOUT)
        first = min(self._workers[index].deadline for index in busy)
        waiting.poll(1000 * min(max(first - time.monotonic(), 0), 1.0) + 1)
        self.moved()
        replies = []
        for index in busy:
            worker = self._workers[index]
            reply, job = worker.advance(), worker.job
            assert job is not None
            if reply is None and time.monotonic() < worker.deadline:
                continue
            if job == _START and (reply is None or "errors" in reply):
                text = reply["errors"] if reply else f"took longer than {START_SECONDS:.0f} s"
                settings = f"data.rewards=[{','.join(self.data.rewards)}]" if self.data.rewards else ""
                settings += f" data.environment={self.data.environment}" if self.data.environment else ""
                settings += f" data.tools=[{','.join(self.data.tools)}]" if self.data.tools else ""
                raise UserError(f"{settings.strip()} cannot be loaded: {text}")
            worker.job = None
            if job != _START:
                seconds = f"took longer than data.reward_timeout={self.data.reward_timeout:g} seconds"
                replies.append((job, reply or {"timeouts": seconds}))
            if reply is None or worker.is_lost:
                worker.kill()
                self._workers[index] = self._start()
        return replies

    def _arguments(self, sample: RewardInput) -> bytes:
        """Return the keyword arguments of TRL's reward functions for one answer, as JSON: a list of one each."""
        columns = {**self.data.reward_constants, **sample.columns}
        columns = {name: [value] for name, value in columns.items() if name not in ("prompt", "completion")}
        own = {"prompts": [sample.prompt], "completions": [sample.completion]}
        try:
            return json.dumps({**columns, **own, "completion_ids": [list(sample.completion_ids)]}).encode()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"data.rewards: a record has a column that cannot be passed to another process ({error}); remove it "
                f"from the data, or write it as text ({', '.join(columns)})"
            ) from error

    def leave_out(self, function: str, metric: str, text: str, answer: str) -> None:
        """Log the first fault of its kind; keep the first of all for the error of a run that has no rewards."""
        self.log_once(function, metric, text, f"{answer} is left out")
        self.first_failure = self.first_failure or f"{function} {text}".rstrip()

    def log_once(self, function: str, metric: str, text: str, result: str) -> None:
        """Log the first fault of its kind, by the text up to a colon, and what follows of the fault."""
        text = text.partition("\n")[0]
        kind = (function, text.partition(":")[0])
        if kind not in self._logged:
            self._logged.add(kind)
            self.log(f"{function} {text}: {result} (counted in {metric}; logged once)")
