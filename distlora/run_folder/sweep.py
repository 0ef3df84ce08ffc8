"""What a sweep's folder says of its trials: the names in it, and its records. Needs neither torch nor Optuna.

```
SWEEP/sweep.yaml       what is searched and how, and the words that all trials share; made once
SWEEP/journal.log      Optuna's: the truth about the trials, shared by all workers
SWEEP/results.json     what came of each, made from the journal after each change (TrialRecord)
SWEEP/results.md, parallel_coordinates.png, importance.png, importance.json
SWEEP/trials/0007/     the run folder of trial 7
SWEEP/packs/0/         the pack of worker 0, with sweep.packed > 1 (distlora/training/multi_trial/protocol.py)
SWEEP/logs/            what workers and trials print
SWEEP/report.html      `distlora report SWEEP`
```
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.system import atomic_io

SWEEP_NAME, JOURNAL_NAME, RESULTS_NAME = "sweep.yaml", "journal.log", "results.json"
IMPORTANCE_RECORD = "importance.json"
"""How much of the differences each setting makes, once the sweep is over: what importance.png shows."""
TRIALS, PACKS = "trials", "packs"
CANCELLED_NAME = "cancelled"
"""In a trial's run folder: `distlora cancel` has asked it alone to stop, so that it does not go on with the sweep."""

WAITING, RUNNING, COMPLETE, PRUNED, FAILED = "waiting", "running", "complete", "pruned", "failed"
SAVED = "saved"
"""Of a trial that was begun and is not at its end, while nothing runs: what a record calls running (`at_rest`)."""
STATES = (COMPLETE, PRUNED, RUNNING, SAVED, WAITING, FAILED)
"""In the order of a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """What came of one trial."""

    number: int
    state: str
    """One of STATES."""
    values: Mapping[str, Any]
    """What was searched: setting -> value."""
    value: float | None = None
    """Of the sweep's metric: the last that was measured; None before the first, and of a trial that diverged."""
    step: int | None = None
    """Optimizer steps behind it."""
    reason: str | None = None
    """Why it failed or was pruned, in a sentence."""
    seconds: float | None = None
    """From its start to its end; of a packed trial, those of the pack in that time."""
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None
    """Of a rank; of a packed trial, the pack's."""
    evaluations: Mapping[int, float] = field(default_factory=dict)
    """The metric by step."""

    @property
    def is_open(self) -> bool:
        """Whether it has not come to its end."""
        return self.state in (WAITING, RUNNING, SAVED)

    def folder(self, sweep: Path) -> Path:
        """Its run folder."""
        return trial_folder(sweep, self.number)


def trial_folder(sweep: Path, number: int) -> Path:
    """The run folder of a trial."""
    return sweep / TRIALS / f"{number:04d}"


def sweep_of(run_dir: Path) -> Path | None:
    """The sweep that a run folder is a trial of; None of a run of its own."""
    folder = run_dir.parent.parent
    return folder if run_dir.parent.name == TRIALS and is_sweep_folder(folder) else None


def is_sweep_folder(folder: Path) -> bool:
    """Whether `distlora sweep` made this folder."""
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
}


def write_results(sweep: Path, trials: Sequence[TrialRecord]) -> None:
    """SWEEP/results.json, in one step."""
    atomic_io.write_json(sweep / RESULTS_NAME, {"trials": [dataclasses.asdict(trial) for trial in trials]})


def read_results(sweep: Path) -> list[TrialRecord]:
    """The trials, by number. Raises UserError for a folder without results, and for damaged ones."""
    path = sweep / RESULTS_NAME
    if not path.is_file():
        raise UserError(f"{sweep} holds no results of a sweep ({RESULTS_NAME}); start one with `distlora sweep`")
    remedy = "delete it and `distlora resume` the sweep, which makes it again"
    values = read_object(path, remedy)
    check_shape(values, {"trials": [_TRIAL]}, path, remedy)
    known = {item.name for item in dataclasses.fields(TrialRecord)}
    records = []
    for entry in values["trials"]:
        own = {name: value for name, value in entry.items() if name in known}
        evaluations = own.get("evaluations", {})
        if not (all(map(str.isdecimal, evaluations)) and entry["state"] in STATES):
            raise UserError(f"{path} is damaged: trial {entry['number']} is no record of one; {remedy}")
        own["evaluations"] = {int(step): loss for step, loss in evaluations.items()}
        records.append(TrialRecord(**own))
    return sorted(records, key=lambda record: record.number)


def write_importance(sweep: Path, shares: Mapping[str, float], how: str) -> None:
    """SWEEP/importance.json: the share of each setting, and by what it was calculated."""
    atomic_io.write_json(sweep / IMPORTANCE_RECORD, {"shares": dict(shares), "how": how})


def read_importance(sweep: Path) -> tuple[dict[str, float], str]:
    """(share of each setting, by what); empty where there is none. Raises UserError for a damaged record."""
    path = sweep / IMPORTANCE_RECORD
    if not path.is_file():
        return {}, ""
    values = read_object(path, "delete it")
    check_shape(values, {"shares": {"*": float}, "how": str}, path, "delete it")
    return values["shares"], values["how"]


def at_rest(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials of a sweep in which nothing runs, whatever its records called them when they were written."""
    return [dataclasses.replace(trial, state=SAVED) if trial.state == RUNNING else trial for trial in trials]


def counted(trials: Sequence[TrialRecord]) -> str:
    """`2 complete, 1 failed`: how many are in each state."""
    found = Counter(trial.state for trial in trials)
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


def best_of(trials: Sequence[TrialRecord], direction: str) -> TrialRecord | None:
    """The trial with the best value among those that ran to their end; the first of equal ones. `direction`: minimize
    or maximize."""
    complete = [trial for trial in trials if trial.state == COMPLETE and trial.value is not None]
    return min(complete, key=lambda trial: _place(trial, direction), default=None)


def ranked(trials: Sequence[TrialRecord], direction: str) -> list[TrialRecord]:
    """The best first; then those that were pruned, run, wait, failed."""
    return sorted(trials, key=lambda trial: (STATES.index(trial.state), _place(trial, direction)))


def _place(trial: TrialRecord, direction: str) -> tuple[float, int]:
    if trial.value is None:
        return math.inf, trial.number
    return trial.value if direction == "minimize" else -trial.value, trial.number


def words_of(values: Mapping[str, Any]) -> list[str]:
    """A trial's values as words of `distlora train`, in Hydra's grammar."""
    return [f"{setting}={_word(value)}" for setting, value in values.items()]


_PLAIN_WORD = re.compile(r"[A-Za-z_./][\w./@+-]*")
"""What Hydra reads as the text that it is, without quotes."""
_OTHER_KIND = re.compile(r"(?i)(null|true|false|nan|inf)")


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN_WORD.fullmatch(value) and not _OTHER_KIND.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return f"'{escaped}{_trailing(value)}'"


def _trailing(value: str) -> str:
    """Backslashes that keep those at the end of a quoted text from escaping its quote."""
    return "\\" * (len(value) - len(value.rstrip("\\")))
