"""Build the report of a sweep from its records (`sweep_report`)."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import SweepConfig
from distlora.results.figures import PAGE_COLOURS, Curve, Figure, draw, is_number, thinned
from distlora.results.page import loss, render, shorten
from distlora.run_folder.layout import METRICS_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, WAITING, TrialRecord, best_of, counted, ranked, words_of
from distlora.system.numbers import count, number, size
from distlora_launcher.report.records import (
    SMOOTHED_FROM,
    PageStatus,
    Series,
    read_metrics,
    recorded,
    series_of,
    smoothed,
    window_of,
)

MAX_CURVE_POINTS = 150
"""Points of a trial's training loss."""


@dataclass(kw_only=True, slots=True)
class SweepRecords:
    """A sweep, as far as its folder can be read."""

    folder: Path
    settings: SweepConfig | None
    """Settings of the search; None if they are damaged."""
    trials: Sequence[TrialRecord]
    shared: Sequence[str] = ()
    """Overrides that all trials have, as typed."""
    conclusion: Sequence[str] = ()
    """Lines of Markdown: the table and recommendation of a rank search."""
    losses: Mapping[int, Series] = field(default_factory=dict)
    """Smoothed training loss by trial."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Share of each setting in the differences between trials."""
    importance_by: str = ""
    """Method by which the importance was calculated."""
    problems: list[str] = field(default_factory=list)
    links: frozenset[int] = frozenset()
    """Trials with a report of their own beside this one."""

    @property
    def metric(self) -> str:
        """Name of the compared figure."""
        return "eval_loss" if self.settings is None else self.settings.metric

    @property
    def direction(self) -> str:
        """`minimize` or `maximize`."""
        return "minimize" if self.settings is None else self.settings.direction

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best value."""
        return best_of(self.trials, self.direction)

    @property
    def searched(self) -> list[str]:
        """The settings in which trials differ."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.values))


def training_losses(sweep: Path, trials: Sequence[TrialRecord], problems: list[str], *, most: int) -> dict[int, Series]:
    """Read the smoothed training loss of each trial; of none if their metrics have more than `most` bytes together."""
    paths = {trial.number: trial.folder(sweep) / METRICS_NAME for trial in trials}
    paths = {number: path for number, path in paths.items() if path.is_file()}
    total = sum(path.stat().st_size for path in paths.values())
    if total > most:
        problems.append(
            f"the training losses of {len(paths):,} trials ({size(total)}) are not drawn; see their own reports"
        )
        return {}
    losses = {}
    for trial, path in paths.items():
        with recorded(problems):
            metrics = read_metrics(path)
            series = metrics.training.get("loss")
            if series is not None:
                weights, is_long = metrics.weights(series), len(series) >= SMOOTHED_FROM
                curve = smoothed(series, window_of(series), weights) if is_long else series
                losses[trial] = Series(*thinned(curve.steps, curve.values, MAX_CURVE_POINTS))
    return losses


def sweep_report(sweep: SweepRecords, status: PageStatus) -> str:
    """Return the report of a sweep, in any state, as one HTML page."""
    best = sweep.best
    importance = {name: share for name, share in sweep.importance.items() if 0 <= share <= 1}
    return render(
        "sweep.html.jinja",
        sweep=sweep,
        status=status,
        links={trial.number: trial.folder(Path()).as_posix() for trial in sweep.trials if trial.number in sweep.links},
        method="" if sweep.settings is None else sweep.settings.method,
        trials=f"{len(sweep.trials)} trials: {counted(sweep.trials)}" if sweep.trials else "No trial has started",
        best=None if best is None else f"{_value(best)}: trial {best.number}, {_values(best)}",
        best_figures=[] if best is None else list(_best_figures(sweep, best)),
        best_commands=[] if best is None else _best_commands(sweep, best),
        ranks=draw(_rank_chart(sweep)),
        table=_table(sweep),
        charts=draw(_curves(sweep)),
        by_setting=draw(_by_setting(sweep)),
        better="lower" if sweep.direction == "minimize" else "higher",
        importance=sorted(importance.items(), key=lambda item: -item[1]),
        failures=[
            (trial, _values(trial), trial.reason or "no reason was recorded")
            for trial in sweep.trials
            if trial.state in (FAILED, PRUNED)
        ],
        settings=_settings(sweep),
        shared=shlex.join(sweep.shared),
    )


def _rank_chart(sweep: SweepRecords) -> list[Figure]:
    """Return the value by rank of a rank search, with that of full fine-tuning as a level."""
    if sweep.settings is None or sweep.settings.method != "rank_search":
        return []
    complete = [trial for trial in sweep.trials if trial.state == COMPLETE and trial.value is not None]
    ranks = {trial.values["adapter.r"]: trial.value for trial in complete if is_number(trial.values.get("adapter.r"))}
    if len(ranks) < 2:
        return []
    full = [("full fine-tuning", t.value) for t in complete if t.value and t.values.get("adapter") == "full"]
    order = sorted(ranks)
    series = Series(range(len(order)), [ranks[rank] or 0.0 for rank in order])
    line = series.curve(sweep.metric, style="line points")
    words = [f"{rank:,}" for rank in order]
    return [Figure(title=f"{sweep.metric} by rank", curves=[line], levels=full, x_name="r", x_words=words)]


