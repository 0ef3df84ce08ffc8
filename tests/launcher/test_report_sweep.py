"""`distlora report` of a sweep: table, curves, coordinates, failures and conclusion, in every state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from distlora.config import SweepConfig, UserError
from distlora.run_folder.layout import REPORT_NAME
from distlora.run_folder.sweep import (
    COMPLETE,
    FAILED,
    PRUNED,
    WAITING,
    TrialRecord,
    trial_folder,
    write_importance,
    write_results,
)
from distlora_launcher.report.records import PageStatus
from distlora_launcher.report.sweep_page import SweepRecords, sweep_report
from distlora_launcher.studies.results import page_of_sweep, write_at_end
from distlora_launcher.studies.sweep import Sweep, Values, make_sweep
from support.damage import Reader, any_json, any_yaml, holds, holds_without
from support.report_folders import Page, make_folder, reported

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
REASON = "rank 0 failed first: NonFiniteError: step 3: the loss is not finite"


def record(number: int, state: str, lr: float, r: int, value: float | None, **more: Any) -> TrialRecord:
    evaluations = {} if value is None else {10: value + 0.5, 20: value}
    values = {"optim.lr": lr, "adapter.r": r}
    return TrialRecord(number=number, state=state, values=values, value=value, evaluations=evaluations, **more)


TRIALS = (
    record(0, COMPLETE, 1e-3, 8, 2.5, step=20, seconds=31.0, trainable_parameters=18_720),
    record(1, COMPLETE, 2e-3, 8, 2.25, step=20, seconds=30.0, trainable_parameters=18_720),
    record(2, FAILED, 1e-3, 16, None, step=3, reason=REASON),
    record(3, PRUNED, 2e-3, 16, 2.0, step=10, reason="it was behind the median of the others at step 10"),
)


def make(folder: Path, trials: Sequence[TrialRecord] = TRIALS, **settings: Any) -> Path:
    """Write a grid of two by two with its outcomes."""
    space = (Values("optim.lr", (1e-3, 2e-3)), Values("adapter.r", (8, 16)))
    words = ("model.path=/models/base", "data.path=/a b.jsonl")
    sweep = Sweep(
        folder=folder,
        settings=SweepConfig(**settings),
        overrides=words,
        space=space,
        config_dir=None,
        cwd=str(folder.parent),
    )
    make_sweep(sweep)
    if trials:
        write_results(folder, trials)
    for trial in trials:
        if trial.state != WAITING:
            make_folder(trial_folder(folder, trial.number), done=trial.state == COMPLETE)
    return folder


def table_of(page: Page) -> list[list[str]]:
    return next(table for table in page.tables if table[0][0] == "trial" and "optim.lr" in table[0])


def test_a_finished_sweep(tmp_path: Path) -> None:
    folder = make(tmp_path / "sweep")
    (trial_folder(folder, 1) / REPORT_NAME).write_text("its own")
    write_importance(folder, {"optim.lr": 0.25, "adapter.r": 0.75}, "main effects")
    page = reported(folder)
    assert page.row("adapter.r")[1] == "75%"
    table = table_of(page)
    assert table[0] == ["trial", "state", "eval_loss", "optim.lr", "adapter.r", "steps", "time", "trained"]
    assert [row[0] for row in table[1:]] == ["1", "0", "3", "2"], "the best first, then the pruned, the failed last"
    assert table[1] == ["1", "complete", "2.2500", "0.002", "8", "20", "30 s", "18,720"]
    assert "The best eval_loss is 2.2500: trial 1, optim.lr=0.002, adapter.r=8." in page.text, "a pruned one is not"
    assert "4 trials: 2 complete, 1 pruned, 1 failed" in page.text
    assert REASON in page.text
    assert "it was behind the median" in page.text
    assert "optim.lr=0.002 adapter.r=8" in page.text
    assert "model.path=/models/base 'data.path=/a b.jsonl'" in page.text
    held_out, training = page.charts[:2]
    assert "1: lr=0.002, r=8 (best): 2.75 at step 10, 2.25 at step 20" in held_out
    assert all(f"{trial}: " in training for trial in range(4))
    links = [attributes["href"] for name, attributes in page.elements if name == "a" and "trials" in str(attributes)]
    assert links == ["trials/0001/report.html"]


def test_a_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    bad = TrialRecord(number=0, state=FAILED, values={HOSTILE: HOSTILE}, reason=HOSTILE)
    good = TrialRecord(number=1, state=COMPLETE, values={HOSTILE: HOSTILE + "2"}, value=1.0, evaluations={1: 1.0})
    records = SweepRecords(
        folder=tmp_path / HOSTILE,
        settings=SweepConfig(space={HOSTILE: HOSTILE}, metric=HOSTILE),
        trials=[bad, good],
        shared=[HOSTILE],
        conclusion=[HOSTILE, f"| {HOSTILE} |", "|---|", f"| `{HOSTILE}` |", f"## {HOSTILE}", f"- **{HOSTILE}**"],
        problems=[HOSTILE],
    )
    page = Page(sweep_report(records, PageStatus(state=HOSTILE, headline=HOSTILE, error=HOSTILE)))
    assert page.text.count(HOSTILE) >= 12
    assert not {"img", "script"} & {name for name, _ in page.elements}
    assert not any(key.startswith("on") for _, keys in page.elements for key in keys)


def test_a_rank_search_shows_the_value_by_rank_beside_full_fine_tuning(tmp_path: Path) -> None:
    ranks = [
        TrialRecord(number=n, state=COMPLETE, values={"adapter.r": r}, value=value, evaluations={48: value})
        for n, (r, value) in enumerate({32: 2.25, 16: 2.5, 64: 2.125}.items())
    ]
    full = TrialRecord(number=3, state=COMPLETE, values={"adapter": "full", "optim.lr": 1e-5}, value=2.0)
    records = SweepRecords(folder=tmp_path, settings=SweepConfig(method="rank_search"), trials=[*ranks, full])
    page = Page(sweep_report(records, PageStatus(state="done", headline="is done")))
    assert page.charts[0] == "eval_loss by rank. eval_loss: 2.5 at r 16, 2.125 at r 64, lowest 2.125 at r 64"
    assert "full fine-tuning 2" in page.text


def test_the_end_of_a_sweep_writes_it_and_cannot_fail_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "sweep")
    (trial_folder(folder, 1) / REPORT_NAME).write_text("its own")
    write_at_end(folder)
    assert REPORT_NAME in capsys.readouterr().out
    assert "sweep/0000 - Training run" in Page((trial_folder(folder, 0) / REPORT_NAME).read_text()).text
    assert (trial_folder(folder, 1) / REPORT_NAME).read_text() == "its own"
    assert not (trial_folder(folder, 2) / REPORT_NAME).exists(), "it failed"
    assert "is done" in Page((folder / REPORT_NAME).read_text()).text
    (folder / REPORT_NAME).unlink()
    (folder / REPORT_NAME).mkdir()
    write_at_end(folder)
    assert "cannot write the report (IsADirectoryError" in capsys.readouterr().err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    make(folder / "sweep")
    write_importance(folder / "sweep", {"optim.lr": 0.25}, "main effects")
    assert json.loads((folder / "sweep" / "results.json").read_text())["trials"]
    return folder


def read_page(folder: Path) -> Page:
    try:
        return Page(page_of_sweep(folder / "sweep"))
    except UserError as error:
        raise AssertionError(f"a report says what is damaged, and is not stopped by it: {error}") from error


@pytest.mark.parametrize(
    ("file", "damages"),
    [("sweep/sweep.yaml", any_yaml), ("sweep/results.json", any_json), ("sweep/importance.json", any_json)],
)
def test_no_damage_stops_it(file: str, damages: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlora.results.figures._svg", lambda *_: Markup(""))  # 0.1 to 2 s for each page.
    reader = Reader(file=file, damages=damages, read=read_page, examples=8)
    holds(reader, place)
    holds_without(reader, place)
