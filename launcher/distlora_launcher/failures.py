"""Which rank failed first, and why: from the error files of the workers and the exit codes in torchrun's log."""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.json_files import Shape, check_shape, read_object

TORCHRUN_LOG = "torchrun.log"

# torch.distributed.elastic names the first failure in a line of its log and lists all of them in its closing report.
_FIRST_EXIT = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_REPORTED_EXIT = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")

# Signals that torchrun itself sends to the ranks that are left, or passes on.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

LONGEST_MESSAGE = 2000

_ERROR: Shape = {"time": float, "type": str, "message": str, "bad_input": bool}


@dataclass(frozen=True, slots=True)
class Failure:
    """The first failure of a start."""

    message: str
    """What to show the user."""
    bad_input: bool
    """Whether it is the user's to correct (exit code 2)."""


def first_failure(log_dir: Path) -> Failure:
    """Why a start ended. A rank that a signal killed goes before all exceptions: those are what its peers saw of it."""
    exits = exit_codes(log_dir / TORCHRUN_LOG)
    for rank, code in exits.items():
        if code < 0 and -code not in _STOPPING:
            return Failure(f"{killed_by(rank, -code)}\n{_see(log_dir, rank)}", bad_input=False)
    errors = _errors(log_dir)
    if errors:
        error, rank = min(errors, key=lambda item: item[0]["time"])
        if error["bad_input"]:
            return Failure(error["message"], bad_input=True)
        if error["type"] == "HungError":
            about = rank if error["about"] is None else error["about"]
            return Failure(
                f"the run hung: {error['message']}\n{_see(log_dir, about, 'its stacks are in')}", bad_input=False
            )
        text = f"{error['type']}: {error['message']}" if error["message"] else error["type"]
        shown = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
        return Failure(
            f"rank {rank} failed first: {shown}\n{_see(log_dir, rank, 'its traceback is in')}", bad_input=False
        )
    for rank, code in exits.items():
        reason = killed_by(rank, -code) if code < 0 else f"rank {rank} failed first: it exited with code {code}"
        return Failure(f"{reason}\n{_see(log_dir, rank)}", bad_input=code == 2)
    return Failure(
        f"the workers could not be started; torchrun's messages are in {log_dir / TORCHRUN_LOG}", bad_input=False
    )


def would_repeat(log_dir: Path) -> bool:
    """Whether a resume would fail at the same place: a step of the same rows and weights has the same NaN in it."""
    return any(error["type"] == "NonFiniteError" for error, _ in _errors(log_dir))


def exit_codes(torchrun_log: Path) -> dict[int, int]:
    """Exit codes by rank of the workers that torchrun saw fail, the first one first; -n for signal n."""
    text = torchrun_log.read_text(errors="replace") if torchrun_log.is_file() else ""
    found = [(int(rank), int(code)) for code, rank in _FIRST_EXIT.findall(text)]
    found += [(int(rank), int(code)) for rank, code in _REPORTED_EXIT.findall(text)]
    codes: dict[int, int] = {}
    for rank, code in found:
        codes.setdefault(rank, code)
    return codes


def killed_by(rank: int, signum: int) -> str:
    """A sentence for a worker that a signal ended."""
    name = signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
    reason = {
        "SIGKILL": "; usually the machine ran out of memory (`dmesg | tail` tells), or somebody sent kill -9",
        "SIGSEGV": ", a crash in native code",
        "SIGABRT": ", an abort in native code",
        "SIGBUS": "; usually /dev/shm or a disk is full",
    }.get(name, "")
    return f"rank {rank} failed first: it was killed by {name}{reason}"


def _errors(log_dir: Path) -> list[tuple[dict[str, Any], int]]:
    """(error file, rank) of the ranks that left one. A worker that was killed while it wrote, or met a full disk, has
    left a damaged one, which tells no more than none."""
    found = []
    for path in log_dir.glob("rank_*.error.json"):
        with contextlib.suppress(UserError, OSError):
            error = read_object(path, "remove it")
            check_shape(error, _ERROR, path, "remove it")
            found.append((error, _rank(path)))
    return found


def _rank(path: Path) -> int:
    return int(path.name.removeprefix("rank_").partition(".")[0])


def _see(log_dir: Path, rank: int, lead: str = "its output is in") -> str:
    return f"{lead} {log_dir / f'rank_{rank}.log'}"
