"""`distlora bench`: its commands and workers, the memory of a step beside its plan, saves that resume bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distlora.bench import memory as bench
from distlora.bench.checkpoint import Clock, Saved, measure, measure_ours, results
from distlora.bench.memory import Cell, Row
from distlora.bench.requests import CheckpointBench, LoadBench, MemoryBench
from distlora.config import UserError
from distlora.parallel import Ranks
from distlora.system.command_worker import encode_call
from distlora_launcher.cli import main
from distlora_launcher.cli.bench import BENCHES, MODELS, check_gpus
from distlora_launcher.launch.workers import ON_CPU
from support.small_models import write_model_folder


class BecameError(Exception):
    """Stands in for the process that os.execve starts."""

    def __init__(self, executable: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[:2] == [executable, "-m"]
        self.module, self.arguments, self.environment = command[2], command[3:], environment


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(executable: str, command: list[str], environment: dict[str, str]) -> None:
        raise BecameError(executable, command, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def started(*words: str) -> BecameError:
    with pytest.raises(BecameError) as became:
        main.main(["bench", *words])
    return became.value


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["bench", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_a_worker_gets_the_request_of_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ON_CPU:
        monkeypatch.setenv(name, "the user's")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    environment, out = {"OMP_WAIT_POLICY": "PASSIVE"}, str(tmp_path / "new")
    cases: list[tuple[list[str], object]] = [
        (["checkpoint", "--r", "8,16"], CheckpointBench(r=(8, 16))),
        (["memory", "--ranks=2,1", "--json"], MemoryBench(json=True)),
        (["load", "--layers", "2", "--out", out], LoadBench(layers=2, environment=environment, out=out)),
    ]
    for words, request in cases:
        worker = started(*words)
        assert worker.module == "distlora.system.command_worker"
        assert worker.arguments == [encode_call(f"distlora.bench.{words[0]}:main", request)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["load", "--layers", "0"], "--layers=0 is not a positive number; write --layers 1 or more"),
        (["checkpoint", "--r", "0"], "--r: 0 is not a list of positive numbers"),
        (["checkpoint", "--tokens", "0"], "--tokens=0 is not a positive number"),
        (["load", "--ranks", "two"], "--ranks: two is not a list of positive numbers"),
        (["load", "--out", "/proc/none"], "--out=/proc/none: cannot write"),
        (["memory", "--models=12M"], "--models=12M is not a known size (did you mean '10M'?); write 10M, "),
        (["kernels", "--offline"], "python benchmarks/gpu_kernels.py"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, *words)
    assert named in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_every_bench_has_a_usage_that_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--help"]) == 0
    names = capsys.readouterr().out
    for name in BENCHES:
        assert f"\n  {name} " in names
        assert main.main(["bench", name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: distlora bench {name}")
    assert main.main(["bench"]) == 2
    code = (
        "import sys; from distlora_launcher.cli import bench, main; "
        "[main.main(['bench', name, '--help']) for name in bench.BENCHES]; "
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(bench.MODELS) == MODELS
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="--ranks=4 exceeds the 2 GPUs of this node"):
        check_gpus((1, 4))


def test_a_row_names_the_category_with_the_largest_difference() -> None:
    row = Row(
        cell=Cell(model="10M", ranks=2),
        part="head",
        moment="block",
        measured={"codes": 2_000_000, "logits": 9_000_000},
        planned={"codes": 2_000_000, "working": 8_000_000},
        held=(2_000_000, 2_000_000),
        peak=(11_000_000, 10_000_000),
    )
    (table,) = bench.results([row]).tables
    assert " | ".join(table.rows[1]) == (
        "10M | 2 | fsdp2 | block | step | 2.0 | 2.0 | +0.0% | 11.0 | 10.0 | -9.1% | head, planned block "
        "| logits: 9.0, 0.0"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), [("10M", [2]), ("1.5B", [1, 2, 4])])
def test_peak_is_planned_within_5_percent_and_persistent_memory_within_1(model: str, ranks: list[int]) -> None:
    for row in bench.measure(list(bench.cells([model], ranks))):
        assert row.held[1] == pytest.approx(row.held[0], rel=0.01), row
        assert row.peak[1] == pytest.approx(row.peak[0], rel=0.05), row


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


@pytest.mark.slow
def test_every_way_saves_and_resumes() -> None:
    rows, _ = measure(CheckpointBench(r=(4,), layers=1, tokens=16, rounds=1))
    assert len({row.way for row in rows}) == 6
    assert all(row.nbytes > 0 for row in rows)


def test_a_layer_is_counted_as_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "layer", "--models", "llama3_8b", "--tokens", "8192"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    numel = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)  # q, k and v, o, gate and up and down.
    assert float(rows["linears: base products, TFLOP"]) == pytest.approx(4 * 8192 * numel / 1e12, abs=0.005)
    assert float(rows["linears: dequantization, GB"]) == pytest.approx(2 * numel * (2 + 4.127 / 8) / 1e9, abs=0.005)
    hidden, after = (float(each) for each in rows["linears: ms, reads hidden / after"].split(" / "))
    reread = float(rows["linears: results read again (beta = 1), GB"])
    assert after - hidden == pytest.approx(reread / 3.0, abs=0.02)
