"""Read what a run folder holds for its report and its status, in whatever state it is.

What cannot be read for a report is listed as a problem; of the newest figures it is None. Imports no torch.
"""

import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError
from distlora.config.errors import in_one_line
from distlora.config.file import load_config
from distlora.config.json_files import Shape, check_shape, parse_object, read_object
from distlora.planner.memory.measured import RECORDED
from distlora.results.figures import Curve, Style, is_number
from distlora.run_folder.expert_load import EXPERT_TOKENS, ExpertTokens, expert_tokens_in
from distlora.run_folder.layout import (
    BEST_NAME,
    BEST_STEP_NAME,
    CHECKPOINTS,
    DATA_NAME,
    ENVIRONMENT,
    MANIFEST_NAME,
    METRICS_NAME,
    PLAN_NAME,
    STATE_NAME,
    SUMMARY_NAME,
    checkpoint_folders,
    find_result,
    step_of,
    steps,
)
from distlora.run_folder.stages import stage_rows
from distlora.system.numbers import length
from distlora.system.progress import OBJECTIVE_FORMATS

SAMPLES_NAME = "samples.jsonl"
SMOOTHED_FROM = 12
"""Values from which their mean is drawn beside them."""
_LINE_KEYS = ("step", "time")

_NUMBER = (float, type(None))
_PLAN: Shape = RECORDED | {
    "model?": {"name?": str, "model_type?": str, "parameters?": int, "parameters_quantized?": int},
    "machine?": RECORDED["machine?"] | {"name?": str, "ranks?": int, "ranks_per_machine?": int, "host_bytes?": _NUMBER},
    "host?": {"while_training?": float, "machine?": float},
    "disk?": {"checkpoint?": float, "result?": float},
    "wire?": {"gathered?": float, "exchanged?": float, "reduced?": float, "reduced_rows?": float, "scattered?": float},
    "time?": ({"tokens_per_second?": float, "seconds?": float}, type(None)),
    "fits?": (bool, type(None)),
    "trials?": int,
}
_FIGURES = """
    peak_memory_bytes resident_memory_bytes trainable_parameters active_parameters train_seconds tokens_per_second
    bits_per_parameter adapter_bytes gathered_bytes_per_step reduced_bytes_per_step scattered_bytes_per_step
    exchanged_bytes_per_step base_eval_loss initial_eval_loss eval_loss best_eval_loss memory/peak memory/planned
"""
_SUMMARY: Shape = {
    "parameters_without_gradient?": [str],
    "expert_layers_without_adapter?": [str],
    "best_step?": (int, type(None)),
    **{f"{name}?": _NUMBER for name in _FIGURES.split()},
}
_TEXT = (str, type(None))
_SOURCE: Shape = {"path?": str, "documents?": int, "targets?": int, "share?": _NUMBER} | {
    f"{name}?": _TEXT for name in ("name", "split", "commit")
}
_DATA: Shape = {
    "content?": str,
    "splits?": {"*": {"documents?": int, "rows?": int, "tokens?": int, "targets?": int, "sources?": [_SOURCE]}},
}
_STATE: Shape = {
    "environment?": ENVIRONMENT,
    "identity?": {"base_fingerprint?": str, "data_digest?": str},
}
_SAMPLE: Shape = {"step": int, "prompt": str, "text": str} | {
    **{f"{name}?": _TEXT for name in ("image", "category", "before")},
    **{f"{name}?": _NUMBER for name in ("reward", "reward_before")},
}


@dataclass(frozen=True, slots=True)
class Series:
    """Finite values, by rising steps."""

    steps: Sequence[float]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_constant(self) -> bool:
        """Return True if all values are equal."""
        return len(set(self.values)) <= 1

    def at(self, step: float) -> float | None:
        """Return the value at exactly this step."""
        index = bisect_left(self.steps, step)
        return self.values[index] if index < len(self) and self.steps[index] == step else None

    def curve(self, name: str, *, colour: int = 0, style: Style = "line", is_named: bool = True) -> Curve:
        """Return the series as a curve to draw."""
        return Curve(name=name, x=self.steps, y=self.values, colour=colour, style=style, is_named=is_named)

    def lowest(self) -> tuple[float, float]:
        """Return (step, value) of the smallest value."""
        index = min(range(len(self)), key=self.values.__getitem__)
        return self.steps[index], self.values[index]


