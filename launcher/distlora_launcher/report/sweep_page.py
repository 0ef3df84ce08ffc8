"""The report of a sweep: `sweep_report` is the page, its parts follow."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import SweepConfig
from distlora.run_folder.layout import METRICS_NAME
from distlora.run_folder.sweep import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    SAVED,
    WAITING,
    TrialRecord,
    best_of,
    counted,
    ranked,
    words_of,
)
from distlora.system.numbers import (
    count,
    length,
    number,
    size,
)
from distlora_launcher.report.chart import (
    PALETTE,
    Chart,
    Level,
    Line,
    charts_part,
)
from distlora_launcher.report.document import (
    page,
    section,
    state_badge,
    table,
    tiles,
)
from distlora_launcher.report.markdown import markdown
from distlora_launcher.report.markup import (
    Content,
    Html,
    tag,
    text,
)
from distlora_launcher.report.parallel import Traced, parallel
from distlora_launcher.report.run_page import STATES as RUN_STATES
from distlora_launcher.report.run_page import commands_part
from distlora_launcher.report.run_records import (
    Standing,
    as_text,
    in_short,
    noted,
)
from distlora_launcher.report.series import (
    SMOOTHED_FROM,
    Series,
    is_number,
    read_metrics,
    series_of,
    smoothed,
    thinned,
    window_of,
)
from distlora_launcher.report.words import loss

STATE_KINDS = {COMPLETE: "good", RUNNING: "busy", SAVED: "idle", FAILED: "bad", PRUNED: "idle", WAITING: "idle"}
CURVE_POINTS = 150
"""Of a trial's training loss."""


