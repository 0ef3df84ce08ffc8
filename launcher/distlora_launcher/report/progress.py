"""Read a run's progress from its folder: step, losses, pace, newest checkpoint.

Any file may be half-written, missing or damaged; then its values are None. Imports no torch.
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import TrainConfig, UserError
from distlora.config.json_files import object_or_empty, parse_object
from distlora.run_folder.layout import CHECKPOINTS, DATA_NAME, MANIFEST_NAME, METRICS_NAME, step_of, steps
from distlora.system.numbers import length

TAIL_BYTES = 256 * 1024
"""Bytes read from the end of metrics.jsonl: some hundred steps."""
PACE_STEPS = 20
"""Number of steps that the pace is averaged over: single steps differ by up to half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The newest metrics; None for what was not logged yet."""

    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    """Newest held-out loss after a step."""
    tokens_per_second: float | None = None
    """Mean over the last PACE_STEPS steps."""
    peak_memory_bytes: float | None = None
    """Peak bytes of tensors per rank so far, which the plan predicts."""
    time: float | None = None
    """Time of the newest line, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """The newest checkpoint."""

    step: int
    path: Path
    time: float
    """Time of the save, in seconds since 1970."""


class NewMetrics:
    """The lines of a run's metrics.jsonl that were written since the last look."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_NAME
        self._file, self._read = 0, 0
        """Inode of the file, which a resume replaces, and bytes read of it."""

    def look(self) -> list[dict[str, Any]]:
        """Return the new whole lines; damaged ones, of an earlier start, are left out."""
        try:
            with self._path.open("rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self._file:
                    self._file, self._read = inode, 0
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        records = []
        for line in whole.splitlines():
            with contextlib.suppress(UserError):
                records.append(parse_object(line, METRICS_NAME, ""))
        return [record for record in records if isinstance(record.get("step"), int)]


def read_figures(run_dir: Path) -> Figures:
    """Read the newest metrics of a run from the end of metrics.jsonl."""
    step, loss, eval_loss, peak, written = 0, None, None, None, None
    rates: list[float] = []
    for line in _tail(run_dir / METRICS_NAME):
        try:
            values = parse_object(line.encode(), METRICS_NAME, "")
        except UserError:  # Truncated or damaged.
            continue
        number, when = values.get("step"), values.get("time")
        if not isinstance(number, int) or isinstance(number, bool):
            continue
        step, written = max(step, number), when if _is_number(when) else written
        if "eval_loss" in values:
            eval_loss = _number(values["eval_loss"]) if number > 0 else eval_loss
        else:
            loss, rate = _number(values.get("loss")), _number(values.get("tokens_per_second"))
            rates += [rate] if rate else []
            peak = _number(values.get("peak_memory_bytes")) or peak
    rates = rates[-PACE_STEPS:]
    pace = len(rates) / sum(1 / rate for rate in rates) if rates else None
    return Figures(
        step=step, loss=loss, eval_loss=eval_loss, tokens_per_second=pace, peak_memory_bytes=peak, time=written
    )


def total_steps(run_dir: Path, train: TrainConfig) -> int | None:
    """Return the number of steps of the whole run; None while its data is not prepared."""
    if train.max_steps is not None:
        return train.max_steps
    try:
        rows = int(object_or_empty(run_dir / DATA_NAME)["splits"]["train"]["rows"])
    except (LookupError, TypeError, ValueError):
        return None
    return train.total_steps(rows)


def seconds_left(figures: Figures, total: int | None, tokens_per_step: int) -> float | None:
    """Return the seconds until the end at the pace of the last steps; None if that is not known."""
    if total is None or not figures.tokens_per_second or figures.step == 0:
        return None
    tokens = (total - figures.step) * tokens_per_step
    return max(0.0, tokens / figures.tokens_per_second)


def newest_saved(run_dir: Path) -> Saved | None:
    """Return the newest checkpoint by name, unverified."""
    for folder in reversed(steps(run_dir / CHECKPOINTS)):
        with contextlib.suppress(OSError):  # It was pruned just now.
            return Saved(step=step_of(folder), path=folder, time=(folder / MANIFEST_NAME).stat().st_mtime)
    return None


def was_started(run_dir: Path) -> bool:
    """Return whether workers have ever written something."""
    return (run_dir / METRICS_NAME).exists() or any((run_dir / "logs").glob("rank_*"))


def age(moment: float) -> str:
    """Return the time since a moment (seconds since 1970) as `12 s`, `3 min`, `2 h` or `5 days`."""
    return length(max(0.0, time.time() - moment))


def _tail(path: Path) -> list[str]:
    """Return the complete lines at the end of a file."""
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    return lines[1:] if size > TAIL_BYTES else lines


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