def _best_figures(sweep: SweepRecords, best: TrialRecord) -> Iterator[tuple[str, str, None]]:
    yield sweep.metric, _value(best) or "", None
    for name, value in best.values.items():
        yield name, shorten(value), None
    if best.step is not None:
        yield "steps", f"{best.step:,}", None
    if best.trainable_parameters is not None:
        yield "trained parameters", count(best.trainable_parameters), None


def _best_commands(sweep: SweepRecords, best: TrialRecord) -> list[tuple[str, str]]:
    folder = shlex.quote(str(best.folder(sweep.folder)))
    return [
        (f"distlora generate {folder}", "chat with it"),
        (f"distlora report {folder}", "write its own report"),
        (f"distlora train ... {shlex.join(words_of(best.values))}", "use its settings in another run"),
    ]


def _table(sweep: SweepRecords) -> dict[str, Any] | None:
    """Return the columns that any trial has a value in, and the trials, best first."""
    if not sweep.trials:
        return None
    trials = ranked(sweep.trials, sweep.direction)
    columns: dict[str, list[Any]] = {
        "steps": [trial.step for trial in trials],
        "time": [trial.seconds for trial in trials],
        "trained": [trial.trainable_parameters for trial in trials],
        "memory": [trial.peak_memory_bytes for trial in trials],
    }
    return {
        "trials": [(trial, _value(trial), trial == sweep.best) for trial in trials],
        "columns": [name for name, values in columns.items() if any(value is not None for value in values)],
    }


def _curves(sweep: SweepRecords) -> list[Figure]:
    held_out = {trial.number: series_of(trial.evaluations) for trial in sweep.trials}
    if all(len(series) < 2 for series in held_out.values()):
        held_out = {}  # The table has the single values.
    best = "; the best one is drawn strong" if len(sweep.trials) > len(PAGE_COLOURS) else ""
    return [
        Figure(title=sweep.metric, unit=f"by trial{best}", curves=_lines(sweep, held_out, "line points"), is_wide=True),
        Figure(
            title="Training loss",
            unit=f"by trial, smoothed{best}",
            curves=_lines(sweep, sweep.losses, "line"),
            is_wide=True,
        ),
    ]


def _lines(sweep: SweepRecords, series: Mapping[int, Series], style: Any) -> list[Curve]:
    """Return a curve per trial: few in a colour each, of many the best over the others in grey."""
    trials = [trial for trial in ranked(sweep.trials, sweep.direction) if len(series.get(trial.number, ()))]
    best, are_few = sweep.best, len(trials) <= len(PAGE_COLOURS)
    lines = [
        series[trial.number].curve(
            _name(trial, is_best=trial == best),
            colour=place if are_few else 0,
            style="muted" if not are_few and trial != best else style,
            is_named=are_few or trial == best,
        )
        for place, trial in enumerate(trials)
    ]
    return lines if are_few else lines[::-1]  # The last one is drawn over the others.


def _name(trial: TrialRecord, *, is_best: bool) -> str:
    values = ", ".join(f"{name.rpartition('.')[2]}={shorten(value)}" for name, value in trial.values.items())
    return f"{trial.number}: {values if len(values) <= 60 else values[:58] + '...'}{' (best)' if is_best else ''}"


def _by_setting(sweep: SweepRecords) -> Iterator[Figure]:
    """Yield the compared value over each setting that all trials have, with the best trial in a colour of its own."""
    trials = [trial for trial in sweep.trials if trial.state != WAITING and trial.value is not None]
    for name in sweep.searched if len(trials) > 1 else ():
        if not all(name in trial.values for trial in sweep.trials):
            continue  # Full fine-tuning in a rank search has settings of its own.
        values = [trial.values[name] for trial in trials]
        words = [] if all(map(is_number, values)) else list(dict.fromkeys(map(shorten, values)))
        x = [words.index(shorten(value)) for value in values] if words else values
        curves = [
            Curve(
                name="the best trial" if is_best else "other trials",
                x=[place for place, trial in zip(x, trials, strict=True) if (trial == sweep.best) == is_best],
                y=[trial.value or 0.0 for trial in trials if (trial == sweep.best) == is_best],
                style="points",
                colour=is_best,
            )
            for is_best in (False, True)
        ]
        is_log = not words and min(x) > 0 and max(x) >= 8 * min(x)
        yield Figure(title=name, curves=curves, x_name=name, x_words=words, x_scale="log" if is_log else "linear")


def _settings(sweep: SweepRecords) -> dict[str, Any]:
    if sweep.settings is None:
        return {}
    values = {f"sweep.{name}": getattr(sweep.settings, name) for name in SweepConfig.__dataclass_fields__}
    space = dict(values.pop("sweep.space"))
    return {f"{name} (searched)": value for name, value in space.items()} | values


def _values(trial: TrialRecord) -> str:
    return ", ".join(f"{name}={shorten(value)}" for name, value in trial.values.items())


def _value(trial: TrialRecord) -> str | None:
    if trial.value is None:
        return None
    return loss(trial.value) if abs(trial.value) < 1000 else number(trial.value)
