"""RUN/logs: one file per rank and one per torchrun; the logs of earlier starts are in start_<n>/."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

ATTEMPT = "attempt_"
"""Prefix of the folders with logs of ranks that were restarted."""
START = "start_"
"""Prefix of the folders with logs of earlier starts."""
WRITTEN = ("rank_*", "torchrun*.log", "gave_up.json", f"{ATTEMPT}*")
"""Files that a start writes; SLURM's log, which all starts share, is not among them."""
SLURM = "slurm_"
"""Prefix of a SLURM job's log, slurm_<job>.log."""


def set_aside_logs(log_dir: Path) -> None:
    """Move the logs of an earlier start to logs/start_<n>, so that the newest are logs/rank_<k>.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for pattern in WRITTEN for path in log_dir.glob(pattern)]
    if earlier:
        folder = log_dir / f"{START}{1 + last_number(START, log_dir.glob(f'{START}*'))}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)


def last_number(prefix: str, folders: Iterable[Path]) -> int:
    """Return the largest <n> of the folders `prefix`<n>; 0 if there is none."""
    words = (folder.name.removeprefix(prefix) for folder in folders)
    return max((int(word) for word in words if word.isdecimal()), default=0)


def new_torchrun_log(log_dir: Path, *, single_node: bool) -> Path:
    """Return torchrun's log: torchrun.log on a single node, else a new file torchrun_<host>[_<n>].log."""
    if single_node:
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
    """Return this node's host name without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"