@dataclass(slots=True)
class Metrics:
    """The readable records of RUN/metrics.jsonl."""

    training: dict[str, Series] = field(default_factory=dict)
    """Figures of training steps, by name."""
    held_out: dict[str, Series] = field(default_factory=dict)
    """Figures of evaluations, by name; step 0 is before the first step."""
    non_finite: list[tuple[int, str]] = field(default_factory=list)
    """(step, figure) of what was NaN or infinite."""
    damaged: int = 0
    """Number of lines that are no record of a step."""
    step: int = 0
    """The last step recorded."""
    began: float | None = None
    ended: float | None = None
    """Times of the first and the last line, in seconds since 1970."""
    expert_tokens: tuple[int, ExpertTokens] | None = None
    """(step, tokens that chose each expert up to it), the newest; None without a mixture of experts."""

    def weights(self, series: Series) -> list[float] | None:
        """Return the weight of each value in a mean over steps: its step's target tokens, pairs or answers.

        They are relative to the largest. None if they were not recorded.
        """
        units = next(filter(None, map(self.training.get, ("target_tokens", "pairs", "answers"))), None)
        if units is None or (most := max(units.values)) <= 0:
            return None
        # Small and damaged counts are raised to a share that sums do not lose.
        return [max((units.at(step) or 0) / most, 1e-6) for step in series.steps]


@dataclass(frozen=True, kw_only=True, slots=True)
class PageStatus:
    """The state of a run or sweep while its report is written."""

    state: str
    """queued, running, ending, done, stopped, failed, ended, new."""
    headline: str
    """The state as the end of a sentence: `has stopped after step 40, which is saved`."""
    error: str | None = None
    """The whole error of a failed run."""
    commands: tuple[tuple[str, str], ...] = ()
    """(command, what it does) of the commands to type next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenSample:
    """Text that the model wrote after a step."""

    step: int
    prompt: str
    text: str
    image: str | None = None
    """File of the image that the prompt is about."""
    category: str | None = None
    """best, worst or changed, of an answer to a held-out prompt that has a reward."""
    reward: float | None = None
    reward_before: float | None = None
    before: str | None = None
    """Answer of the evaluation before, and its reward, of a changed one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFolder:
    """A folder of tensors in a run folder."""

    name: str
    what: str
    step: int | None
    nbytes: int
    is_whole: bool
    """True if the save was completed; `distlora verify` checks its bytes."""


