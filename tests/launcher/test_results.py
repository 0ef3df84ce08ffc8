"""Values that commands find, as text, Markdown and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distlora.results.figures import Curve, Figure, draw
from distlora.results.record import Record, Table

TABLE = Table(
    "Runs", {"run": "", "loss": ".2f", "where": ""}, [["a|b", 1.5, "here"], ["c", None, "1 node"], ["d", 2.0, "there"]]
)


def test_a_table_aligns_numbers_right_and_words_left() -> None:
    lines = ["Runs", "  run  loss  where", "  a|b  1.50  here", "  c       -  1 node", "  d    2.00  there"]
    assert TABLE.text().splitlines() == lines
    assert TABLE.markdown().splitlines()[2:] == [
        "| run  | loss | where  |",
        "| ---- | ---- | ------ |",
        "| a\\|b | 1.50 | here   |",
        "| c    | -    | 1 node |",
        "| d    | 2.00 | there  |",
    ]
    many = Table("", ["n"], [[n] for n in range(9)], most=4).cells()
    assert [row[0] for row in many] == ["n", "0", "1", "(5 more in the JSON)", "7", "8"]


def test_a_record_is_written_as_page_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = Figure(title="Loss", curves=[Curve(name="a", x=[1, 2, 3], y=[3.0, 2.0, 2.5])], levels=[("planned", None)])
    record = Record(title="Title", findings=["It is so."], tables=[TABLE], figures=[figure], data={"loss": 1.5})
    record.write(tmp_path, "found")
    assert json.loads((tmp_path / "found.json").read_text()) == {"loss": 1.5}
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Title\n\n- It is so.\n\n![Loss](found.png)\n\n**Runs**")
    assert record.text() in capsys.readouterr().out
    first = (tmp_path / "found.png").read_bytes()
    record.show(tmp_path, "found")
    assert (tmp_path / "found.png").read_bytes() == first, "the same values give the same bytes"
    (drawn,) = draw([figure, Figure(title="empty", curves=[])])
    assert drawn.summary == "a: 3 at step 1, 2.5 at step 3, lowest 2 at step 2"
