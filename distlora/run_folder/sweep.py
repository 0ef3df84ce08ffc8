"""Layout and records of a sweep folder. Needs neither torch nor Optuna.

SWEEP/sweep.yaml       search space, method and shared overrides; written once
SWEEP/results.json     state and result of each trial (TrialRecord): the one record, shared by all workers
SWEEP/results.md, importance.json
SWEEP/trials/0007/     run folder of trial 7
SWEEP/packs/0/         multi-trial worker 0, with sweep.packed > 1 (distlora/training/multi_trial/protocol.py)
SWEEP/logs/            output of workers and trials
SWEEP/report.html      `distlora report SWEEP`
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import Shape, read_object
from distlora.system import atomic_io

SWEEP_NAME, RESULTS_NAME = "sweep.yaml", "results.json"
IMPORTANCE_RECORD = "importance.json"
"""Importance of each setting, once the sweep is over."""
TRIALS, PACKS = "trials", "packs"
CANCELLED_NAME = "cancelled"
"""File in a trial's run folder: `distlora cancel` stopped this trial, so it does not continue with the sweep."""

WAITING, RUNNING, COMPLETE, PRUNED, FAILED = "waiting", "running", "complete", "pruned", "failed"
SAVED = "saved"
"""State of an unfinished trial while nothing runs; its record still reads `running` (`at_rest`)."""
STATES = (COMPLETE, PRUNED, RUNNING, SAVED, WAITING, FAILED)
"""States in the order of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """Result of one trial."""

    number: int
    state: str
    """One of STATES."""
    values: Mapping[str, Any]
    """Searched settings and their values."""
    value: float | None = None
    """Last measured value of the sweep's metric; None before the first, and for a diverged trial."""
    step: int | None = None
    """Optimizer steps done."""
    reason: str | None = None
    """Reason why it failed or was pruned."""
    seconds: float | None = None
    """Seconds from start to end; for a multi-trial run the shared time."""
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None
    """Peak memory per rank in bytes; shared by trials that are trained together."""
    evaluations: Mapping[int, float] = field(default_factory=dict)
    """Values of the metric by step."""
    rungs: Mapping[str, float] = field(default_factory=dict)
    """What the pruner keeps of it: for successive halving the value at each rung that it reached, by Optuna's names."""
    owner: Mapping[str, Any] | None = None
    """Process of the worker that trains it, as JSON; None if no worker has it."""
    place: str | None = None
    """Name of that worker's record in SWEEP/machines."""
    ended: float | None = None
    """Time of its end, in seconds since 1970."""

    @property
    def is_open(self) -> bool:
        """True until the trial has ended."""
        return self.state in (WAITING, RUNNING, SAVED)

    def folder(self, sweep: Path) -> Path:
        """Return the trial's run folder."""
        return trial_folder(sweep, self.number)


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return sweep / TRIALS / f"{number:04d}"


def sweep_of(run_dir: Path) -> Path | None:
    """Return the sweep folder that a run folder belongs to; None for a run outside of a sweep."""
    folder = run_dir.parent.parent
    return folder if run_dir.parent.name == TRIALS and is_sweep_folder(folder) else None


def is_sweep_folder(folder: Path) -> bool:
    """Return whether `distlora sweep` made this folder."""
    return (folder / SWEEP_NAME).is_file()


_MAYBE = {kind: (kind, type(None)) for kind in (int, float, str)}
_TRIAL: Shape = {
    "number": int,
    "state": str,
    "values": dict,
    "value?": _MAYBE[float],
    "step?": _MAYBE[int],
    "reason?": _MAYBE[str],
    "seconds?": _MAYBE[float],
    "trainable_parameters?": _MAYBE[int],
    "peak_memory_bytes?": _MAYBE[int],
    "evaluations?": {"*": float},
    "rungs?": {"*": float},
    "owner?": (dict, type(None)),
    "place?": _MAYBE[str],
    "ended?": _MAYBE[float],
}


