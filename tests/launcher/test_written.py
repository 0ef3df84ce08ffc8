"""Check a benchmark's results as tables, JSON, Markdown, CSV and plot: all show the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distlora.output.results import Results, Table, draw_bars

ROWS = [{"start": "cold", "seconds": 2.5}, {"start": "from the cache", "seconds": 0.25, "bytes": 7}]


def results() -> Results:
    panels = [("seconds", {row["start"]: row["seconds"] for row in ROWS})]
    return Results(
        name="load",
        heading="Loading | reading",
        notes="a day, a machine",
        tables=[Table("Starts", [["", "seconds"], *([row["start"], f"{row['seconds']}"] for row in ROWS)])],
        rows=ROWS,
        reading=["ten times as fast"],
        draw=lambda path: draw_bars("Starts", panels, path),
    )


def test_the_three_files_hold_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results().show(out=tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"load.md", "load.csv", "load.png"}
    printed, report = capsys.readouterr().out, (tmp_path / "new" / "load.md").read_text()
    for text in ("from the cache", "0.25", "ten times as fast", "a day, a machine"):
        assert text in printed
        assert text in report
    assert "![Loading | reading](load.png)" in report
    with (tmp_path / "new" / "load.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"start": "from the cache", "seconds": "0.25", "bytes": "7"}
    assert rows[0]["bytes"] == ""
    first = (tmp_path / "new" / "load.png").read_bytes()
    results().write(tmp_path / "new")
    assert (tmp_path / "new" / "load.png").read_bytes() == first, "the same figures make the same file"


def test_without_a_folder_nothing_is_written_and_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    results().show(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"notes": "a day, a machine", "rows": ROWS}
