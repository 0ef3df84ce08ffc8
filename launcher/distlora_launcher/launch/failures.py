"""RUN/logs, and the first failure of a run with its reason, from the workers' error files and exit codes there.

Logs and error files of earlier starts and attempts move out of the way of the newest.
"""

import contextlib
import errno
import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import Shape, object_or_empty, read_object
from distlora.run_folder.layout import checkpoint_folders
from distlora.system import atomic_io
from distlora.system.command_worker import REQUEST_NAME
from distlora.system.exit_codes import BAD_INPUT, FAILED, STOPPED
from distlora.system.stop_signals import STOPPED_NAME, name_of, write_stopped
from distlora_launcher.launch.lock import host_name
from distlora_launcher.terminal.output import warn

ERRORS = "rank_*.error.json"
"""Error files in RUN/logs, of the newest attempt: a restarted worker moves those of the one before."""

GAVE_UP = "gave_up.json"
"""File in RUN/logs of several nodes: why the first of them ended for good."""
START = "start_"
"""Prefix of the folders with logs of earlier starts."""
ATTEMPT = "attempt_"
"""Prefix of the folders with logs of ranks that were restarted."""
WRITTEN = ("rank_*", "torchrun*.log", GAVE_UP, f"{ATTEMPT}*")
"""Files that a start writes; SLURM's log, which all starts share, is not among them."""

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

KILLED = "Killed"
"""Type in the error file of a rank killed by a signal; its launcher writes it for the other nodes."""

LONGEST_MESSAGE = 2000
LONGEST_REASON = 240

_ERROR: Shape = {"time": float, "type": str, "message": str, "bad_input": bool, "about?": (int, type(None))}


def set_aside_logs(log_dir: Path) -> None:
    """Move the logs of an earlier start to logs/start_<n>, so that the newest are logs/rank_<k>.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for pattern in WRITTEN for path in log_dir.glob(pattern)]
    if earlier:
        folder = log_dir / f"{START}{1 + _last_number(START, log_dir.glob(f'{START}*'))}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)


def set_aside_attempt(log_dir: Path, ranks: Sequence[int], *, at_least: int) -> None:
    """Move the files of earlier attempts of `ranks` to logs/attempt_<n>, with n at least `at_least`."""
    for rank in ranks:
        log, error = log_dir / f"rank_{rank}.log", log_dir / f"rank_{rank}.error.json"
        if not log.exists():
            continue
        earlier = _last_number(ATTEMPT, (path.parent for path in log_dir.glob(f"{ATTEMPT}*/{log.name}")))
        folder = log_dir / f"{ATTEMPT}{max(1 + earlier, at_least)}"
        try:
            folder.mkdir(exist_ok=True)
            for path in (error, log):
                if path.exists():
                    path.rename(folder / path.name)
        except OSError:  # A full disk: the log then has both attempts, but the error must not count for this one.
            error.unlink(missing_ok=True)


def _last_number(prefix: str, folders: Iterable[Path]) -> int:
    """Return the largest <n> of the folders `prefix`<n>; 0 if there is none."""
    words = (folder.name.removeprefix(prefix) for folder in folders)
    return max((int(word) for word in words if word.isdecimal()), default=0)


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of an attempt."""

    reason: str
    """Description of the failure."""
    see: str
    """Reference to the log with details; may be empty."""
    code: int = FAILED
    """Exit code of the launcher."""
    repeats: bool = False
    """True if a restart would fail in the same way."""
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


def first_failure(log_dir: Path, codes: Mapping[int, int], errors: Sequence[Mapping[str, Any]]) -> Failure | None:
    """Return why an attempt ended; None if that is not known.

    codes: exit code by rank, -n for signal n, the first exit first. errors: contents of the error files. A rank killed
    by a signal precedes all exceptions, which are consequences in other ranks, but for a hang, after which the launcher
    kills them.
    """
    hung = any(error["type"] == "HungError" for error in errors)
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed and not hung:
        rank, signum = next(iter(killed.items()))
        return Failure(killed_by(rank, signum), _see(log_dir, rank), killed_rank=rank)
    if errors:
        return _from_record(log_dir, min(errors, key=lambda error: (error["type"] != KILLED, error["time"])))
    for rank, code in codes.items():
        reason = killed_by(rank, -code) if code < 0 else f"rank {rank} failed first: it exited with code {code}"
        refused = code == BAD_INPUT
        return Failure(reason, _see(log_dir, rank), BAD_INPUT if refused else FAILED, repeats=refused)
    return None


def _from_record(log_dir: Path, error: Mapping[str, Any]) -> Failure:
    rank = error["rank"]
    if error["type"] == KILLED:
        return Failure(error["message"], _see(log_dir, rank))
    if error["bad_input"]:
        return Failure(error["message"], "", BAD_INPUT, repeats=True)
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
    """Yield (path, content with `rank`) of the error files in a folder of logs."""
    for path in sorted(log_dir.glob(ERRORS)):
        error = read_error(path, int(path.name.removeprefix("rank_").partition(".")[0]))
        if error is not None:
            yield path, error


