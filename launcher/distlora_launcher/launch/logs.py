"""RUN/logs: one file a rank and one of torchrun's a machine; those of earlier starts in folders of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

ATTEMPT = "attempt_"
"""Folders of what ranks had written before they were started again."""
START = "start_"
OURS = ("rank_*", "torchrun*.log", "gave_up.json", f"{ATTEMPT}*")
"""What a start writes here. SLURM's own log lies here too, and is being written."""
SLURM = "slurm_"
"""Of a job of SLURM: slurm_<job>.log, what it and rank 0 in it print, all its starts in one file."""


def set_aside_logs(log_dir: Path) -> None:
    """Move the logs of an earlier start to logs/start_<n>: the newest are always logs/rank_<k>.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for pattern in OURS for path in log_dir.glob(pattern)]
    if earlier:
        folder = log_dir / f"{START}{1 + last_number(START, log_dir.glob(f'{START}*'))}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)


def last_number(prefix: str, folders: Iterable[Path]) -> int:
    """The largest <n> of the folders `prefix`<n>; 0 where there is none. Some may have been deleted."""
    words = (folder.name.removeprefix(prefix) for folder in folders)
    return max((int(word) for word in words if word.isdecimal()), default=0)


def machine_log(log_dir: Path, *, alone: bool) -> Path:
    """A new file for what torchrun here says: logs/torchrun.log of a machine alone, else torchrun_<host>.log, with a
    number where one was started there before within the same start.
    """
    if alone:
        return log_dir / "torchrun.log"
    host = host_name()
    names = (f"torchrun_{host}.log" if number == 1 else f"torchrun_{host}_{number}.log" for number in range(1, 10_000))
    for name in names:
        try:
            (log_dir / name).touch(exist_ok=False)
            return log_dir / name
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def host_name() -> str:
    """This machine as it calls itself, without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"
