"""The processes of a cell, as their parent sees them: started, given turns, ended. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from distlora.bench.memory import anonymous_bytes
from distlora.bench.network import free_port

WORKER = "distlora.bench.step.worker"
PERIOD_SECONDS = 0.005
"""Between looks at the memory of the processes whose turn it is; the look itself is this process' own time."""
END_SECONDS = 20


class CellFailedError(Exception):
    """A process of a cell could not do its work; the message says why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What some steps took: on the slowest process, or on that which holds most."""

    seconds: list[float]
    """Of each step."""
    cpu_seconds: list[float]
    """Of each step, of all processes together."""
    losses: list[float]
    """Of each step, the mean over the processes."""
    peak: int
    """Most anonymous memory of a process; on a GPU the most that torch had allocated there."""
    moved: dict[str, int] | None
    """Bytes of a process' collectives, by kind, where they were counted."""
    device_left: int | None = None
    """Bytes that its GPU has left afterwards; None on a CPU."""


class Processes:
    """A cell that runs: a context manager, in which it waits for its turns."""

    def __init__(self, job: Mapping[str, Any], *, count: int, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        own = (
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)} if count > 1 else {}
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        with log.open("ab") as noise:
            for rank in range(count):
                of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", WORKER, json.dumps(job)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=noise,
                        bufsize=0,  # What a line's reader has read ahead, no selector sees.
                        env={**environment, **own, **of_rank},
                    )
                )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
        deadline = time.monotonic() + (END_SECONDS if kind is None else 0)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()

    def start(self) -> tuple[int, str]:
        """Wait until the model is there. Returns (anonymous bytes of a process after its imports, what was made of the
        model)."""
        imported = [answer["imported"] for answer in self._answers()]
        return min(imported), self._answers()[0]["ran"]

    def turn(self, steps: int, *, counts: bool = False) -> Turn:
        """So many steps. `counts`: their collectives, too."""
        with self._watched() as peaks:
            for process in self._processes:
                with contextlib.suppress(BrokenPipeError):  # `_answers` says why.
                    _pipe(process.stdin).write(json.dumps({"steps": steps, "count": counts}).encode() + b"\n")
            answers = self._answers()
        held = [answer["device_peak"] for answer in answers if answer["device_peak"] is not None]
        return Turn(
            seconds=_each(max, answers, "seconds"),
            cpu_seconds=_each(sum, answers, "cpu_seconds"),
            losses=[total / len(answers) for total in _each(sum, answers, "losses")],
            peak=max(held or peaks.values(), default=0),
            moved=answers[0]["moved"],
            device_left=min((answer["device_left"] for answer in answers if held), default=None),
        )

    def _answers(self) -> list[dict[str, Any]]:
        """The next line of each process. Raises CellFailedError as soon as one cannot give it."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(_pipe(process.stdout), selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                for key, _ in selector.select():
                    line = _pipe(self._processes[key.data].stdout).readline()
                    answer = json.loads(line) if line else {"failed": self._death(key.data)}
                    if "failed" in answer:
                        raise CellFailedError(answer["failed"])
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self._processes))]

    def _death(self, rank: int) -> str:
        code = self._processes[rank].wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"process {rank} ended with code {code}: {last[0] if last else 'without a word'}"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[int, int]]:
        """The most anonymous memory of each process meanwhile, by its id; nothing where the system does not say."""
        peaks: dict[int, int] = {}
        done = threading.Event()

        def watch() -> None:
            while True:
                for process in self._processes:
                    with contextlib.suppress(OSError, RuntimeError):
                        peaks[process.pid] = max(peaks.get(process.pid, 0), anonymous_bytes(process.pid))
                if done.wait(PERIOD_SECONDS):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield peaks
        finally:
            done.set()
            thread.join()


def _each(combine: Any, answers: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Of each step, over the processes."""
    return [combine(values) for values in zip(*(answer[name] for answer in answers), strict=True)]


def _pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None
    return end
