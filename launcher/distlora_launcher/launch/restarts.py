"""The workers that torchrun started on this node: their pids, why they failed, and whether they are restarted.

torchrun restarts the whole group silently when a worker dies. `WorkerMonitor` reads the files of torchrun and the
workers, prints what happened, and finds the failures that a restart would meet again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from distlora.run_folder.checkpoint_manifest import step_of
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
from distlora_launcher.launch.processes import host_name
from distlora_launcher.launch.rendezvous import Rendezvous
from distlora_launcher.terminal.output import warn

_LOOK_SECONDS = 0.5
"""Interval between looks at the error files: the folder may be on a network."""


class WorkerMonitor:
    """The workers of one start on this node."""

    def __init__(
        self,
        run_dir: Path,
        pid_dir: Path,
        torchrun_log: Path,
        torchrun_pid: int,
        *,
        processes: int,
        max_restarts: int,
        rendezvous: Rendezvous | None,
    ) -> None:
        self.run_dir, self.log_dir, self.pid_dir, self.torchrun_log = run_dir, run_dir / "logs", pid_dir, torchrun_log
        self.torchrun_pid, self.processes, self.max_restarts = torchrun_pid, processes, max_restarts
        self.rendezvous = rendezvous
        self.restarts = 0
        """Number of restarts because a worker of this node failed."""
        self.pids: dict[int, int] = {}
        """Pid by rank, of the newest attempt."""
        self._rank_of: dict[int, int] = {}
        """Rank by pid, of all attempts."""
        self._earlier: set[int] = set()
        """Pids of earlier attempts."""
        self._request: int | None = None
        self._log_size = 0
        self._exits: list[Exit] = []
        self.restarting = False
        """Whether the failure of the newest attempt is printed and the next workers have not come yet."""
        self._looked = 0.0
        self._printed_ranks: list[int] = []
        # Files of an earlier start, which a node that joins late finds.
        self._stale_gave_up = file_identity(self.log_dir / GAVE_UP)
        self._stale = {path: file_identity(path) for path, _ in read_errors(self.log_dir)}

    def request_stop(self, signum: int) -> None:
        """Send a request to stop to every worker, and to those that are still to come."""
        self._request = signum
        for pid in self._present().values():
            self._signal(pid, signum)

    def look(self) -> Failure | None:
        """Read what has changed; return a failure that a restart would meet again, if there is one."""
        self._find_workers()
        return self._read_log() or self._read_errors()

    def failure(self) -> Failure | None:
        """Return why the newest attempt failed, if that is known."""
        exits = {exit.rank: exit for exit in reversed(self._exits) if exit.pid not in self._earlier}
        exits = dict(reversed(exits.items()))
        return first_failure(self.log_dir, exits, self._errors())

    def all_done(self) -> bool:
        """Return whether every worker of this node has reported that its work ended well."""
        done = {int(path.stem.removeprefix("rank_")) for path in self.pid_dir.glob("rank_*.done")}
        return len(self.pids) == self.processes and done == set(self.pids)

    def restarts_text(self) -> str:
        """Return a line for the last failure's message: how often the workers were restarted."""
        if self.restarts == 0:
            return ""
        times = "once" if self.restarts == 1 else f"{self.restarts} times"
        return f"\nthe workers were restarted {times} (cluster.max_restarts={self.max_restarts})"

    def cannot_answer(self) -> bool:
        """Return whether a stop was requested and no worker of this node is left to answer it.

        So it is while torchrun waits for other nodes, or before the workers of the next attempt have come.
        """
        if self._request is None or self.all_done():
            return False
        newest = set(self.pids.values()) - self._earlier
        if not self.restarting and any(exit.pid in newest for exit in self._exits):
            return False
        return not any(_parent(pid) in (self.torchrun_pid, None) for pid in self._present().values())

    def leave_stopped(self) -> Failure:
        """Write RUN/stopped.json in place of the workers; return the message."""
        assert self._request is not None
        saved = checkpoint_folders(self.run_dir)
        record = {
            "step": step_of(saved[-1]) if saved else 0,
            "checkpoint": str(saved[-1].relative_to(self.run_dir)) if saved else None,
            "signal": name_of(self._request),
            "time": round(time.time(), 3),
        }
        with contextlib.suppress(OSError):  # On a full disk only `distlora status` lacks it.
            atomic_io.write_json(self.run_dir / STOPPED_NAME, record)
        state = f"{saved[-1].name} is saved" if saved else "nothing is saved yet"
        by = name_of(self._request)
        return Failure(f"stopped by {by} while no workers ran on {host_name()}: {state}", "", stopped=True)

    def _present(self) -> dict[int, int]:
        """Return pid by rank, as the workers wrote them."""
        pids = {}
        for path in self.pid_dir.glob("rank_*.pid"):
            try:
                pid = int(path.read_text())
            except FileNotFoundError:  # The worker has just ended.
                continue
            if pid not in self._earlier:
                pids[int(path.stem.removeprefix("rank_"))] = pid
        return pids

    def _find_workers(self) -> None:
        new = {rank: pid for rank, pid in self._present().items() if self.pids.get(rank) != pid}
        if not new:
            return
        if len(self.pids) == self.processes or any(rank in self.pids for rank in new):
            self._earlier |= set(self.pids.values())
            self.pids = {}
            if not self.restarting:
                warn(f"the nodes of the run have changed; restarting {self._resume_point()}")
            self.restarting = False
        self.pids |= new
        self._rank_of |= {pid: rank for rank, pid in new.items()}
        if self._request is not None:
            for pid in new.values():
                self._signal(pid, self._request)
        if self.rendezvous is not None and len(self.pids) == self.processes:
            self._print_ranks()

    def _print_ranks(self) -> None:
        """Print this node's ranks once they change: the node with rank 0 shows the progress."""
        ranks = sorted(self.pids)
        if ranks == self._printed_ranks:
            return
        self._printed_ranks = ranks
        here = f"rank {ranks[0]} runs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} run"
        elsewhere = "" if 0 in ranks else f"; progress is shown on rank 0's node and in {self.log_dir / 'rank_0.log'}"
        warn(f"{here} on {host_name()}{elsewhere}")

    def _read_log(self) -> Failure | None:
        """Read torchrun's log for workers that failed."""
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
            warn(f"{failure.short}; restart {self.restarts} of {self.max_restarts}, {self._resume_point()}")
        return None

    def _read_errors(self) -> Failure | None:
        """Return a failure of any node that ends the run: a restart would repeat it, or the node gave up."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        errors = self._errors()
        failure = first_failure(self.log_dir, {}, errors) if errors else None
        if failure is not None and failure.repeats:
            return failure
        if self.rendezvous is not None and file_identity(self.log_dir / GAVE_UP) not in (None, self._stale_gave_up):
            return read_gave_up(self.log_dir)
        return None

    def _errors(self) -> list[dict[str, Any]]:
        errors = [error for path, error in read_errors(self.log_dir) if self._stale.get(path) != file_identity(path)]
        # If the logs' disk was full, a worker wrote its error beside its pid.
        return [*errors, *(error for _, error in read_errors(self.pid_dir))]

    def _resume_point(self) -> str:
        saved = checkpoint_folders(self.run_dir)
        return f"from {saved[-1].name}" if saved else "from the beginning, as nothing was saved yet"

    def _signal(self, pid: int, signum: int) -> None:
        if _parent(pid) not in (self.torchrun_pid, None):
            return  # The worker has ended, and another process may have its pid.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _parent(pid: int) -> int | None:
    """Return the parent of a process; 0 if it has ended, None on a system without /proc."""
    if sys.platform != "linux":
        return None
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return (inode, modification time) of a file, which a new file in its place changes; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
