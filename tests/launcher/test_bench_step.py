"""`distlora bench step`: the cells, their turns, and the ratios and losses of the report."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distlora.bench.step import compare, report
from distlora.bench.step.compare import (
    CHECKPOINTING,
    KEPT_PAGES,
    OURS,
    Cell,
    Measured,
    Runner,
    StepInputs,
    Turn,
    cells_of,
)
from distlora.bench.step.worker import make_inputs
from distlora.config import UserError
from distlora_launcher.cli.bench import step
from support.gguf_files import dense_by_transformers, described_here, write_random
from support.step_fake_worker import Job

INPUTS = StepInputs(folder="f", model="m", length=512, rows=4, steps=1)
CELL = Cell(size="100M", length=512, rows=4, processes=1, checkpointing="none", way=OURS)


def measured(way: str, seconds: list[float], *, peak: int = 100, losses: tuple[float, ...] = (2.0,)) -> Measured:
    turns = [Turn([each], [each], list(losses), peak, None) for each in seconds]
    cell = dataclasses.replace(CELL, way=way)
    return Measured(cell, ran="what", turns=turns, losses=list(losses), peak=peak)


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes=100B"], r"--sizes=100B is not known.*; write one of 8M, 100M, 560M, SmolLM2"),
        (["--ways=peft-bf61"], r"--ways=peft-bf61 is not known \(did you mean 'peft-bf16'\?\)"),
        (["--checkpointing=selective"], "--checkpointing=selective is not known.*; write one of none, block"),
        (["--rounds=0"], "--rounds=0 is not a positive number"),
        (["--ranks=3"], "4 sequences per step are not a multiple of --ranks=3; set --rows"),
        (["--tokens=8192"], "--tokens=8192 exceeds the 4096 positions of 100M"),
        (["--model=nowhere"], r"nowhere holds no config.json; point model.path at a model's folder"),
        (["--ways=fsdp2", "--ranks=1"], "none of --ways=fsdp2 can be measured on --ranks=1"),
        (["--curve=200", "--sizes=100M"], "--sizes has no effect with --curve"),
        (["--curve=200", "--model=m"], "--model has no effect with --curve"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step.parse(words)


def test_default_cells_have_both_modes_of_the_smaller_model_on_one_and_two_processes() -> None:
    request = step.parse(["--sizes=100M,560M"])
    cells = list(cells_of(request.sizes, request.ways, processes=request.ranks, checkpointing=request.checkpointing))
    problems = list(dict.fromkeys((c.size, c.checkpointing, c.processes) for c in cells))
    small = [("100M", mode, processes) for mode in CHECKPOINTING for processes in (1, 2)]
    assert problems == [*small, ("560M", "block", 1), ("560M", "block", 2)]
    assert {c.way for c in cells if c.processes == 2} == {
        *("ours", "ours-uncompiled", "peft-documented", "peft-bf16", "peft-bf16-compiled", "peft-fp32", "fsdp2"),
    }
    for cell in cells:
        compare.job_of(cell, INPUTS)


def test_a_real_model_takes_the_place_of_the_default_sizes(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders / "llama-tied"
    assert list(step.parse(["--ranks=1"]).sizes) == ["100M", "SmolLM2"]
    request = step.parse([f"--model={folder}", "--tokens=32"])
    assert {name: size.model for name, size in request.sizes.items()} == {"llama-tied": str(folder)}
    assert list(step.parse([f"--model={folder}", "--tokens=32", "--sizes=8M"]).sizes) == ["llama-tied", "8M"]
    with pytest.raises(UserError, match=r"data.sequence_length=1,024 is beyond the model's 512 positions"):
        step.parse([f"--model={folder}", "--tokens=1024"])

    def offline(say: object) -> Path:
        raise UserError("the demo's model could not be downloaded")

    monkeypatch.setattr(step, "smollm2", offline)
    assert list(step.with_demo(step.parse(["--ranks=1"]).sizes)) == ["100M"]
    with pytest.raises(UserError, match="could not be downloaded"):
        step.with_demo(step.parse(["--sizes=SmolLM2"]).sizes)
    monkeypatch.setattr(step, "smollm2", lambda say: folder)
    assert step.with_demo(step.parse(["--sizes=SmolLM2"]).sizes)["SmolLM2"].model == str(folder)


def test_every_way_gets_the_weights_of_a_gguf_file_in_bf16(tmp_path: Path) -> None:
    write_random(tmp_path / "m.gguf", "llama")
    folder = described_here(tmp_path / "m.gguf", tmp_path / "described")
    inputs = dataclasses.replace(INPUTS, folder=str(tmp_path), model=str(tmp_path / "model"), gguf=str(folder))
    assert make_inputs(inputs) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in dense_by_transformers(tmp_path / "m.gguf", folder).state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name
    assert model.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("the").input_ids


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
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    monkeypatch.setattr(compare, "WORKER", "support.step_fake_worker:main")
    monkeypatch.setattr(compare, "job_of", lambda cell, inputs: Job(cell.way))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return Runner(environment=lambda cell: environment, log=tmp_path / "log", log_line=print)


def test_cells_take_turns_and_a_failing_one_is_left_out(fake: Runner) -> None:
    cells = [dataclasses.replace(CELL, processes=2, way=way) for way in (OURS, "fsdp2", "trainer")]
    ours, dead, broken = fake.compare(cells, INPUTS, rounds=2, steps=3)
    assert ours.failed is None
    assert [turn.seconds for turn in ours.turns] == [[2.0] * 3] * 2, "the slowest process"
    assert ours.turns[0].cpu_seconds == [1.0] * 3, "of both"
    assert ours.losses == [2.5] * 8, "one step that does not count, one that is counted, six"
    assert (ours.moved, ours.imported) == ({"reduced": 8}, 1000)
    assert dead.failed == "process 1 ended with code 3: the last words"
    assert broken.failed == "RuntimeError: it broke"
    assert not dead.turns
    assert not broken.turns


def test_ratios_compare_turns_of_the_same_round() -> None:
    ours, peer = measured(OURS, [1.0, 10.0, 1.0], peak=50), measured("peft-bf16", [1.5, 15.0, 1.8])
    assert report.ratios(ours, peer) == pytest.approx([1.5, 1.5, 1.8])
    table = report.table([ours, peer, Measured(dataclasses.replace(CELL, way="trainer"), failed="why")])
    head, ours_row, other, failed = table.rows
    assert dict(zip(head, ours_row, strict=True))["ours: times as fast"] == "1.00 (1.00-1.00)"
    assert dict(zip(head, other, strict=True))["ours: times as fast"] == "1.50 (1.50-1.80)"
    assert dict(zip(head, other, strict=True))["memory"] == "0.50"
    assert failed[-1] == "failed: why"
    assert list(report.reading([[ours, peer]])) == [
        "distlora, NF4 beside PEFT + bitsandbytes, all in bf16: 1.50 times as fast, "
        "with 0.50 of the memory (1 problem)."
    ]
    rows = list(report.rows([[ours, peer]]))
    assert rows[1]["ours_times_as_fast"] == pytest.approx(1.5)


def test_curves_are_compared_with_the_noise_between_seeds(tmp_path: Path) -> None:
    def curve(way: str, gap: float, seed: int = 0) -> Measured:
        trained = measured(way, [1.0], losses=tuple(3 - step / 100 + gap for step in range(20)))
        return dataclasses.replace(trained, cell=dataclasses.replace(trained.cell, seed=seed))

    curves = [curve(OURS, 0.0), curve(OURS, 0.05, seed=1), curve("peft-documented", 0.01), curve("peft-bf16", 0.02)]
    assert next(report.curve_reading(curves)).endswith(
        "no more than between seeds (0.0500) and MORE than between peers (0.0100)."
    )
    kinds = [difference.kind for difference in report.differences(curves)]
    assert sorted(kinds) == ["between peers", "between seeds", "ours and a peer", "ours and a peer"]
    assert len(list(report.curve_reading(curves))) == 1
    on_two = [dataclasses.replace(each, cell=dataclasses.replace(each.cell, processes=2)) for each in curves]
    alone, together, why = report.curve_reading(curves + on_two)
    assert ("on 1 process differ" in alone, "on 2 processes differ" in together) == (True, True)
    assert why.startswith("On several processes ours weighs the losses of a step by their tokens")
    report.draw_curves(curves, tmp_path / "curves.png")
    assert len(list(report.curve_rows(curves))) == 80


@pytest.mark.slow
def test_ours_and_the_peers_train_the_same_on_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sizes=8M", "--checkpointing=block", "--rounds=1", "--tokens=64", "--json"]
    assert step.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(not row["failed"] for row in rows), rows
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=0.01), row["way"]
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=0.02), row["way"]
    sharded = {row["way"]: row["what_ran"] for row in rows if row["processes"] == 2}
    assert sharded["fsdp2"].startswith("DistributedDataParallel")
