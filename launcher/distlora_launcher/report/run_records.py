"""All that a run folder holds for its report, whatever state it is in: what cannot be read is said, and left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError
from distlora.config.errors import in_one_line
from distlora.config.file import load_config
from distlora.config.json_files import (
    Shape,
    check_shape,
    parse_object,
    read_object,
)
from distlora.planner.memory.measured import RECORDED
from distlora.run_folder.checkpoints import MANIFEST_NAME, STATE_NAME, step_of
from distlora.run_folder.layout import (
    BEST_NAME,
    BEST_STEP_NAME,
    DATA_NAME,
    ENVIRONMENT,
    METRICS_NAME,
    PLAN_NAME,
    SUMMARY_NAME,
    checkpoint_folders,
    find_result,
)
from distlora_launcher.report.series import Metrics, read_metrics

SAMPLES_NAME = "samples.jsonl"

_NUMBER = (float, type(None))
_BYTES: Shape = {"*": int}
_PLAN: Shape = RECORDED | {
    "model?": {"name?": str, "model_type?": str, "parameters?": int, "parameters_in_4_bit?": int},
    "machine?": RECORDED["machine?"] | {"name?": str, "ranks?": int, "ranks_per_machine?": int, "host_bytes?": _NUMBER},
    "host?": {"while_training?": float, "machine?": float},
    "disk?": {"checkpoint?": float, "result?": float},
    "wire?": {"gathered?": float, "reduced?": float, "reduced_rows?": float, "scattered?": float},
    "time?": ({"tokens_per_second?": float, "seconds?": float}, type(None)),
    "fits?": (bool, type(None)),
    "trials?": int,
}
_SUMMARY: Shape = {
    "parameters_without_gradient?": [str],
    "best_step?": (int, type(None)),
    **{
        f"{name}?": _NUMBER
        for name in (
            "peak_memory_bytes",
            "trainable_parameters",
            "active_parameters",
            "train_seconds",
            "tokens_per_second",
            "bits_per_parameter",
            "adapter_bytes",
            "gathered_bytes_per_step",
            "reduced_bytes_per_step",
            "scattered_bytes_per_step",
            "base_eval_loss",
            "initial_eval_loss",
            "eval_loss",
            "best_eval_loss",
            "memory/peak",
            "memory/planned",
        )
    },
}
_SOURCE: Shape = {
    "path?": str,
    "name?": (str, type(None)),
    "split?": (str, type(None)),
    "commit?": (str, type(None)),
    "documents?": int,
    "targets?": int,
    "share?": _NUMBER,
}
_DATA: Shape = {
    "content?": str,
    "splits?": {"*": {"documents?": int, "rows?": int, "tokens?": int, "targets?": int, "sources?": [_SOURCE]}},
}
_STATE: Shape = {
    "environment?": ENVIRONMENT,
    "identity?": {"base_fingerprint?": str, "data_digest?": str},
}
_SAMPLE: Shape = {"step": int, "prompt": str, "text": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a run or sweep stands while the report is written; the launcher, which can ask who runs it, says."""

    state: str
    """queued, running, ending, done, stopped, failed, ended, new."""
    said: str
    """What follows its name in a sentence: `has stopped after step 40, which is saved`."""
    error: str | None = None
    """Why it failed, in full."""
    commands: tuple[tuple[str, str], ...] = ()
    """What can be typed now, and what that does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the model wrote after so many steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A folder of tensors in a run."""

    name: str
    what: str
    step: int | None
    nbytes: int
    is_whole: bool
    """Whether what ends a save is there; its bytes are not checked (`distlora verify` does)."""


@dataclass(kw_only=True, slots=True)
class RunRecords:
    folder: Path
    config: Config | None = None
    """None where the settings are damaged."""
    metrics: Metrics = field(default_factory=Metrics)
    plan: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """Of the newest checkpoint."""
    samples: list[Sample] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What could not be read, and what to do, a sentence each."""

    @property
    def name(self) -> str:
        return self.folder.name if self.config is None else self.config.name


def read_run(folder: Path) -> RunRecords:
    """Everything of a run. Raises nothing for what is missing or damaged."""
    found = RunRecords(folder=folder)
    problems = found.problems
    with noted(problems):
        found.config = load_config(folder)
    with noted(problems):
        found.metrics = read_metrics(folder / METRICS_NAME)
    if found.metrics.damaged:
        lines = "a line is" if found.metrics.damaged == 1 else f"{found.metrics.damaged:,} lines are"
        problems.append(f"{METRICS_NAME}: {lines} no record of a step, and left out")
    found.plan = _record(folder / PLAN_NAME, _PLAN, problems)
    found.summary = _record(folder / SUMMARY_NAME, _SUMMARY, problems)
    found.data = _record(folder / DATA_NAME, _DATA, problems)
    with noted(problems):
        found.samples = _samples(folder / SAMPLES_NAME, problems)
    with noted(problems):
        found.saved = _saved(folder, problems)
    with noted(problems):
        found.state = _newest_state(folder, problems)
    return found


@contextlib.contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """What cannot be read is a problem to be said, and the rest of the page is made."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(in_one_line(f"{error.filename or 'a file'}: {error.strerror or error}"))


def _record(path: Path, shape: Shape, problems: list[str]) -> dict[str, Any]:
    """The object in a file; empty where there is none, or none that can be read."""
    with noted(problems):
        if path.exists() or path.is_symlink():
            values = read_object(path, "it is left out of this report")
            check_shape(values, shape, path, "it is left out of this report")
            return values
    return {}


def _samples(path: Path, problems: list[str]) -> list[Sample]:
    found, damaged = [], 0
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = parse_object(line, "", "")
            check_shape(entry, _SAMPLE, "", "")
            found.append(Sample(step=entry["step"], prompt=entry["prompt"], text=entry["text"]))
        except UserError:
            damaged += number < len(lines) - 1  # The last may be cut off.
    if damaged:
        problems.append(f"{path.name}: {damaged:,} line{'s are' if damaged > 1 else ' is'} no sample, and left out")
    return found


def _newest_state(folder: Path, problems: list[str]) -> dict[str, Any]:
    states = [step / STATE_NAME for step in checkpoint_folders(folder) if (step / STATE_NAME).is_file()]
    return _record(states[-1], _STATE, problems) if states else {}


def _saved(folder: Path, problems: list[str]) -> list[Saved]:
    """The checkpoints, oldest first, the best, the result."""
    found = []
    for step in checkpoint_folders(folder):
        is_whole = (step / MANIFEST_NAME).is_file()
        found.append(_of(step, f"checkpoints/{step.name}", "checkpoint", step_of(step), is_whole=is_whole))
    if (best := folder / BEST_NAME).is_dir():
        number = _record(best / BEST_STEP_NAME, {"step?": int}, problems).get("step")
        found.append(_of(best, BEST_NAME, "lowest held-out loss", number))
    if (result := find_result(folder)) is not None:
        found.append(_of(result, result.name, "result", None))
    return found


def _of(folder: Path, name: str, what: str, step: int | None, *, is_whole: bool = True) -> Saved:
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Saved(name=name, what=what, step=step, nbytes=nbytes, is_whole=is_whole)


def as_text(value: Any) -> str:
    """A setting's value, whole."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def in_short(value: Any) -> str:
    """A setting's value where it is one of many: of a float four digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
