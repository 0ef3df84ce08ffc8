"""Which rank failed first, and why: from the error files of the workers and the exit codes in torchrun's log."""

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
from distlora_launcher.launch.rendezvous import Meeting

ERRORS = "rank_*.error.json"
"""In RUN/logs: what each worker failed of; of the newest attempt, since a worker that is started again moves it."""

REPEATING = ("NonFiniteError", "SaveError", "ImportError", "ModuleNotFoundError")
"""Exceptions that the same rows, weights, packages and disk raise again; besides everything that the user must mend."""
_FULL_DISK = tuple(f"[Errno {code}]" for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
"""How the message of an OSError begins that another attempt meets again."""

_NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""In the RuntimeError of a tensor on the CPU."""
MEMORY_SENTENCES = 3
LESS_MEMORY = (
    "a run with train.checkpointing=block, train.micro_batch=1, shorter data.sequence_length or more processes takes "
    "less, and `distlora plan` with its settings says of what (is something else on the device? `nvidia-smi`)"
)

GAVE_UP = "gave_up.json"
"""In RUN/logs of several machines: why the first of them ended for good."""

KILLED = "Killed"
"""Type in the error file of a rank that a signal ended: the launcher beside it writes it, for the other machines'."""

# torch.distributed.elastic names the first failure in a line of its log and lists all of them in its closing report.
_FIRST_EXIT = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_REPORTED_EXIT = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")

# Signals that torchrun itself sends to the ranks that are left.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

LONGEST_MESSAGE = 2000
LONGEST_REASON = 240

_ERROR: Shape = {"time": float, "type": str, "message": str, "bad_input": bool, "about?": (int, type(None))}


@dataclass(frozen=True, slots=True)
class Exit:
    """A worker that torchrun on this machine saw fail."""

    pid: int
    rank: int
    """The rank, or the place on this machine where torchrun does not say the rank."""
    code: int
    """-n for signal n."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of an attempt."""

    reason: str
    """What happened, without where to read more."""
    see: str
    """Where to read more; empty where the reason says all."""
    bad_input: bool = False
    """Whether it is the user's to correct (exit code 2)."""
    repeats: bool = False
    """Whether another attempt would fail at the same place."""
    stopped: bool = False
    """Whether it is none: the run ends because it was asked to (exit code 75)."""
    killed_rank: int | None = None
    """The rank that a signal ended, where that is what happened."""

    @property
    def message(self) -> str:
        """What to show the user at the end."""
        return f"{self.reason}\n{self.see}" if self.see else self.reason

    @property
    def short(self) -> str:
        """The reason in one line."""
        line = self.reason.splitlines()[0]
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."


def first_failure(log_dir: Path, exits: Mapping[int, Exit], errors: list[dict[str, Any]]) -> Failure | None:
    """Why an attempt ended, by the exits (by rank, the first one first) and error files that belong to it; None where
    neither says anything. A rank that a signal killed goes before all exceptions: those are what its peers saw of it.
    """
    for rank, found in exits.items():
        if found.code < 0 and -found.code not in _STOPPING:
            return Failure(killed_by(rank, -found.code), _see(log_dir, rank), killed_rank=rank)
    if errors:
        return _from_record(log_dir, min(errors, key=lambda error: (error["type"] != KILLED, error["time"])))
    for rank, found in exits.items():
        code = found.code
        reason = killed_by(rank, -code) if code < 0 else f"rank {rank} failed first: it exited with code {code}"
        return Failure(reason, _see(log_dir, rank), bad_input=code == 2, repeats=code == 2)
    return None


def start_failure(torchrun_log: Path, code: int, meeting: Meeting | None) -> Failure:
    """Why torchrun ended, with `code`, and no worker to blame: by its own words."""
    text = torchrun_log.read_text(errors="replace")
    see = f"torchrun's messages are in {torchrun_log}"
    if code < 0:
        return Failure(f"torchrun, which starts the workers, was killed by {_name(-code)}{_reason(-code)}", see)
    if meeting is not None:
        where = f"the {meeting.nodes} machines of this run, which meet at {meeting.endpoint}"
        if "RendezvousTimeoutError" in text:
            return Failure(
                f"not all of {where}, were there within {meeting.join_seconds} s (cluster.timeout_seconds); continue "
                f"with `distlora resume {torchrun_log.parents[1]}` on each",
                see,
            )
        if "EADDRINUSE" in text or "address already in use" in text:
            return Failure(
                f"the port of {meeting.endpoint} is in use on this machine; end what listens there, or take another "
                "port",
                see,
            )
        if "RendezvousClosedError" in text:
            return Failure(f"one of {where}, has given up; its own message and RUN/logs say why", see)
        if "RendezvousConnectionError" in text or "DistNetworkError" in text:
            return Failure(f"the connection to {meeting.endpoint} was lost: that machine has ended or is gone", see)
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
    if _is_of_memory(error):  # What was asked for and what there is; torch goes on with its allocator's statistics.
        text = f"{'. '.join(text.split('. ')[:MEMORY_SENTENCES])}; {LESS_MEMORY}"
    shown = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
    return Failure(
        f"rank {rank} failed first: {shown}",
        _see(log_dir, rank, "its traceback is in"),
        repeats=is_final(error),
    )


def _is_of_memory(error: Mapping[str, Any]) -> bool:
    """Whether torch could not have the memory that it asked a GPU or the host for."""
    return error["type"] == "OutOfMemoryError" or _NO_HOST_MEMORY in error["message"]


def is_final(error: Mapping[str, Any]) -> bool:
    """Whether another attempt would meet what an error file tells of again."""
    full = error["type"] == "OSError" and error["message"].startswith(_FULL_DISK)
    return error["bad_input"] or error["type"] in REPEATING or full


def read_errors(log_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The error files in a folder of logs, each with its `rank`. A worker that was killed while it wrote, or met a full
    disk, has left a damaged one, which tells no more than none; another may be moved away meanwhile.
    """
    for path in sorted(log_dir.glob(ERRORS)):
        with contextlib.suppress(UserError, OSError):
            error = read_object(path, "remove it")
            check_shape(error, _ERROR, path, "remove it")
            yield path, error | {"rank": int(path.name.removeprefix("rank_").partition(".")[0])}


def write_killed(log_dir: Path, failure: Failure, seconds: float) -> None:
    """Leave the error file of a rank that could not write its own. On a disk that takes none, other machines go without
    the reason, as they would if this one were gone.
    """
    path = log_dir / f"rank_{failure.killed_rank}.error.json"
    with contextlib.suppress(OSError):
        atomic_io.write_json(path, {"type": KILLED, "message": failure.reason, "bad_input": False, "time": seconds})


def write_gave_up(log_dir: Path, host: str, failure: Failure) -> None:
    """Tell the launchers of other machines that this one ends for good, unless another was first: their own torchrun
    would wait for it.
    """
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
    """Why another machine ended for good; None where none did."""
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
    """Whether a resume would fail at the same place: a step of the same rows and weights has the same NaN in it."""
    return any(error["type"] == "NonFiniteError" for _, error in read_errors(log_dir))


def exits_in(torchrun_log: str, ranks: Mapping[int, int]) -> list[Exit]:
    """The workers that torchrun saw fail, the first one first, each once. `ranks` says which rank a pid was."""
    found = [
        Exit(int(pid), ranks.get(int(pid), int(local)), int(code))
        for code, local, pid in _FIRST_EXIT.findall(torchrun_log)
    ]
    found += [Exit(int(pid), int(rank), int(code)) for rank, code, pid in _REPORTED_EXIT.findall(torchrun_log)]
    once: dict[int, Exit] = {}
    for exit in found:
        once.setdefault(exit.pid, exit)
    return list(once.values())


def killed_by(rank: int, signum: int) -> str:
    """A sentence for a worker that a signal ended."""
    return f"rank {rank} failed first: it was killed by {_name(signum)}{_reason(signum)}"


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"


def _reason(signum: int) -> str:
    return {
        "SIGKILL": "; usually the machine ran out of memory (`dmesg | tail` tells), of which fewer processes "
        "(cluster.gpus_per_node) take less, or somebody sent kill -9",
        "SIGSEGV": ", a crash in native code",
        "SIGABRT": ", an abort in native code",
        "SIGBUS": "; usually /dev/shm or a disk is full",
    }.get(_name(signum), "")


def _see(log_dir: Path, rank: int, lead: str = "its output is in") -> str:
    return f"{lead} {log_dir / f'rank_{rank}.log'}"
