"""The results of a sweep as a table: in the terminal, and as SWEEP/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distlora.run_folder import sweep as sweep_folder
from distlora.run_folder.sweep import TrialRecord, counted, ranked
from distlora.system import atomic_io
from distlora.system.numbers import roughly
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.search import Search
from distlora_launcher.terminal.output import aligned, shown

RESULTS_MD = "results.md"
CONCLUSION_NAME = "conclusion.json"
"""In SWEEP: what a search concludes, for programs (Search.figures); absent where it concludes nothing."""
LONGEST_REASON = 100
"""Characters of a reason in the terminal; results.md has all of it."""


def best_of(sweep: Sweep, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the best value among those that ran to their end."""
    return sweep_folder.best_of(trials, sweep.settings.direction)


def rows(sweep: Sweep, trials: Sequence[TrialRecord], *, longest: int | None = None) -> list[list[str]]:
    """The table's lines, headings first."""
    settings = list(dict.fromkeys(name for trial in trials for name in trial.values))
    lines = [["trial", *settings, sweep.settings.metric, "step", "time", "state", ""]]
    best = best_of(sweep, trials)
    for trial in ranked(trials, sweep.settings.direction):
        note = "best" if trial == best else " ".join((trial.reason or "").split())
        lines.append(
            [
                str(trial.number),
                *(shown_value(trial.values[name]) if name in trial.values else "" for name in settings),
                "" if trial.value is None else f"{trial.value:.4f}",
                "" if trial.step is None else f"{trial.step:,}",
                "" if trial.seconds is None else roughly(trial.seconds),
                trial.state,
                note if longest is None or len(note) <= longest else note[: longest - 4] + " ...",
            ]
        )
    return lines


def text(sweep: Sweep, trials: Sequence[TrialRecord]) -> str:
    """The table for a terminal."""
    return "\n".join(aligned(rows(sweep, trials, longest=LONGEST_REASON)))


def closing(sweep: Sweep, trials: Sequence[TrialRecord]) -> list[str]:
    """Sentences under the table: how many of what, the best and how to go on with it."""
    lines = [f"{len(trials)} trials: {counted(trials)}"] if trials else ["no trial yet"]
    best = best_of(sweep, trials)
    if best is not None:
        run = shown(sweep.run_dir(best.number))
        lines.append(f"the best is trial {best.number}, {run}; go on with: distlora generate {run}")
    return lines


def write_table(sweep: Sweep, trials: Sequence[TrialRecord], search: Search) -> None:
    """SWEEP/results.md."""
    table = rows(sweep, trials)
    head, body = table[0], table[1:]
    lines = [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in [head, ["---"] * len(head), *body]]
    parts = [f"# {sweep.folder.name}", "\n".join(lines), "\n".join(f"- {line}" for line in closing(sweep, trials))]
    conclusion = search.conclusion(trials)
    if conclusion:
        parts.append("\n".join(conclusion))
        atomic_io.write_json(sweep.folder / CONCLUSION_NAME, search.figures(trials))
    atomic_io.write_text(sweep.folder / RESULTS_MD, "\n\n".join(parts) + "\n")


def shown_value(value: Any) -> str:
    """A value of a setting, short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"[{','.join(map(shown_value, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
