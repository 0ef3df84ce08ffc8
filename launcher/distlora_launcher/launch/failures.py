"""The first failure of a run and its reason, from the workers' error files and the exit codes in torchrun's log."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.system import atomic_io
from distlora_launcher.launch.rendezvous import Rendezvous

ERRORS = "rank_*.error.json"
"""Error files in RUN/logs, of the newest attempt: a restarted worker moves those of the one before."""

REPEATING = ("NonFiniteError", "SaveError", "ImportError", "ModuleNotFoundError")
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
    """What happened."""
    see: str
    """Where to read more; may be empty."""
    bad_input: bool = False
    """Whether the input is at fault (exit code 2)."""
    repeats: bool = False
    """Whether a restart would fail in the same way."""
    stopped: bool = False
    """Whether the run ended by a request to stop (exit code 75)."""
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
    exceptions, which are consequences in other ranks.
    """
    for rank, exit in exits.items():
        if exit.code < 0 and -exit.code not in _STOPPING:
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
        if "EADDRINUSE" in text or "address already in use" in text:
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
            error = read_object(path, "remove it")
            check_shape(error, _ERROR, path, "remove it")
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
    path = log_dir / GAVE_UP
    try:
        record = read_object(path, "remove it")
        shape = {"host": str, "message": str, "see": str, "bad_input": bool, "stopped": bool}
        check_shape(record, shape, path, "remove it")
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
    """Return whether a resume would fail in the same step: it would have the same NaN."""
    return any(error["type"] == "NonFiniteError" for _, error in read_errors(log_dir))


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