@dataclass(kw_only=True, slots=True)
class RunRecords:
    """A run folder as far as it can be read."""

    folder: Path
    config: Config | None = None
    """None if the settings are damaged."""
    stages: list[tuple[str, str]] = field(default_factory=list)
    """Each stage of a run whose settings changed, with those that did."""
    metrics: Metrics = field(default_factory=Metrics)
    plan: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """state.json of the newest checkpoint."""
    samples: list[WrittenSample] = field(default_factory=list)
    saved: list[SavedFolder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One sentence for each record that could not be read."""

    @property
    def name(self) -> str:
        """Return the name of the run's folder; of a trial, whose folder has a number, with its sweep's."""
        parts = [part for part in self.folder.parts if part != "trials"]
        return "/".join(parts[-2:] if self.folder.name.isdecimal() else parts[-1:])


def read_run(folder: Path) -> RunRecords:
    """Read everything in a run folder. Raises nothing for missing or damaged records."""
    records = RunRecords(folder=folder)
    problems = records.problems
    with recorded(problems):
        records.config = load_config(folder)
    if records.config is not None:
        with recorded(problems):
            records.stages = stage_rows(records.config)
    with recorded(problems):
        records.metrics = read_metrics(folder / METRICS_NAME)
    if records.metrics.damaged:
        lines = "a line is" if records.metrics.damaged == 1 else f"{records.metrics.damaged:,} lines are"
        problems.append(f"{METRICS_NAME}: {lines} not a record of a step, and skipped")
    records.plan = _record(folder / PLAN_NAME, _PLAN, problems)
    records.summary = _record(folder / SUMMARY_NAME, _SUMMARY, problems)
    records.data = _record(folder / DATA_NAME, _DATA, problems)
    with recorded(problems):
        records.samples = _samples(folder / SAMPLES_NAME, problems)
    with recorded(problems):
        records.saved = _saved(folder, problems)
    with recorded(problems):
        states = [step / STATE_NAME for step in checkpoint_folders(folder) if (step / STATE_NAME).is_file()]
        records.state = _record(states[-1], _STATE, problems) if states else {}
    return records


@contextlib.contextmanager
def recorded(problems: list[str]) -> Iterator[None]:
    """Turn an error of reading into a problem, so that the rest of the page is made."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(in_one_line(f"{error.filename or 'a file'}: {error.strerror or error}"))


def _record(path: Path, shape: Shape, problems: list[str]) -> dict[str, Any]:
    """Return the object in a file; an empty one if it is missing or damaged."""
    with recorded(problems):
        if path.exists() or path.is_symlink():
            return read_object(path, "it is left out of this report", shape)
    return {}


def _samples(path: Path, problems: list[str]) -> list[WrittenSample]:
    samples, damaged = [], 0
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = parse_object(line, "", "")
            check_shape(entry, _SAMPLE, "", "")
            known = (name.removesuffix("?") for name in _SAMPLE)
            samples.append(WrittenSample(**{name: entry[name] for name in known if name in entry}))
        except UserError:
            damaged += number < len(lines) - 1  # The last may be cut off.
    if damaged:
        problems.append(f"{path.name}: {damaged:,} line{'s are' if damaged > 1 else ' is'} not a sample, and skipped")
    return samples


def _saved(folder: Path, problems: list[str]) -> list[SavedFolder]:
    """Return the checkpoints, oldest first, then the best one and the result."""
    folders = []
    for step in checkpoint_folders(folder):
        is_whole = (step / MANIFEST_NAME).is_file()
        folders.append(_saved_folder(step, f"checkpoints/{step.name}", "checkpoint", step_of(step), is_whole=is_whole))
    if (best := folder / BEST_NAME).is_dir():
        number = _record(best / BEST_STEP_NAME, {"step?": int}, problems).get("step")
        folders.append(_saved_folder(best, BEST_NAME, "lowest held-out loss", number))
    if (result := find_result(folder)) is not None:
        folders.append(_saved_folder(result, result.name, "result", None))
    return folders


def _saved_folder(folder: Path, name: str, what: str, step: int | None, *, is_whole: bool = True) -> SavedFolder:
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return SavedFolder(name=name, what=what, step=step, nbytes=nbytes, is_whole=is_whole)


def read_metrics(path: Path, *, tail: int | None = None) -> Metrics:
    """Read the figures of a run, or of the last `tail` bytes of its file; lines that are no record are counted.

    Raises OSError if the file cannot be read.
    """
    metrics = Metrics()
    if not path.is_file():  # Reading a pipe would wait for a writer.
        return metrics
    points: dict[tuple[bool, str], dict[int, float]] = {}
    with path.open("rb") as file:
        cut = max(0, file.seek(0, os.SEEK_END) - tail) if tail is not None else 0
        file.seek(cut)
        lines = file.read().split(b"\n")[1 if cut else 0 :]
    for number, line in enumerate(lines):
        entry = _entry(line)
        if entry is None:
            # A run that goes on, or a kill, has cut off the last.
            metrics.damaged += bool(line.strip()) and number < len(lines) - 1
            continue
        step, is_held_out = entry["step"], "eval_loss" in entry
        metrics.step = max(metrics.step, step)
        if is_number(when := entry.get("time")):
            metrics.began = when if metrics.began is None else metrics.began
            metrics.ended = when
        if (load := expert_tokens_in(entry.get(EXPERT_TOKENS))) is not None:
            metrics.expert_tokens = step, load
        for name, value in entry.items():
            if is_number(value) and name not in _LINE_KEYS:
                points.setdefault((is_held_out, name), {})[step] = float(value)
            elif value is None:
                metrics.non_finite.append((step, name))
    for (is_held_out, name), values in points.items():
        (metrics.held_out if is_held_out else metrics.training)[name] = series_of(values)
    return metrics


def series_of(values: Mapping[int, float]) -> Series:
    """Return a series of values by step."""
    steps = sorted(values)
    return Series(steps, [values[step] for step in steps])


def smoothed(series: Series, window: int, weights: Sequence[float] | None = None) -> Series:
    """Return the centred mean of `window` values, weighted; near the ends of fewer, down to half of them."""
    weights = [1.0] * len(series) if weights is None else weights
    sums = [0.0, *accumulate(value * weight for value, weight in zip(series.values, weights, strict=True))]
    totals = [0.0, *accumulate(weights)]
    half, count = window // 2, len(series)
    nearest = max(half // 2, min(1, half))
    inside = range(nearest, count - nearest)
    means = []
    for index in inside:
        reach = min(half, index, count - 1 - index)
        first, end = index - reach, index + reach + 1
        means.append((sums[end] - sums[first]) / (totals[end] - totals[first]))
    return Series([series.steps[index] for index in inside], means)


def window_of(series: Series) -> int:
    """Return an odd smoothing window, about a sixteenth of the values."""
    return max(5, len(series) // 16) | 1


def _entry(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        entry = parse_object(line, "", "")
    except UserError:
        return None
    step = entry.get("step")
    return entry if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53 else None


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
    objective: Mapping[str, float] = field(default_factory=dict)
    """The newest figures that the objective adds to the loss (reward, margin, accuracy), by the metric's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewestSave:
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
    metrics = Metrics()
    with contextlib.suppress(OSError):
        metrics = read_metrics(run_dir / METRICS_NAME, tail=TAIL_BYTES)
    training, held_out = metrics.training, metrics.held_out.get("eval_loss")
    newest = {name: training[name].values[-1] for name in ("loss", "peak_memory_bytes") if name in training}
    rates = [rate for rate in training["tokens_per_second"].values if rate] if "tokens_per_second" in training else []
    rates = rates[-PACE_STEPS:]
    return Figures(
        step=metrics.step,
        eval_loss=held_out.values[-1] if held_out is not None and held_out.steps[-1] > 0 else None,
        tokens_per_second=len(rates) / sum(1 / rate for rate in rates) if rates else None,
        time=metrics.ended,
        objective={name: training[name].values[-1] for name in OBJECTIVE_FORMATS if name in training},
        **newest,
    )


def total_steps(steps_over: Callable[[int], int], data: Mapping[str, Any]) -> int | None:
    """Return the number of steps of the whole run (Config.total_steps), given its data.json; None if it is unknown."""
    rows = 0
    with contextlib.suppress(LookupError, TypeError, ValueError):  # The data is not prepared yet.
        rows = int(data["splits"]["train"]["rows"])
    return steps_over(rows) or None


def seconds_left(figures: Figures, total: int | None, tokens_per_step: int) -> float | None:
    """Return the seconds until the end at the pace of the last steps; None if that is not known."""
    if total is None or not figures.tokens_per_second or figures.step == 0:
        return None
    tokens = (total - figures.step) * tokens_per_step
    return max(0.0, tokens / figures.tokens_per_second)


def newest_saved(run_dir: Path) -> NewestSave | None:
    """Return the newest checkpoint by name, unverified."""
    for folder in reversed(steps(run_dir / CHECKPOINTS)):
        with contextlib.suppress(OSError):  # It was pruned just now.
            return NewestSave(step=step_of(folder), path=folder, time=(folder / MANIFEST_NAME).stat().st_mtime)
    return None


def was_started(run_dir: Path) -> bool:
    """Return whether workers have ever written something."""
    return (run_dir / METRICS_NAME).exists() or any((run_dir / "logs").glob("rank_*"))


def age(moment: float) -> str:
    """Return the time since a moment (seconds since 1970) as `12 s`, `3 min`, `2 h` or `5 days`."""
    return length(max(0.0, time.time() - moment))
