"""The first failure of a run and its reason, from the workers' error files and the exit codes in torchrun's log.

torchrun restarts the whole group silently when a worker dies. `WorkerMonitor` reads the files of torchrun and the
workers, prints what happened, and finds the failures that a restart would meet again.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import Shape, read_object
from distlora.run_folder.layout import checkpoint_folders, step_of
from distlora.system import atomic_io
from distlora.system.stop_signals import STOPPED_NAME, name_of
from distlora_launcher.launch.processes import host_name
from distlora_launcher.launch.rendezvous import Rendezvous
from distlora_launcher.terminal.output import warn

ERRORS = "rank_*.error.json"
"""Error files in RUN/logs, of the newest attempt: a restarted worker moves those of the one before."""

_DIVERGED = ("NonFiniteError", "LossWatchdogError")
REPEATING = (*_DIVERGED, "MismatchError", "RewardsFailedError", "SaveError", "ImportError", "ModuleNotFoundError")
"""Exceptions that a restart would raise again, besides every UserError."""
_FULL_DISK = tuple(f"[Errno {code}]" for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
"""Beginnings of the messages of an OSError that a restart would raise again."""

_NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Part of the RuntimeError of a CPU tensor that cannot be allocated."""
MEMORY_SENTENCES = 3
"""Sentences of torch's out-of-memory message that are shown; the rest is the allocator's statistics."""
LESS_MEMORY = (
    "to need less memory, set train.checkpointing=block, train.micro_batch=1, a shorter data.sequence_length or more "
    "processes; `distlora plan` shows what needs it, `nvidia-smi` whether another process does"
)

GAVE_UP = "gave_up.json"
"""File in RUN/logs of several nodes: why the first of them ended for good."""

KILLED = "Killed"
"""Type in the error file of a rank killed by a signal; its launcher writes it for the other nodes."""

# torch.distributed.elastic names the first failure in a line of its log and lists all of them in its closing report.
_FIRST_EXIT = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_REPORTED_EXIT = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")

# Signals that torchrun sends to the remaining ranks.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

LONGEST_MESSAGE = 2000
LONGEST_REASON = 240

_ERROR: Shape = {"time": float, "type": str, "message": str, "bad_input": bool, "about?": (int, type(None))}


@dataclass(frozen=True, slots=True)
class Exit:
    """A worker that torchrun on this node saw fail."""

    pid: int
    rank: int
    """Rank, or the local rank if torchrun does not print the rank."""
    code: int
    """Exit code; -n for signal n."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of an attempt."""

    reason: str
    """Description of the failure."""
    see: str
    """Reference to the log with details; may be empty."""
    bad_input: bool = False
    """True if the input is at fault (exit code 2)."""
    repeats: bool = False
    """True if a restart would fail in the same way."""
    stopped: bool = False
    """True if the run ended on a stop request (exit code 75)."""
    killed_rank: int | None = None
    """Rank that was killed by a signal, if that is the failure."""

    @property
    def message(self) -> str:
        """The text that is printed at the end."""
        return f"{self.reason}\n{self.see}" if self.see else self.reason

    @property
    def short(self) -> str:
        """The reason on one line."""
        line = self.reason.splitlines()[0]
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."


def first_failure(log_dir: Path, exits: Mapping[int, Exit], errors: list[dict[str, Any]]) -> Failure | None:
    """Return why an attempt ended; None if that is not known.

    exits: by rank, the first exit first. errors: contents of the error files. A rank killed by a signal precedes all
    exceptions, which are consequences in other ranks, but for a hang, after which the launcher kills them.
    """
    hung = any(error["type"] == "HungError" for error in errors)
    for rank, exit in exits.items():
        if exit.code < 0 and -exit.code not in _STOPPING and not hung:
            return Failure(killed_by(rank, -exit.code), _see(log_dir, rank), killed_rank=rank)
    if errors:
        return _from_record(log_dir, min(errors, key=lambda error: (error["type"] != KILLED, error["time"])))
    for rank, exit in exits.items():
        code = exit.code
        reason = killed_by(rank, -code) if code < 0 else f"rank {rank} failed first: it exited with code {code}"
        return Failure(reason, _see(log_dir, rank), bad_input=code == 2, repeats=code == 2)
    return None


def start_failure(torchrun_log: Path, code: int, rendezvous: Rendezvous | None) -> Failure:
    """Return why torchrun ended with `code` although no worker failed, from its log."""
    text = torchrun_log.read_text(errors="replace")
    see = f"torchrun's messages are in {torchrun_log}"
    if code < 0:
        return Failure(f"torchrun, which starts the workers, was killed by {_name(-code)}{_reason(-code)}", see)
    if rendezvous is not None:
        where = f"the {rendezvous.nodes} nodes of this run (rendezvous {rendezvous.endpoint})"
        if "RendezvousTimeoutError" in text:
            return Failure(
                f"not all of {where} joined within {rendezvous.join_seconds} s (cluster.timeout_seconds); continue "
                f"with `distlora resume {torchrun_log.parents[1]}` on each",
                see,
            )
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            return Failure(
                f"the port of {rendezvous.endpoint} is in use on this node; stop what listens there, "
                "or use another port",
                see,
            )
        if "RendezvousClosedError" in text:
            return Failure(f"one of {where} has given up; see its messages and RUN/logs", see)
        if "RendezvousConnectionError" in text or "DistNetworkError" in text:
            return Failure(f"the connection to {rendezvous.endpoint} was lost: that node has ended or is down", see)
    return Failure("the workers could not be started", see)


