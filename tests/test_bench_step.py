"""`distlora bench step`: what is compared, cells that take turns, the ratios and the losses that are told of them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture.shapes import shapes_of
from distlora.bench.step import compare, curves, report, running
from distlora.bench.step.cells import CHECKPOINTING, KEPT_PAGES, OURS, SIZES, WAYS, Cell, cells_of
from distlora.bench.step.compare import JOBS, Measured, Problem
from distlora.bench.step.running import CellFailedError, Turn
from distlora.bench.step.turns import Turns
from distlora.config import UserError
from distlora_launcher.cli.bench import step

CELL = Cell(size="100M", length=512, rows=4, processes=1, checkpointing="none", way=OURS)


def measured(way: str, seconds: list[float], *, peak: int = 100, losses: tuple[float, ...] = (2.0,)) -> Measured:
    turns = [Turn([each], [each], list(losses), peak, None) for each in seconds]
    cell = dataclasses.replace(CELL, way=way)
    return Measured(cell, ran="what", turns=turns, losses=list(losses), peak=peak)


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes=100B"], r"--sizes=100B is not known here.*; write one of 8M, 100M, 560M"),
        (["--ways=peft-bf61"], r"--ways=peft-bf61 is not known here \(did you mean 'peft-bf16'\?\)"),
        (["--checkpointing=selective"], "--checkpointing=selective is not known here.*; write one of none, block"),
        (["--rounds=0"], "--rounds=0 is no number of them"),
        (["--ranks=3"], "4 rows of a step are no whole number for each of --ranks=3; set --rows"),
        (["--tokens=8192"], "--tokens=8192 are more than the 4096 positions of 100M"),
        (["--ways=fsdp2", "--ranks=1"], "none of --ways=fsdp2 is measured on --ranks=1"),
        (["--curve=200", "--sizes=100M"], "--sizes has no effect with --curve"),
        (["--out=/proc/none"], "--out=/proc/none: cannot write"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        step.checked(words)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="--ranks=2 are more than the 1 GPUs"):
        step.checked(["--ranks=2"])
    options = step.checked([])
    assert list(options.sizes) == ["8B/4", "70B/4"]
    assert options.ranks == [1]


def test_sizes_are_what_they_are_called() -> None:
    for name, size in SIZES["cpu"].items():
        numel = shapes_of({"model_type": "llama", **size.settings}, name).numel
        assert numel == pytest.approx(float(name[:-1]) * 1e6, rel=0.15), name
    for name, size in SIZES["cuda"].items():
        assert size.settings["num_hidden_layers"] == 4, name


def test_by_default_both_modes_of_the_smaller_model_are_compared_on_one_process_and_on_two() -> None:
    options = step.checked(["--sizes=100M,560M"])
    cells = list(cells_of(options.sizes, options.ways, processes=options.ranks, checkpointing=options.checkpointing))
    problems = list(dict.fromkeys((c.size, c.checkpointing, c.processes) for c in cells))
    small = [("100M", mode, processes) for mode in CHECKPOINTING for processes in (1, 2)]
    assert problems == [*small, ("560M", "block", 1), ("560M", "block", 2)]
    assert {c.way for c in cells if c.processes == 2} == {
        *("ours", "ours-compiled", "peft-documented", "peft-bf16", "fsdp2"),
    }
    assert set(JOBS) == set(WAYS)
    for cell in cells:
        compare.job_of(cell, Problem(made_here="", model=Path("m"), rows=Path("r"), adapters=Path("a")))


def test_only_ours_has_the_environment_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TOP_PAD_", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    ours, peer = (step.environment_of(dataclasses.replace(CELL, way=way)) for way in (OURS, "trainer"))
    assert "MALLOC_TOP_PAD_" in ours
    assert "MALLOC_TOP_PAD_" not in peer
    assert peer["MALLOC_TRIM_THRESHOLD_"] == "1", "the user's own"
    kept = step.environment_of(dataclasses.replace(CELL, way=KEPT_PAGES))
    assert kept["MALLOC_TOP_PAD_"] == ours["MALLOC_TOP_PAD_"]
    assert ours["OMP_WAIT_POLICY"] == kept["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in peer
    assert peer["OMP_NUM_THREADS"] == ours["OMP_NUM_THREADS"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(running, "WORKER", "step_fake_worker")
    monkeypatch.setattr(compare, "job_of", lambda cell, problem: {"way": cell.way})
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def test_cells_take_turns_and_one_that_fails_is_out(fake: dict[str, str], tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, processes=2, way=way) for way in (OURS, "fsdp2", "trainer")]
    said: list[str] = []
    (group,) = compare.compare(
        cells,
        lambda cell: Problem(made_here="", model=tmp_path, rows=tmp_path, adapters=tmp_path),
        rounds=2,
        steps=3,
        environment=lambda cell: fake,
        log=tmp_path / "log",
        own_network=False,
        say=said.append,
    )
    ours, dead, broken = group
    assert ours.failed is None
    assert [turn.seconds for turn in ours.turns] == [[2.0] * 3] * 2, "the slowest process"
    assert ours.turns[0].cpu_seconds == [1.0] * 3, "of both"
    assert ours.losses == [2.5] * 8, "one step that does not count, one that is counted, six"
    assert (ours.moved, ours.loopback, ours.imported) == ({"reduced": 8}, None, 1000)
    assert dead.failed == "process 1 ended with code 3: the last words"
    assert broken.failed == "RuntimeError: it broke"
    assert not dead.turns
    assert not broken.turns


def test_a_curve_has_a_loss_for_each_step(
    monkeypatch: pytest.MonkeyPatch, fake: dict[str, str], tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "job_of", lambda cell, problem, lr: {"way": cell.way})
    problem = Problem(made_here="", model=tmp_path, rows=tmp_path, adapters=tmp_path)
    said: list[str] = []
    (curve,) = compare.train_alone(
        [CELL], problem, steps=60, environment=lambda cell: fake, log=tmp_path / "log", lr=1e-3, say=said.append
    )
    assert len(curve.losses) == 60
    assert said[-1] == "  distlora, NF4, seed 0: step 60 of 60, loss 2.0000"


def test_a_cell_that_is_killed_says_so(fake: dict[str, str], tmp_path: Path) -> None:
    with running.Processes({"way": OURS}, count=1, environment=fake, log=tmp_path / "log") as own:
        own.start()
        own._processes[0].kill()
        with pytest.raises(CellFailedError, match="process 0 ended with code -9: without a word"):
            own.turn(1)


def test_turns_are_taken_from_stdin_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"steps": n, "count": False}) for n in (2, 1)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    answers = io.StringIO()
    turns = Turns(torch.device("cpu"), answers)
    for number, _ in enumerate(turns):
        turns.note(torch.tensor(float(number), requires_grad=True))
    told: list[dict[str, Any]] = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [answer["losses"] for answer in told] == [[0.0, 1.0], [2.0]]
    assert [len(answer["seconds"]) for answer in told] == [2, 1]
    assert all(answer["moved"] is None for answer in told)


def test_ratios_are_of_the_same_round() -> None:
    ours, peer = measured(OURS, [1.0, 10.0, 1.0], peak=50), measured("peft-bf16", [1.5, 15.0, 1.8])
    assert report.ratios(ours, peer) == pytest.approx([1.5, 1.5, 1.8])
    table = report.table([ours, peer, Measured(dataclasses.replace(CELL, way="trainer"), failed="why")])
    head, own, other, failed = table.rows
    assert dict(zip(head, own, strict=True))["ours: times as fast"] == "1.00 (1.00-1.00)"
    assert dict(zip(head, other, strict=True))["ours: times as fast"] == "1.50 (1.50-1.80)"
    assert dict(zip(head, other, strict=True))["memory"] == "0.50"
    assert failed[-1] == "failed: why"
    assert list(report.reading([[ours, peer]])) == [
        "distlora, NF4 beside PEFT + bitsandbytes, all in bf16: 1.50 times as fast, "
        "with 0.50 of the memory (1 problem)."
    ]
    rows = list(report.rows([[ours, peer]]))
    assert rows[1]["ours_times_as_fast"] == pytest.approx(1.5)


def test_each_way_of_ours_has_a_sentence_of_its_own() -> None:
    group = [
        measured(OURS, [1.0], peak=50),
        measured("ours-compiled", [0.5], peak=80),
        measured("peft-bf16", [1.5]),
    ]
    peer = "beside PEFT + bitsandbytes, all in bf16"
    assert list(report.reading([group])) == [
        f"distlora, NF4 {peer}: 1.50 times as fast, with 0.50 of the memory (1 problem).",
        f"distlora, NF4, train.compile=true {peer}: 3.00 times as fast, with 0.80 of the memory (1 problem).",
    ]


def test_a_cell_that_fails_in_a_later_turn_is_no_success(tmp_path: Path) -> None:
    failed = dataclasses.replace(measured("peft-bf16", [1.5]), failed="it broke")
    group = [measured(OURS, [1.0, 1.0], peak=50), failed]
    head, _, row = report.table(group).rows
    assert dict(zip(head, row, strict=True))["what ran"] == "what; failed: it broke"
    assert list(report.reading([group])) == []
    assert [each["failed"] for each in report.rows([group])] == ["", "it broke"]
    ours_failed = dataclasses.replace(group[0], failed="it broke")
    assert "ours_memory" not in list(report.rows([[ours_failed, measured("peft-bf16", [1.5])]]))[1]
    report.draw([[failed]], tmp_path / "step.png")


def test_memory_of_nothing_is_no_division_by_zero() -> None:
    nothing = measured("peft-bf16", [1.0], peak=0)
    assert report.table([measured(OURS, [1.0]), nothing]).rows[2]


def test_on_a_gpu_memory_is_the_devices(fake: dict[str, str], tmp_path: Path) -> None:
    cells = [dataclasses.replace(CELL, way=way) for way in ("ours-bf16", OURS)]
    (group,) = compare.compare(
        cells,
        lambda cell: Problem(made_here="", model=tmp_path, rows=tmp_path, adapters=tmp_path),
        rounds=1,
        steps=1,
        environment=lambda cell: fake,
        log=tmp_path / "log",
        own_network=False,
        say=lambda line: None,
    )
    on_gpu, after = group
    assert (on_gpu.peak, on_gpu.over_imports) == (500, 500), "not less the host's imports"
    assert after.failed is not None
    assert after.failed.startswith("this GPU has 0.0 GB left"), "400 bytes, and a process took 500"


def test_first_losses_that_differ_are_told() -> None:
    group = [measured(OURS, [1.0], losses=(2.0,)), measured("peft-bf16", [1.0], losses=(2.5,))]
    assert any(line.startswith("WARNING: the first losses of 100M") for line in report.reading([group]))


def test_a_report_has_its_plot(tmp_path: Path) -> None:
    report.draw([[measured(OURS, [1.0]), measured("peft-bf16", [1.5])]], tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_curves_agree_by_what_chance_does(tmp_path: Path) -> None:
    def curve(way: str, gap: float, seed: int = 0) -> Measured:
        found = measured(way, [1.0], losses=tuple(3 - step / 100 + gap for step in range(20)))
        return dataclasses.replace(found, cell=dataclasses.replace(found.cell, seed=seed))

    found = [curve(OURS, 0.0), curve(OURS, 0.05, seed=1), curve("peft-documented", 0.01), curve("peft-bf16", 0.02)]
    assert next(curves.reading(found)).endswith(
        "within what they differ between seeds (0.0500) and NOT within what they differ between peers (0.0100)."
    )
    far = [*found, curve("trainer", 0.2)]
    assert "NOT within" in next(
        curves.reading([each for each in far if each.cell.way != "peft-documented"][:3] + far[-1:])
    )
    kinds = [difference.kind for difference in curves.differences(found)]
    assert sorted(kinds) == ["between peers", "between seeds", "ours and a peer", "ours and a peer"]
    assert len(list(curves.reading(found))) == 1
    on_two = [dataclasses.replace(each, cell=dataclasses.replace(each.cell, processes=2)) for each in found]
    alone, together, why = curves.reading(found + on_two)
    assert ("on 1 process differ" in alone, "on 2 processes differ" in together) == (True, True)
    assert why.startswith("On several processes ours weighs a step's losses by their tokens")
    curves.draw(found, tmp_path / "curves.png")
    assert len(list(curves.rows(found))) == 80


def test_curves_that_all_failed_say_why(tmp_path: Path) -> None:
    found = [Measured(CELL, failed="it broke")]
    losses, _ = curves.tables(found)
    assert losses.rows[1][-1] == "failed: it broke"
    assert list(curves.reading(found)) == []
    curves.draw(found, tmp_path / "curves.png")


@pytest.mark.slow
def test_ours_and_the_peers_train_the_same_on_two_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "take_own_network", lambda: False)
    words = ["--sizes=8M", "--checkpointing=block", "--rounds=1", "--tokens=64", "--json"]
    assert step.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(not row["failed"] for row in rows), rows
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=0.01), row["way"]
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=0.02), row["way"]
    sharded = {row["way"]: row["what_ran"] for row in rows if row["processes"] == 2}
    assert sharded["fsdp2"].startswith("DistributedDataParallel")