@dataclass(kw_only=True, slots=True)
class SweepRecords:
    """A sweep, as far as its folder can be read."""

    folder: Path
    settings: SweepConfig | None
    """How it searches; None where that is damaged."""
    trials: Sequence[TrialRecord]
    shared: Sequence[str] = ()
    """The words that all trials have, as typed."""
    conclusion: Sequence[str] = ()
    """What the search makes of it, in Markdown: the rank search's table and recommendation."""
    losses: Mapping[int, Series] = field(default_factory=dict)
    """Training loss by trial, smoothed."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """The share of each setting in the differences between trials."""
    importance_by: str = ""
    """How that was calculated."""
    problems: list[str] = field(default_factory=list)
    links: frozenset[int] = frozenset()
    """Trials that have a report of their own beside this one."""

    @property
    def metric(self) -> str:
        return "eval_loss" if self.settings is None else self.settings.metric

    @property
    def direction(self) -> str:
        return "minimize" if self.settings is None else self.settings.direction

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best value."""
        return best_of(self.trials, self.direction)

    @property
    def searched(self) -> list[str]:
        """The settings that trials differ in."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.values))

    def is_numeric(self, setting: str) -> bool:
        return all(is_number(trial.values.get(setting, 0)) for trial in self.trials)


def training_losses(sweep: Path, trials: Sequence[TrialRecord], problems: list[str], *, most: int) -> dict[int, Series]:
    """The smoothed training loss of each trial; of none where their records have more than `most` bytes together."""
    paths = {trial.number: trial.folder(sweep) / METRICS_NAME for trial in trials}
    paths = {number: path for number, path in paths.items() if path.is_file()}
    total = sum(path.stat().st_size for path in paths.values())
    if total > most:
        problems.append(
            f"the training losses of {len(paths):,} trials ({size(total)}) are not drawn, their reports have them"
        )
        return {}
    found = {}
    for trial, path in paths.items():
        with noted(problems):
            series = read_metrics(path).training.get("loss")
            if series is not None:
                drawn = smoothed(series, window_of(series)) if len(series) >= SMOOTHED_FROM else series
                found[trial] = thinned(drawn, CURVE_POINTS)
    return found


def sweep_report(sweep: SweepRecords, standing: Standing) -> str:
    """The page of a sweep, in whatever state it is."""
    trials = f"{len(sweep.trials)} trials: {counted(sweep.trials)}" if sweep.trials else "No trial has been begun"
    lead: list[Content] = [tag("code", str(sweep.folder)), f"{sweep.folder.name} {standing.said}. {trials}."]
    if (best := sweep.best) is not None:
        lead.append(f"The best of {sweep.metric} is {_value(best)}: trial {best.number}, {_values(best)}.")
    method = "" if sweep.settings is None else f": {sweep.settings.method}"
    return page(
        kind=f"Sweep{method}",
        title=sweep.folder.name,
        state=state_badge(standing.state, RUN_STATES.get(standing.state, "idle")),
        lead=lead,
        parts=[
            ("Notes", section("notes", "Notes", _notes(sweep, standing))),
            ("Conclusion", section("conclusion", "Conclusion", markdown(sweep.conclusion), _ranks(sweep))),
            ("Best", section("best", "Best trial", _best(sweep))),
            ("Trials", section("trials", "Trials", _table(sweep), note=_TRIALS_NOTE)),
            ("Curves", section("curves", "Curves", _curves(sweep))),
            ("Coordinates", section("coordinates", "What was searched, and what came of it", _parallel(sweep))),
            ("Importance", section("importance", "What made the difference", _importance(sweep))),
            ("Failures", section("failures", "Failed and pruned", _failures(sweep))),
            ("Settings", section("settings", "Settings", _settings(sweep))),
            ("Next", section("next", "What can be typed now", commands_part(standing.commands))),
        ],
    )


_TRIALS_NOTE = "A click on a heading sorts. A row shows its curves where the pointer is on it."


def _notes(sweep: SweepRecords, standing: Standing) -> Iterator[Html]:
    if standing.error is not None:
        yield tag("div", standing.error, cls="box bad")
    if sweep.problems:
        yield tag("div", tag("ul", [tag("li", line) for line in sweep.problems]), cls="box")
    if not sweep.trials:
        yield tag("p", "There are no results yet.", cls="note")


def _ranks(sweep: SweepRecords) -> Html:
    """The value by rank, of a search for the rank that is enough; that of full fine-tuning beside it."""
    if sweep.settings is None or sweep.settings.method != "rank_search":
        return Html("")
    complete = [trial for trial in sweep.trials if trial.state == COMPLETE and trial.value is not None]
    ranks = {trial.values["adapter.r"]: trial.value for trial in complete if is_number(trial.values.get("adapter.r"))}
    whole = [
        Level(name="full fine-tuning", value=t.value) for t in complete if t.value and t.values.get("adapter") == "full"
    ]
    ordered = sorted(ranks)
    series = Series(range(len(ordered)), [ranks[rank] or 0.0 for rank in ordered])
    if len(ordered) < 2:
        return Html("")
    line = Line(name=sweep.metric, series=series, style="line points")
    words = [f"{rank:,}" for rank in ordered]
    chart = Chart(
        title=f"{sweep.metric} by rank", unit="", lines=[line], levels=whole, x_name="r", x_words=words, reach=20
    )
    return charts_part([chart])


def _best(sweep: SweepRecords) -> Html:
    best = sweep.best
    if best is None:
        return Html("")
    figures: dict[str, Content] = {sweep.metric: _value(best)}
    figures |= {name: in_short(value) for name, value in best.values.items()}
    if best.step is not None:
        figures["steps"] = f"{best.step:,}"
    if best.trainable_parameters is not None:
        figures["trained parameters"] = count(best.trainable_parameters)
    folder = best.folder(sweep.folder)
    words = shlex.join(words_of(best.values))
    commands = [
        (f"distlora generate {shlex.quote(str(folder))}", "chat with it"),
        (f"distlora report {shlex.quote(str(folder))}", "its own report"),
        (f"distlora train ... {words}", "its settings in another run"),
    ]
    return text([tiles((name, value, None) for name, value in figures.items()), commands_part(commands)])


def _table(sweep: SweepRecords) -> Html:
    """The trials, the best first; those without a value last."""
    if not sweep.trials:
        return Html("")
    best, trials = sweep.best, ranked(sweep.trials, sweep.direction)
    searched = {name: "n" if sweep.is_numeric(name) else "" for name in sweep.searched}
    columns: dict[str, str] = {"trial": "n", "state": "", sweep.metric: "n", **searched}
    columns |= {"steps": "n", "time": "n", "trained": "n", "memory": "n"}
    rows = [list(_cells(sweep, trial)) for trial in trials]
    # A column in which no trial has anything says nothing.
    kept = [index for index in range(len(columns)) if any(row[index][0] is not None for row in rows)]
    heads = list(columns.items())
    head = [
        tag("th", tag("button", heads[index][0], type="button"), cls=heads[index][1] or None, scope="col")
        for index in kept
    ]
    body = []
    for trial, row in zip(trials, rows, strict=True):
        cells = [
            tag(
                "td",
                row[index][1],
                cls=heads[index][1] or None,
                data_key="" if row[index][0] is None else str(row[index][0]),
            )
            for index in kept
        ]
        body.append(tag("tr", cells, cls="best" if trial == best else None, data_trial=trial.number))
    return table(head, body, cls="full sortable")


def _cells(sweep: SweepRecords, trial: TrialRecord) -> Iterator[tuple[Any, Content]]:
    """(what is sorted by, what is shown) of each column."""
    name: Content = str(trial.number)
    if trial.number in sweep.links:
        name = tag("a", name, href=f"{trial.folder(Path()).as_posix()}/report.html")
    yield trial.number, name
    yield trial.state, state_badge(trial.state, STATE_KINDS.get(trial.state, "idle"))
    yield trial.value, _value(trial)
    for setting in sweep.searched:
        value = trial.values.get(setting)
        yield (
            value if is_number(value) or value is None else as_text(value),
            None if value is None else tag("code", in_short(value)),
        )
    yield trial.step, None if trial.step is None else f"{trial.step:,}"
    yield trial.seconds, None if trial.seconds is None else length(trial.seconds)
    trained, memory = trial.trainable_parameters, trial.peak_memory_bytes
    yield trained, None if trained is None else count(trained)
    yield memory, None if memory is None else size(memory)


def _curves(sweep: SweepRecords) -> Html:
    held_out = {trial.number: series_of(trial.evaluations) for trial in sweep.trials}
    if all(len(series) < 2 for series in held_out.values()):
        held_out = {}  # The table has what there is.
    best = "; the best is the strong one" if len(sweep.trials) > PALETTE else ""
    lines, smooth = _lines(sweep, held_out, points=True), _lines(sweep, sweep.losses)
    return charts_part(
        [
            Chart(title=sweep.metric, unit=f"of each trial{best}", lines=lines, is_wide=True),
            Chart(title="Training loss", unit=f"of each trial, smoothed{best}", lines=smooth, is_wide=True),
        ]
    )


def _lines(sweep: SweepRecords, series: Mapping[int, Series], *, points: bool = False) -> list[Line]:
    """Few trials each with its colour and dash, of many the best over the others in grey."""
    with_points = [trial for trial in ranked(sweep.trials, sweep.direction) if len(series.get(trial.number, ()))]
    best, few = sweep.best, len(with_points) <= PALETTE
    lines = []
    for place, trial in enumerate(with_points):
        is_best = trial == best
        style: Any = "muted" if not few and not is_best else "line points" if points else "line"
        lines.append(
            Line(
                name=_name(trial, best=is_best),
                series=series[trial.number],
                colour=place if few else 0,
                style=style,
                trial=trial.number,
                is_named=few or is_best,
            )
        )
    return lines[::-1] if not few else lines  # What is drawn last lies over the others.


def _name(trial: TrialRecord, *, best: bool) -> str:
    values = ", ".join(f"{name.rpartition('.')[2]}={in_short(value)}" for name, value in trial.values.items())
    return f"{trial.number}: {values if len(values) <= 60 else values[:58] + '...'}{' (best)' if best else ''}"


def _parallel(sweep: SweepRecords) -> Html:
    best = sweep.best
    # A rank search's full fine-tuning has settings of its own, which are no axis for the others.
    names = [name for name in sweep.searched if all(name in trial.values for trial in sweep.trials)]
    traced = [
        Traced(
            trial=trial.number,
            values=[*(trial.values.get(name) for name in names), trial.value],
            is_best=trial == best,
        )
        for trial in sweep.trials
        if trial.state != WAITING
    ]
    figure = parallel([*names, sweep.metric], traced)
    if not figure:
        return figure
    better = "lower" if sweep.direction == "minimize" else "higher"
    note = f"A line is a trial, the strong one the best ({better} {sweep.metric} is better)."
    return text([tag("p", note, cls="note"), figure])


def _importance(sweep: SweepRecords) -> Html:
    shares = {name: share for name, share in sweep.importance.items() if 0 <= share <= 1}
    rows = [
        tag(
            "tr",
            tag("th", tag("code", name), scope="row"),
            tag("td", f"{share:.0%}", cls="n"),
            tag("td", tag("div", cls="bar measured", style=f"width:{100 * share:.1f}%"), cls="bars"),
        )
        for name, share in sorted(shares.items(), key=lambda each: -each[1])
    ]
    caption = tag("caption", f"The share of each setting in the differences of {sweep.metric}: {sweep.importance_by}")
    return tag("div", tag("table", caption, tag("tbody", rows)), cls="scroll") if rows else Html("")


def _failures(sweep: SweepRecords) -> Html:
    rows = [
        tag(
            "tr",
            tag("th", str(trial.number), scope="row"),
            tag("td", state_badge(trial.state, STATE_KINDS[trial.state])),
            tag("td", tag("code", _values(trial)), cls="long"),
            tag("td", trial.reason or "no reason was recorded", cls="long"),
        )
        for trial in sweep.trials
        if trial.state in (FAILED, PRUNED)
    ]
    heads = [tag("th", name, scope="col") for name in ("trial", "state", "values", "why")]
    return table(heads, rows) if rows else Html("")


def _settings(sweep: SweepRecords) -> Html:
    values: dict[str, Any] = {}
    if sweep.settings is not None:
        values = {f"sweep.{name}": getattr(sweep.settings, name) for name in SweepConfig.__dataclass_fields__}
        space = dict(values.pop("sweep.space"))
        values = {f"{name} (searched)": value for name, value in space.items()} | values
    rows = [
        tag("tr", tag("th", tag("code", name), scope="row"), tag("td", tag("code", as_text(value)), cls="long"))
        for name, value in values.items()
    ]
    shared = (
        [tag("h3", "What all trials share"), tag("p", tag("code", shlex.join(sweep.shared)))] if sweep.shared else None
    )
    return text([shared, tag("table", tag("tbody", rows)) if rows else None])


def _values(trial: TrialRecord) -> str:
    return ", ".join(f"{name}={in_short(value)}" for name, value in trial.values.items())


def _value(trial: TrialRecord) -> str | None:
    if trial.value is None:
        return None
    return loss(trial.value) if abs(trial.value) < 1000 else number(trial.value)