def _from_record(log_dir: Path, error: dict[str, Any]) -> Failure:
    rank = error["rank"]
    if error["type"] == KILLED:
        return Failure(error["message"], _see(log_dir, rank))
    if error["bad_input"]:
        return Failure(error["message"], "", bad_input=True, repeats=True)
    if error["type"] == "HungError":
        about = rank if error.get("about") is None else error["about"]
        return Failure(f"the run hung: {error['message']}", _see(log_dir, about, "its stacks are in"))
    text = f"{error['type']}: {error['message']}" if error["message"] else error["type"]
    if _is_of_memory(error):
        text = f"{'. '.join(text.split('. ')[:MEMORY_SENTENCES])}; {LESS_MEMORY}"
    shown = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
    return Failure(
        f"rank {rank} failed first: {shown}",
        _see(log_dir, rank, "its traceback is in"),
        repeats=is_final(error),
    )


def _is_of_memory(error: Mapping[str, Any]) -> bool:
    """Return whether a GPU or the host ran out of memory."""
    return error["type"] == "OutOfMemoryError" or _NO_HOST_MEMORY in error["message"]


def is_final(error: Mapping[str, Any]) -> bool:
    """Return whether a restart would raise the error of an error file again."""
    full = error["type"] == "OSError" and error["message"].startswith(_FULL_DISK)
    return error["bad_input"] or error["type"] in REPEATING or full


def read_errors(log_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (path, content with `rank`) of the error files in a folder of logs.

    Damaged files, of a worker killed while it wrote or on a full disk, are skipped.
    """
    for path in sorted(log_dir.glob(ERRORS)):
        with contextlib.suppress(UserError, OSError):
            error = read_object(path, "remove it", _ERROR)
            yield path, error | {"rank": int(path.name.removeprefix("rank_").partition(".")[0])}


def write_killed(log_dir: Path, failure: Failure, seconds: float) -> None:
    """Write the error file of a rank killed by a signal, for the other nodes; a full disk is ignored."""
    path = log_dir / f"rank_{failure.killed_rank}.error.json"
    with contextlib.suppress(OSError):
        atomic_io.write_json(path, {"type": KILLED, "message": failure.reason, "bad_input": False, "time": seconds})


def write_gave_up(log_dir: Path, host: str, failure: Failure) -> None:
    """Tell the launchers of other nodes that this one ends for good, unless another node was first."""
    path = log_dir / GAVE_UP
    if not path.exists():
        record = {
            "host": host,
            "message": failure.reason,
            "see": failure.see,
            "bad_input": failure.bad_input,
            "stopped": failure.stopped,
        }
        with contextlib.suppress(OSError):
            atomic_io.write_json(path, record)


def read_gave_up(log_dir: Path) -> Failure | None:
    """Return why another node ended for good; None if none did."""
    shape = {"host": str, "message": str, "see": str, "bad_input": bool, "stopped": bool}
    try:
        record = read_object(log_dir / GAVE_UP, "remove it", shape)
    except (UserError, OSError):
        return None
    return Failure(
        record["message"] if record["stopped"] else f"{record['host']} gave up: {record['message']}",
        record["see"],
        bad_input=record["bad_input"],
        stopped=record["stopped"],
        repeats=True,
    )


def would_repeat(log_dir: Path) -> bool:
    """Return whether a resume would fail in the same step: it would have the same loss."""
    return any(error["type"] in _DIVERGED for _, error in read_errors(log_dir))


def exits_in(torchrun_log: str, ranks: Mapping[int, int]) -> list[Exit]:
    """Return the workers that torchrun saw fail, in order, each once. `ranks` gives the rank of a pid."""
    exits = [
        Exit(int(pid), ranks.get(int(pid), int(local)), int(code))
        for code, local, pid in _FIRST_EXIT.findall(torchrun_log)
    ]
    exits += [Exit(int(pid), int(rank), int(code)) for rank, code, pid in _REPORTED_EXIT.findall(torchrun_log)]
    once: dict[int, Exit] = {}
    for exit in exits:
        once.setdefault(exit.pid, exit)
    return list(once.values())


def killed_by(rank: int, signum: int) -> str:
    """Return the message for a worker killed by a signal."""
    return f"rank {rank} failed first: it was killed by {_name(signum)}{_reason(signum)}"


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"


def _reason(signum: int) -> str:
    return {
        "SIGKILL": "; usually the node ran out of memory (see `dmesg | tail`; fewer processes, cluster.gpus_per_node, "
        "need less), or somebody sent kill -9",
        "SIGSEGV": ", a crash in native code",
        "SIGABRT": ", an abort in native code",
        "SIGBUS": "; usually /dev/shm or a disk is full",
    }.get(_name(signum), "")


def _see(log_dir: Path, rank: int, lead: str = "its output is in") -> str:
    return f"{lead} {log_dir / f'rank_{rank}.log'}"


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
        self._hangs: set[float] = set()
        """Times of the errors of hangs after which the workers were killed."""
        self.restarting = False
        """True while the failure of the newest attempt is printed and the next workers have not started yet."""
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
        hangs = {error["time"] for error in errors if error["type"] == "HungError"}
        if hangs - self._hangs:
            self._hangs |= hangs
            for pid in self.pids.values():  # torchrun waits 30 s for one that is stopped.
                self._signal(pid, signal.SIGKILL)
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