def write_results(sweep: Path, trials: Sequence[TrialRecord]) -> None:
    """Replace SWEEP/results.json atomically."""
    atomic_io.write_json(sweep / RESULTS_NAME, {"trials": [dataclasses.asdict(trial) for trial in trials]})


def read_results(sweep: Path) -> list[TrialRecord]:
    """Return the trials by number. Raises UserError for missing or damaged results."""
    path = sweep / RESULTS_NAME
    if not path.is_file():
        raise UserError(f"{sweep} holds no results of a sweep ({RESULTS_NAME}); start one with `distlora sweep`")
    remedy = "restore a complete copy, or start the sweep again in another folder"
    values = read_object(path, remedy, {"trials": [_TRIAL]})
    known = {item.name for item in dataclasses.fields(TrialRecord)}
    records = []
    for entry in values["trials"]:
        fields = {name: value for name, value in entry.items() if name in known}
        evaluations = fields.get("evaluations", {})
        if not (all(map(str.isdecimal, evaluations)) and entry["state"] in STATES):
            raise UserError(f"{path} is damaged: trial {entry['number']} is invalid; {remedy}")
        fields["evaluations"] = {int(step): loss for step, loss in evaluations.items()}
        records.append(TrialRecord(**fields))
    return sorted(records, key=lambda record: record.number)


def write_importance(sweep: Path, shares: Mapping[str, float], how: str) -> None:
    """Write SWEEP/importance.json: the importance of each setting, and the method of calculation."""
    atomic_io.write_json(sweep / IMPORTANCE_RECORD, {"shares": dict(shares), "how": how})


def read_importance(sweep: Path) -> tuple[dict[str, float], str]:
    """Return (importance of each setting, method); empty if there is no record. Raises UserError for a damaged one."""
    path = sweep / IMPORTANCE_RECORD
    if not path.is_file():
        return {}, ""
    values = read_object(path, "delete it", {"shares": {"*": float}, "how": str})
    return values["shares"], values["how"]


def at_rest(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials with state `saved` for `running`, for a sweep in which nothing runs."""
    return [dataclasses.replace(trial, state=SAVED) if trial.state == RUNNING else trial for trial in trials]


def counted(trials: Sequence[TrialRecord]) -> str:
    """Return `2 complete, 1 failed`: the number of trials in each state."""
    counts = Counter(trial.state for trial in trials)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def best_of(trials: Sequence[TrialRecord], direction: str) -> TrialRecord | None:
    """Return the complete trial with the best value; the first of equal ones. `direction`: minimize or maximize."""
    complete = [trial for trial in trials if trial.state == COMPLETE and trial.value is not None]
    return min(complete, key=lambda trial: _place(trial, direction), default=None)


def ranked(trials: Sequence[TrialRecord], direction: str) -> list[TrialRecord]:
    """Sort the trials, best first; then pruned, running, waiting and failed ones."""
    return sorted(trials, key=lambda trial: (STATES.index(trial.state), _place(trial, direction)))


def _place(trial: TrialRecord, direction: str) -> tuple[float, int]:
    if trial.value is None:
        return math.inf, trial.number
    return trial.value if direction == "minimize" else -trial.value, trial.number


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values as Hydra overrides."""
    return [f"{setting}={_word(value)}" for setting, value in values.items()]


_PLAIN_WORD = re.compile(r"[A-Za-z_./][\w./@+-]*")
"""Text that Hydra reads unquoted."""
_OTHER_KIND = re.compile(r"(?i)(null|true|false|nan|inf)")


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, Mapping):
        pairs = {re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", str(key)): _word(item) for key, item in value.items()}
        return "{" + ",".join(f"{key}:{item}" for key, item in pairs.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN_WORD.fullmatch(value) and not _OTHER_KIND.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    # Backslashes at the end of a quoted text are doubled, or they would escape its quote.
    return f"'{escaped}" + "\\" * (len(value) - len(value.rstrip("\\"))) + "'"
