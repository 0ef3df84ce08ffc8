"""Run a `distlora` command in a process of its own, show its output, and call callbacks for what its run writes.

Callbacks run in the calling process, from the records that rank 0 has written. So they can be closures, and they can
neither slow nor break training.
"""

import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from distlora.run_folder.layout import checkpoint_folders, step_of
from distlora_launcher.launch.bound import start_command
from distlora_launcher.report.records import NewMetrics
from distlora_launcher.terminal.output import show, warn

LOOK_SECONDS = 0.2
"""Interval between looks at the run folder. Output is shown at once."""
DRAIN_SECONDS = 5.0
"""Longest wait for output after the command has ended: a process that it left behind may hold the pipe open."""
STOP = "stop"
"""Return value of a callback that requests a save and a stop."""
ERROR = "error: "
"""Start of the message with which a command ends."""


class Command:
    """A `distlora` command in a process of its own, which saves and stops when the calling process ends."""

    def __init__(self, *arguments: str) -> None:
        self._process = start_command(
            "distlora_launcher.cli.main", *arguments, stops=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._lines: queue.SimpleQueue[tuple[Callable[[str], None], str]] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, write), daemon=True)
            for stream, write in ((self._process.stdout, show), (self._process.stderr, self._show_error))
        ]
        for reader in self._readers:
            reader.start()

    def wait(self, look: Callable[[], bool]) -> int:
        """Show the output and call `look` until the command has ended. Returns its exit code.

        `look` returns whether to request a save and a stop. The first Ctrl-C requests it too, and a second one kills
        the workers; KeyboardInterrupt is raised when the command has ended.
        """
        interrupted = stopping = ended = False
        try:
            while not ended:
                try:
                    ended = self._process.poll() is not None  # Before the last look.
                    self._show(LOOK_SECONDS, ended=ended)
                    if look() and not stopping:
                        stopping = True
                        self._process.send_signal(signal.SIGTERM)
                except KeyboardInterrupt:
                    interrupted = True
                    self._process.send_signal(signal.SIGINT)
        finally:
            if self._process.poll() is None:
                self._process.terminate()
            code = self._process.wait()
        if interrupted:
            raise KeyboardInterrupt
        return code

    @property
    def explanation(self) -> str:
        """The error with which the command ended, or the last lines on stderr."""
        starts = [index for index, line in enumerate(self._errors) if line.startswith(ERROR)]
        lines = self._errors[starts[-1] :] if starts else self._errors[-5:]
        return "".join(lines).strip().removeprefix(ERROR)

    def _read(self, stream: IO[bytes], write: Callable[[str], None]) -> None:
        for line in stream:
            self._lines.put((write, line.decode("utf-8", "replace")))

    def _show_error(self, line: str) -> None:
        self._errors.append(line)
        warn(line.rstrip("\n"))

    def _show(self, seconds: float, *, ended: bool) -> None:
        """Show what there is, after waiting at most `seconds` for it; all that is left if the command has ended."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while ended and any(reader.is_alive() for reader in self._readers) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            write, line = self._lines.get(timeout=0.0 if ended else seconds)
            while True:
                write(line)
                write, line = self._lines.get_nowait()
        except queue.Empty:
            pass


class RunFollower:
    """Calls callbacks for the steps, evaluations and saves of a run since this object was made, each once and in order.

    Steps that a restarted worker repeats are equal and are not reported again.
    """

    def __init__(self, run_dir: Path, callbacks: Sequence[Any]) -> None:
        """Begin. `callbacks`: objects with any of on_step, on_eval and on_save."""
        self._run_dir, self._callbacks = run_dir, list(callbacks)
        self._began = time.time()
        self._saved = {step_of(folder) for folder in checkpoint_folders(run_dir)}
        self._seen: set[tuple[int, bool]] = set()
        self._metrics = NewMetrics(run_dir)
        self._stops = False

    def look(self) -> bool:
        """Report what is new; return whether a callback has requested a stop."""
        if self._callbacks:
            folders = {step_of(folder): folder for folder in checkpoint_folders(self._run_dir)}
            new = [step for step in folders if step not in self._saved]  # Listed first, so that their steps are logged.
            self._saved.update(new)
            events: list[tuple[int, int, str, Any]] = [(step, 2, "on_save", folders[step]) for step in new]
            for record in self._metrics.look():
                step, is_eval, written = record["step"], "eval_loss" in record, record.get("time")
                # To a millisecond, as rank 0 rounds its times. Earlier lines are those of earlier starts.
                is_new = isinstance(written, (int, float)) and written >= self._began - 0.001
                if is_new and (step, is_eval) not in self._seen:
                    self._seen.add((step, is_eval))
                    events.append((step, int(is_eval), "on_eval" if is_eval else "on_step", record))
            for step, _, name, value in sorted(events, key=lambda event: event[:2]):
                if name != "on_save" or value.is_dir():  # train.keep may have deleted it by now.
                    self._call(name, step, value)
        return self._stops

    def _call(self, name: str, step: int, value: Path | Mapping[str, Any]) -> None:
        """Call a method of every callback. One that raises is reported with its traceback and not called again."""
        for callback in list(self._callbacks):
            try:
                answer = getattr(callback, name, lambda *_: None)(step, value)
            except Exception:
                self._callbacks.remove(callback)
                warn(
                    f"WARNING: {type(callback).__name__}.{name} failed after step {step}; the callback is not called "
                    f"again, and training continues\n{traceback.format_exc().rstrip()}"
                )
            else:
                self._stops |= isinstance(answer, str) and answer == STOP
