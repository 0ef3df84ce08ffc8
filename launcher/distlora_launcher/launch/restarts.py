"""The workers that torchrun has started on this machine: who they are, what they died of, whether they start again.

torchrun starts the whole group again when a worker dies, without a word; this looks at what it and the workers leave
behind, says what happened, and finds the failures that no further attempt would mend.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from distlora.run_folder.checkpoints import step_of
from distlora.run_folder.layout import checkpoint_folders
from distlora.system import atomic_io
from distlora.system.stop_signals import STOPPED_NAME, name_of
from distlora_launcher.launch.failures import (
    GAVE_UP,
    Exit,
    Failure,
    exits_in,
    first_failure,
    read_errors,
    read_gave_up,
    write_killed,
)
from distlora_launcher.launch.logs import host_name
from distlora_launcher.launch.rendezvous import Meeting
from distlora_launcher.terminal.output import warn

_LOOK_SECONDS = 0.5
"""Between looks at the error files: the folder may be on a network."""


class Attempts:
    """What is known of the workers of one start, here."""

    def __init__(
        self,
        run_dir: Path,
        pid_dir: Path,
        torchrun_log: Path,
        torchrun: int,
        *,
        processes: int,
        max_restarts: int,
        meeting: Meeting | None,
    ) -> None:
        self.run_dir, self.log_dir, self.pid_dir, self.torchrun_log = run_dir, run_dir / "logs", pid_dir, torchrun_log
        self.torchrun, self.processes, self.max_restarts, self.meeting = torchrun, processes, max_restarts, meeting
        self.restarts = 0
        """How often torchrun here has started the workers again because one failed."""
        self.pids: dict[int, int] = {}
        """By rank, of the newest attempt."""
        self._rank_of: dict[int, int] = {}
        """By pid, of all attempts."""
        self._earlier: set[int] = set()
        """Pids of earlier attempts."""
        self._request: int | None = None
        self._log_size = 0
        self._exits: list[Exit] = []
        self.restarting = False
        """Whether the newest attempt has ended, that was told, and the workers of the next are still to come."""
        self._looked = 0.0
        self._told_ranks: list[int] = []
        # Not of this start: a machine that joins late, or one beside which another died, finds them.
        self._stale_end = identity(self.log_dir / GAVE_UP)
        self._stale = {path: identity(path) for path, _ in read_errors(self.log_dir)}

    def request_stop(self, signum: int) -> None:
        """Ask every worker to stop, and those that are yet to come."""
        self._request = signum
        for pid in self._present().values():
            self._signal(pid, signum)

    def look(self) -> Failure | None:
        """See what has changed; a failure that a further attempt would meet again, if that is what happened."""
        self._find_workers()
        return self._read_log() or self._read_errors()

    def failure(self) -> Failure | None:
        """What the newest attempt failed of, where that is known."""
        exits = {exit.rank: exit for exit in reversed(self._exits) if exit.pid not in self._earlier}
        exits = dict(reversed(exits.items()))
        return first_failure(self.log_dir, exits, self._errors())

    def all_done(self) -> bool:
        """Whether every worker here has said that its work ended well."""
        done = {int(path.stem.removeprefix("rank_")) for path in self.pid_dir.glob("rank_*.done")}
        return len(self.pids) == self.processes and done == set(self.pids)

    def told(self) -> str:
        """What to add to the message of the last failure: how often it was tried."""
        if self.restarts == 0:
            return ""
        times = "once" if self.restarts == 1 else f"{self.restarts} times"
        return f"\nthe workers were started again {times} (cluster.max_restarts={self.max_restarts})"

    def cannot_answer(self) -> bool:
        """Whether workers were asked to stop and none is here that could: those of one attempt have ended, and those of
        the next wait for other machines, or have not come yet. What an attempt failed of for good, torchrun ends by.
        """
        if self._request is None or self.all_done():
            return False
        newest = set(self.pids.values()) - self._earlier
        if not self.restarting and any(exit.pid in newest for exit in self._exits):
            return False
        return not any(_parent(pid) in (self.torchrun, None) for pid in self._present().values())

    def leave_stopped(self) -> Failure:
        """Leave RUN/stopped.json for workers that could not; returns what to tell."""
        assert self._request is not None
        saved = checkpoint_folders(self.run_dir)
        record = {
            "step": step_of(saved[-1]) if saved else 0,
            "checkpoint": str(saved[-1].relative_to(self.run_dir)) if saved else None,
            "signal": name_of(self._request),
            "time": round(time.time(), 3),
        }
        with contextlib.suppress(OSError):  # A full disk: status then does not know, and nothing else depends on it.
            atomic_io.write_json(self.run_dir / STOPPED_NAME, record)
        state = f"{saved[-1].name} is saved" if saved else "nothing is saved yet"
        by = name_of(self._request)
        return Failure(f"asked to stop by {by} while no workers ran on {host_name()}: {state}", "", stopped=True)

    def _present(self) -> dict[int, int]:
        """Pids by rank, as the workers left them."""
        found = {}
        for path in self.pid_dir.glob("rank_*.pid"):
            try:
                pid = int(path.read_text())
            except FileNotFoundError:  # Done meanwhile.
                continue
            if pid not in self._earlier:
                found[int(path.stem.removeprefix("rank_"))] = pid
        return found

    def _find_workers(self) -> None:
        new = {rank: pid for rank, pid in self._present().items() if self.pids.get(rank) != pid}
        if not new:
            return
        if len(self.pids) == self.processes or any(rank in self.pids for rank in new):
            self._earlier |= set(self.pids.values())
            self.pids = {}
            if not self.restarting:
                warn(f"the group of workers has changed; starting again {self._since()}")
            self.restarting = False
        self.pids |= new
        self._rank_of |= {pid: rank for rank, pid in new.items()}
        if self._request is not None:
            for pid in new.values():
                self._signal(pid, self._request)
        if self.meeting is not None and len(self.pids) == self.processes:
            self._tell_ranks()

    def _tell_ranks(self) -> None:
        """Which ranks are here, once a place is known for them: the machine with rank 0 shows what that writes."""
        ranks = sorted(self.pids)
        if ranks == self._told_ranks:
            return
        self._told_ranks = ranks
        here = f"rank {ranks[0]} runs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} run"
        elsewhere = "" if 0 in ranks else f"; progress is shown where rank 0 is, and in {self.log_dir / 'rank_0.log'}"
        warn(f"{here} on {host_name()}{elsewhere}")

    def _read_log(self) -> Failure | None:
        """What torchrun says of workers that failed."""
        size = self.torchrun_log.stat().st_size
        if size == self._log_size:
            return None
        self._log_size = size
        known = {exit.pid for exit in self._exits}
        self._exits = exits_in(self.torchrun_log.read_text(errors="replace"), self._rank_of)
        if all(exit.pid in known or exit.pid in self._earlier for exit in self._exits):
            return None
        failure = self.failure()
        assert failure is not None
        if failure.killed_rank is not None:
            write_killed(self.log_dir, failure, time.time())
        if failure.repeats:
            return failure
        if self.restarts < self.max_restarts and not self.restarting:
            self.restarts += 1
            self.restarting = True
            warn(f"{failure.short}; restart {self.restarts} of {self.max_restarts}, {self._since()}")
        return None

    def _read_errors(self) -> Failure | None:
        """A failure that ends the run, on any machine: one that would repeat, whose rank need not have ended yet, or
        one after which a machine gave up.
        """
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        errors = self._errors()
        failure = first_failure(self.log_dir, {}, errors) if errors else None
        if failure is not None and failure.repeats:
            return failure
        if self.meeting is not None and identity(self.log_dir / GAVE_UP) not in (None, self._stale_end):
            return read_gave_up(self.log_dir)
        return None

    def _errors(self) -> list[dict[str, Any]]:
        errors = [error for path, error in read_errors(self.log_dir) if self._stale.get(path) != identity(path)]
        # Those that the disk of the logs did not take are beside the pids.
        return [*errors, *(error for _, error in read_errors(self.pid_dir))]

    def _since(self) -> str:
        saved = checkpoint_folders(self.run_dir)
        return f"from {saved[-1].name}" if saved else "from the beginning, as nothing was saved yet"

    def _signal(self, pid: int, signum: int) -> None:
        if _parent(pid) not in (self.torchrun, None):
            return  # It has ended, and its number may be another process's by now.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _parent(pid: int) -> int | None:
    """The parent of a process; 0 for one that has ended, None where the system has no /proc."""
    if sys.platform != "linux":
        return None
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def identity(path: Path) -> tuple[int, int] | None:
    """Tells a file from one that took its place; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