def read_error(path: Path, rank: int) -> dict[str, Any] | None:
    """Return the content of an error file with `rank`; None if it is damaged or there is none."""
    try:
        return read_object(path, "remove it", _ERROR) | {"rank": rank}
    except (UserError, OSError):
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """The end of the last start, as far as it was recorded."""

    stopped: Mapping[str, Any] | None = None
    """Content of stopped.json: the run saved and stopped on a request."""
    error: str | None = None
    """Message of the first failure."""
    bad_input: bool = False
    """True if the input is at fault."""


def read_ending(run_dir: Path) -> Ending:
    """Return the later of a stop and a failure; neither if the run was killed or still runs."""
    stopped = object_or_empty(run_dir / STOPPED_NAME)
    log_dir = run_dir / "logs"
    errors = [error for _, error in read_errors(log_dir)]
    failure = first_failure(log_dir, {}, errors)
    failed = max((error["time"] for error in errors), default=0.0)
    if stopped and _time_of(stopped) >= failed:
        return Ending(stopped=stopped)
    if failure is not None:
        return Ending(error=failure.message, bad_input=failure.code == BAD_INPUT)
    return Ending()


def _time_of(stopped: Mapping[str, Any]) -> float:
    """Return the time of a stop; infinity if its record is damaged."""
    seconds = stopped.get("time")
    return seconds if isinstance(seconds, float) else math.inf


def write_killed(log_dir: Path, failure: Failure, seconds: float) -> None:
    """Write the error file of a rank killed by a signal, for the other nodes; a full disk is ignored."""
    path = log_dir / f"rank_{failure.killed_rank}.error.json"
    with contextlib.suppress(OSError):
        atomic_io.write_json(path, {"type": KILLED, "message": failure.reason, "bad_input": False, "time": seconds})


def write_gave_up(log_dir: Path, failure: Failure) -> None:
    """Tell the launchers of other nodes that this one ends for good, unless another node was first."""
    path = log_dir / GAVE_UP
    if not path.exists():
        record = {"host": host_name(), "message": failure.reason, "see": failure.see, "code": failure.code}
        with contextlib.suppress(OSError):
            atomic_io.write_json(path, record)


def end(failure: Failure, log_dir: Path, *, several_nodes: bool) -> int:
    """Print why this node's workers have ended, leave it for the launchers of other nodes; return the exit code."""
    if failure.reason:  # Workers that have stopped say so themselves.
        warn(f"error: {failure.message}" if failure.code in (FAILED, BAD_INPUT) else failure.message)
        if several_nodes:
            write_gave_up(log_dir, failure)
    return failure.code


def read_gave_up(log_dir: Path) -> Failure | None:
    """Return why another node ended for good; None if none did."""
    try:
        record = read_object(log_dir / GAVE_UP, "remove it", {"host": str, "message": str, "see": str, "code": int})
    except (UserError, OSError):
        return None
    by = "" if record["code"] == STOPPED else f"{record['host']} gave up: "
    return Failure(f"{by}{record['message']}", record["see"], record["code"], repeats=True)


def stopped_without_workers(run_dir: Path, signum: int) -> Failure:
    """Return the end of a run that is asked to stop while no worker runs, and write RUN/stopped.json in its place."""
    saved = checkpoint_folders(run_dir)
    with contextlib.suppress(OSError):  # On a full disk only `distlora status` lacks it.
        write_stopped(run_dir, signum, saved[-1] if saved else None)
    state = f"{saved[-1].name} is saved" if saved else "nothing is saved yet"
    if is_service(run_dir):
        state = "adapters are as of their last snapshots"
    return Failure(f"stopped by {name_of(signum)} while no workers ran on {host_name()}: {state}", "", STOPPED)


def is_service(folder: Path) -> bool:
    """Return whether a folder is that of `distlora serve` and not of a run."""
    return (folder / REQUEST_NAME).is_file()


def resume_point(run_dir: Path) -> str:
    """Return where a restart continues."""
    if is_service(run_dir):
        return "from the last snapshot of each adapter"
    saved = checkpoint_folders(run_dir)
    return f"from {saved[-1].name}" if saved else "from the beginning, as nothing was saved yet"


def would_repeat(log_dir: Path) -> bool:
    """Return whether a resume would fail in the same step: it would have the same loss."""
    return any(error["type"] in _DIVERGED for _, error in read_errors(log_dir))


def killed(signum: int, log_dir: Path) -> Failure:
    """Return the failure of workers that a request to stop has killed."""
    return Failure(f"killed by {name_of(signum)}; logs are in {log_dir}", "", 128 + signum)


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
