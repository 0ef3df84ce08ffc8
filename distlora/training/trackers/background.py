"""Run a tracker's client in a thread of its own, so that no step waits for it."""

import importlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distlora.config import TrackerConfig
from distlora.system import atomic_io

MOST_PENDING = 100_000
"""Calls that may wait for a client. A network that hangs for days must not fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerStart:
    """Inputs of a client: the run that it begins or continues."""

    run_dir: Path
    tracker: TrackerConfig
    settings: Mapping[str, Any]
    """Settings of the run, nested, with the number of ranks and the plan."""
    start_step: int
    """Step after which this start continues; 0: from the beginning."""

    def parameters(self) -> dict[str, Any]:
        """Return the settings by dotted name, without the plan; lists as text."""
        return dict(_leaves({name: value for name, value in self.settings.items() if name != "planned"}))

    def stored_id(self, name: str) -> str | None:
        """Return the id of the tracker's run that an earlier start stored in RUN."""
        return read_id(id_path(self.run_dir, name))

    def store_id(self, name: str, run_id: str) -> None:
        """Store the id of the tracker's run, so that a resume continues it."""
        path = id_path(self.run_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_text(path, run_id + "\n")


class Receiver:
    """The calls that both a tracker and its client take."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, such as generated samples."""

    def result(self, folder: Path) -> None:
        """Upload the published folder, if the tracker keeps files; tracker.artifact is refused for the others."""

    def close(self, exit_code: int) -> None:
        """Report how the run ended, and flush."""


class Client(Receiver):
    """The client of one tracker, used by one thread."""

    place = ""
    """Where the run is logged, and the command that shows it; empty if the client prints it itself."""
    last_steps: Mapping[str, int] = MappingProxyType({})
    """Metric -> its last step in an earlier start, for clients that would show a repeated step twice; else empty."""


class Tracker(Receiver):
    """The calls that a run makes to each of its trackers; `close` only begins to flush."""

    name: str

    def summary(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log the final metrics, after `step` steps."""

    def wait(self, deadline: float) -> None:
        """Wait until everything is flushed, at most until `deadline` (of time.monotonic)."""

    def drop(self) -> None:
        """Continue the run without this tracker."""


class Background(Tracker):
    """A tracker whose client runs in a thread. Messages of the thread are printed at the run's next call."""

    def __init__(self, name: str, start: TrackerStart, say: Callable[[str], None]) -> None:
        self.name, self._say = name, say
        self._calls: queue.Queue[Callable[[Client], None] | None] = queue.Queue(MOST_PENDING)
        self._summary: dict[str, Any] = {}
        self._started, self._error = queue.SimpleQueue[str](), queue.SimpleQueue[Exception]()
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step that an earlier start has not logged."""

        def new(client: Client) -> None:
            fresh = {name: value for name, value in figures.items() if step > client.last_steps.get(name, -1)}
            if fresh:
                client.log(step, fresh)

        self._put(new)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        self._put(lambda client: client.log_table(step, name, columns, rows))

    def summary(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log the final numbers as metrics summary/NAME; lists of names are in RUN/summary.json only."""
        changed = {name: value for name, value in figures.items() if self._summary.get(name) != value}
        self._summary.update(changed)
        self.log(step, {f"summary/{name}": value for name, value in changed.items() if isinstance(value, (int, float))})

    def result(self, folder: Path) -> None:
        """Upload the published folder."""
        self._put(lambda client: client.result(folder))

    def close(self, exit_code: int) -> None:
        """Report how the run ended, behind all that waits."""
        self._put(lambda client: client.close(exit_code))
        self._put(None)

    def wait(self, deadline: float) -> None:
        """Wait until the thread has ended, at most until `deadline` (of time.monotonic)."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._say(f"WARNING: {self.name} did not finish in time; metrics.jsonl has all figures")
        self._tell()

    def _put(self, call: Callable[[Client], None] | None) -> None:
        self._tell()
        if self._calls.full():
            raise TimeoutError(f"{MOST_PENDING:,} calls wait for it")
        self._calls.put(call)

    def _tell(self) -> None:
        """Print where the run is logged, once; raise the thread's error."""
        if not self._started.empty():
            self._say(f"{self.name}: {self._started.get()}")
        if not self._error.empty():
            raise self._error.get()

    def _work(self, start: TrackerStart) -> None:
        try:
            module = importlib.import_module(f"distlora.training.trackers.{self.name}_run")
            client: Client = module.TrackerRun(start)
            if client.place:
                self._started.put(client.place)
            while (call := self._calls.get()) is not None:
                call(client)
        except BaseException as error:  # A client may raise SystemExit, which would end the thread in silence.
            self._error.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))


def id_path(run_dir: Path, name: str) -> Path:
    """Return the file in RUN with the id of a tracker's run."""
    return run_dir / name / "run_id.txt"


def read_id(path: Path) -> str | None:
    """Return the id in a file; None if there is no file or no valid id in it."""
    try:
        stored = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return stored if re.fullmatch(r"[\w-]{1,128}", stored, re.ASCII) else None


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) if isinstance(value, (list, tuple)) else value
