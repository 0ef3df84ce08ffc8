"""Write and read a pack's folder (distlora/training/multi_trial/protocol.py), and start the process that trains it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import Config
from distlora.config.json_files import object_or_empty
from distlora.run_folder.layout import PLAN_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED
from distlora.system import atomic_io
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    OUTCOMES,
    PACK_NAME,
    VERDICTS,
    inbox_file,
    outcome_file,
    verdict_file,
)
from distlora_launcher.launch.local import create_run
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.launch.run_state import read_ending
from distlora_launcher.sweeps.runner import environment, last_error, wait_until_free

MODULE = "distlora_launcher.sweeps.pack_process"


@dataclass(frozen=True, slots=True)
class Ended:
    """What PACK/outcomes says of a trial."""

    number: int
    state: str
    reason: str | None
    step: int | None
    seconds: float | None


class PackFolder:
    """A pack, from its first trial to its last."""

    def __init__(self, folder: Path, log: Path, config: Config, *, slots: int, verdicts: bool) -> None:
        """Make the folder. What a pack of a worker that was killed has left in it is taken away: the trials are whole
        in their own run folders, and other workers may have some of them by now."""
        self.folder, self._log, self.config = folder, log, config
        self.slots, self._verdicts = slots, verdicts
        self.closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._inside: set[int] = set()
        self._given: dict[int, Path] = {}
        """Run folders of those that are in the inbox."""
        self._later: dict[int, Path] = {}
        """Of those that a pack of one slot is given when it has an outcome of the one before."""
        wait_until_free(folder)
        for name in (INBOX, VERDICTS, OUTCOMES):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (CLOSED_NAME, CONFIG_NAME, PLAN_NAME):
            (folder / name).unlink(missing_ok=True)
        for name in (INBOX, VERDICTS, OUTCOMES):
            (folder / name).mkdir(parents=True)
        create_run(folder, config)

    def keep_plan(self, plan: Mapping[str, Any]) -> None:
        """What its workers hold their memory to."""
        atomic_io.write_json(self.folder / PLAN_NAME, plan)

    @property
    def inside(self) -> frozenset[int]:
        """Trials that were put in and have no outcome that was read."""
        return frozenset(self._inside)

    @property
    def given(self) -> list[int]:
        """Of those the ones that its process may take: of a pack of one slot the one that is in it."""
        return sorted(self._given)

    def put(self, number: int, run_dir: Path) -> None:
        """A trial that is prepared. A pack of one slot is given one after the other: the one that it has is known then,
        should it die."""
        self._inside.add(number)
        if self.slots == 1 and len(self._inside) > 1:
            self._later[number] = run_dir
        else:
            self._give(number, run_dir)

    def _give(self, number: int, run_dir: Path) -> None:
        atomic_io.write_json(inbox_file(self.folder, number), {"number": number, "run_dir": str(run_dir)})
        self._given[number] = run_dir

    def say(self, number: int, step: int, *, prune: bool) -> None:
        """The verdict on a trial's evaluation."""
        if self._verdicts:
            atomic_io.write_json(verdict_file(self.folder, number, step), {"prune": prune})

    def fail(self, number: int, reason: str) -> None:
        """Write the outcome of a trial that its pack did not live to write."""
        path = outcome_file(self.folder, number)
        if not path.exists():
            atomic_io.write_json(path, {"state": FAILED, "reason": reason, "step": None, "seconds": None})

    def close(self) -> None:
        """No more trials come."""
        self.closed = True
        self._say_closed()

    def _say_closed(self) -> None:
        """Once all trials are in the inbox: its process ends when they are done."""
        if self.closed and not self._later:
            atomic_io.write_text(self.folder / CLOSED_NAME, "")

    def outcomes(self) -> Iterator[Ended]:
        """Those that are new, in the order of their numbers."""
        for number in sorted(self._inside):
            path = outcome_file(self.folder, number)
            if not path.is_file():
                continue
            values = object_or_empty(path)
            if values.get("state") not in (COMPLETE, PRUNED, FAILED):
                values = {"state": FAILED, "reason": f"{path} is damaged, so what came of it is not known"}
            self._inside.remove(number)
            self._given.pop(number, None)
            if self._later and not self._given:
                following = min(self._later)
                self._give(following, self._later.pop(following))
                self._say_closed()
            yield Ended(
                number,
                values["state"],
                values.get("reason"),
                _whole(values.get("step")),
                _number(values.get("seconds")),
            )

    def start(self, slots: int) -> None:
        """Start its workers; a pack that has died goes on with what has no outcome."""
        self.slots = slots
        waiting = {**self._later, **self._given}
        self._given, self._later = {}, {}
        for number in sorted(waiting):
            if slots == 1 and self._given:
                self._later[number] = waiting[number]
                inbox_file(self.folder, number).unlink(missing_ok=True)
            else:
                self._give(number, waiting[number])
        (self.folder / CLOSED_NAME).unlink(missing_ok=True)
        self._say_closed()
        atomic_io.write_json(self.folder / PACK_NAME, {"slots": slots, "verdicts": self._verdicts})
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distlora_launcher.launch.bound", MODULE, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )

    @property
    def was_started(self) -> bool:
        return self._process is not None

    def ended(self) -> int | None:
        """The exit code of its process, once; None while it runs, or where none does."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        return code

    def why(self, code: int) -> str:
        """Why its process ended with `code`, in a sentence."""
        error = read_ending(self.folder).error
        if error is not None:
            return error.splitlines()[0]
        by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return last_error(self._log, self._log_start) or f"the launcher of its pack {by}"

    def ask_to_stop(self) -> None:
        """Have it save every trial and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
