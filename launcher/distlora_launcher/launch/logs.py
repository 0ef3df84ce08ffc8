"""The logs of a run, RUN/logs: those of earlier starts and attempts move out of the way of the newest."""

from collections.abc import Iterable, Sequence
from pathlib import Path

START = "start_"
"""Prefix of the folders with logs of earlier starts."""
ATTEMPT = "attempt_"
"""Prefix of the folders with logs of ranks that were restarted."""
WRITTEN = ("rank_*", "torchrun*.log", "gave_up.json", f"{ATTEMPT}*")
"""Files that a start writes; SLURM's log, which all starts share, is not among them."""


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
