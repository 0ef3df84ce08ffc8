"""`distlora bench packed`: its figures are of the steps that it says, and packs gather what one trial does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distlora.bench import packed


def test_a_pack_gathers_what_one_trial_does_on_two_ranks(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(folders / "llama")
    packed.main([base, "--trials=3", "--lengths=16", "--ranks=2", "--repeats=1", "--json"])
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    assert (row["trials"], row["ranks"], row["tokens"]) == (3, 2, 16)
    assert row["gathered_alone"] == row["gathered_packed"] > 0
    assert 0 < row["alone"] < row["packed"]
    assert 2.9 < row["operations"] <= 3.0, "each row goes through the adapter of its own trial"
    assert 1 < row["moved"] < 3


def test_the_table_has_a_row_for_each_cell() -> None:
    row = packed.Row(
        trials=4,
        ranks=1,
        tokens=16,
        alone=0.01,
        sequential=0.04,
        packed=0.018,
        predicted=2.0,
        operations=4.0,
        moved=2.5,
        gathered=(0, 0),
    )
    (table,) = packed.results([row]).tables
    assert " | ".join(table.rows[-1]) == (
        "4 | 1 | 16 | 10.0 | 40.0 (4.00 x) | 18.0 | 1.80 x | 2.00 | 4.00 x | 2.50 x | nothing"
    )
