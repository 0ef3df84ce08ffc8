"""What a run folder says of how its run stands: how far, at what pace, saved where, how it ended.

Everything may be half-written, missing, or damaged: then it is unknown, and nothing else suffers. Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError
from distlora.config.json_files import object_or_empty, parse_object
from distlora.run_folder.checkpoints import MANIFEST_NAME, step_of, steps
from distlora.run_folder.layout import CHECKPOINTS, DATA_NAME, METRICS_NAME
from distlora.system.numbers import roughly
from distlora.system.stop_signals import STOPPED_NAME
from distlora_launcher.launch.failures import first_failure, read_errors

TAIL_BYTES = 256 * 1024
"""Of metrics.jsonl, from its end: some hundred steps."""
PACE_STEPS = 20
"""How many steps the pace is taken from: single ones differ by as much as a half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The newest lines of metrics.jsonl; None for what was not logged yet."""

    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    """The last held-out loss after a step."""
    tokens_per_second: float | None = None
    """Over the last PACE_STEPS steps."""
    time: float | None = None
    """When the last line was written, seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """The newest checkpoint."""

    step: int
    path: Path
    time: float
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How the last start ended, where it said so."""

    stopped: Mapping[str, Any] | None = None
    """stopped.json: it saved and stopped as it was asked to."""
    error: str | None = None
    """What failed first."""
    bad_input: bool = False
    """Whether the error is the user's to mend."""


def read_figures(run_dir: Path) -> Figures:
    """The newest figures of a run, from the end of metrics.jsonl."""
    step, loss, eval_loss, written = 0, None, None, None
    rates: list[float] = []
    for line in _tail(run_dir / METRICS_NAME):
        try:
            values = parse_object(line.encode(), METRICS_NAME, "")
        except UserError:  # Cut off, or damaged.
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
    rates = rates[-PACE_STEPS:]
    pace = len(rates) / sum(1 / rate for rate in rates) if rates else None
    return Figures(step=step, loss=loss, eval_loss=eval_loss, tokens_per_second=pace, time=written)


def total_steps(run_dir: Path, config: Config) -> int | None:
    """Steps of the whole run; None while its data is not prepared."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    rows = _nested(object_or_empty(run_dir / DATA_NAME), "splits", "train", "rows")
    if not isinstance(rows, int):
        return None
    return config.train.epochs * -(-rows // config.train.global_batch)


def seconds_left(figures: Figures, total: int | None, config: Config) -> float | None:
    """At the pace of the last steps; None where that is not known."""
    if total is None or not figures.tokens_per_second or figures.step == 0:
        return None
    tokens = (total - figures.step) * config.train.global_batch * config.data.sequence_length
    return max(0.0, tokens / figures.tokens_per_second)


def newest_saved(run_dir: Path) -> Saved | None:
    """The newest checkpoint by name; its bytes are not checked (`distlora verify` does)."""
    for folder in reversed(steps(run_dir / CHECKPOINTS)):
        with contextlib.suppress(OSError):  # Pruned meanwhile.
            return Saved(step=step_of(folder), path=folder, time=(folder / MANIFEST_NAME).stat().st_mtime)
    return None


def read_ending(run_dir: Path) -> Ending:
    """How the last start ended: the later of a stop and a failure; neither where it was killed, or still runs."""
    stopped = object_or_empty(run_dir / STOPPED_NAME)
    log_dir = run_dir / "logs"
    errors = [error for _, error in read_errors(log_dir)]
    failure = first_failure(log_dir, {}, errors)
    failed = max((error["time"] for error in errors), default=0.0)
    if stopped and (_number(stopped.get("time")) or math.inf) >= failed:
        return Ending(stopped=stopped)
    if failure is not None:
        return Ending(error=failure.message, bad_input=failure.bad_input)
    return Ending()


def was_started(run_dir: Path) -> bool:
    """Whether workers have ever written something."""
    return (run_dir / METRICS_NAME).exists() or any((run_dir / "logs").glob("rank_*"))


def age(moment: float) -> str:
    """`12 s`, `3 min`, `2 h`, `5 days` since a moment (seconds since 1970)."""
    return roughly(max(0.0, time.time() - moment))


def _tail(path: Path) -> list[str]:
    """The whole lines at the end of a file."""
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


def _nested(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
