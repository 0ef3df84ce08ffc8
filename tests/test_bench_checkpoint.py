"""`distlora bench checkpoint` measures saves that resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distlora.bench.checkpoint import Clock, Saved, measure, measure_ours, median, results
from distlora.bench.requests import CheckpointBench
from distlora.parallel import Ranks
from small_models import write_model_folder


def saved(way: str, **values: object) -> Saved:
    common = {"ranks": 1, "r": 16, "trained": 1000, "nbytes": 12_500, "on_disk": 0.5, "resume": Clock(0.2, 0.1)}
    return Saved(way=way, **(common | {"save": Clock(0.01, 0.005)} | values))  # type: ignore[arg-type]


def test_a_real_run_is_saved_in_both_ways_and_resumed(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", "llama")
    (tmp_path / "run").mkdir()
    alone = Ranks(0, 1, torch.device("cpu"), None)
    rows = measure_ours(tmp_path / "model", tmp_path / "run", alone, r=4, tokens=16, rounds=1)
    assert [row.way for row in rows] == ["ours", "ours, train.save_in_background=false"]
    for row in rows:
        assert 1 < row.over_floor < 2, "12 bytes per parameter, names and the run's state"
        assert row.on_disk > 0
        assert row.save.seconds > 0
        assert row.resume is not None
        assert row.resume.seconds > 0


def test_the_report_reads_the_figures_beside_each_other() -> None:
    ours_saved = saved("ours", step=Clock(1.0, 1.0), slower=0.02)
    peer = saved("transformers Trainer", save=Clock(0.1, 0.1), nbytes=25_000)
    adapter = saved("PEFT save_pretrained", nbytes=4_100, fault="no optimizer")
    report = results([ours_saved, peer, adapter], 75_600_000)
    (table,) = report.tables
    assert "Llama of 76M parameters" in table.heading
    assert "2 threads" in report.notes
    assert table.rows[1][:5] == ["ours", "1", "16", "0.0", "1.04"]
    assert table.rows[3][-1] == "no: no optimizer"
    text = "\n".join(report.reading)
    assert "a save takes 1.0% of a step of 1.00 s on the training thread" in text
    assert "transformers Trainer, 1, r=16: 10.0 and 20.0 times ours" in text
    assert "2.00 times the bytes" in text
    assert {row["way"] for row in report.rows} == {"ours", "transformers Trainer", "PEFT save_pretrained"}


def test_medians_are_of_each_clock_alone() -> None:
    assert median([Clock(1, 9), Clock(5, 1), Clock(3, 5)]) == Clock(3, 5)
    assert median([Clock(1, 4), Clock(3, 2)]) == Clock(2, 3), "of an even number"


@pytest.mark.slow
def test_every_way_saves_and_resumes() -> None:
    rows, _ = measure(CheckpointBench(r=(4,), layers=1, tokens=16, rounds=1))
    assert len({row.way for row in rows}) == 6
    assert all(row.nbytes > 0 for row in rows)
