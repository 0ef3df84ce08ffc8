"""The kernels' benchmark: all rows are present and right, wrong variants get no figure, bounds use the right rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from distlora_kernels.bench import linear, products, table
from distlora_kernels.bench.__main__ import main, verdicts
from distlora_kernels.bench.linear import train
from distlora_kernels.bench.problem import BLOCK_FORMATS, groups_named, make_batch, make_weights
from distlora_kernels.bench.table import (
    FORWARD,
    TRAINING,
    Candidate,
    Place,
    Rates,
    Row,
    check,
    judge,
    markdown,
    worst_tile_error,
)
from torch import Tensor

from distlora_kernels.lora_linear import lora_linears
from support.closeness import assert_close

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPES = ((128, 64), (66, 64))


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m bench` without distlora installed; without a GPU in Triton's interpreter with patched bf16."""
    mend = "import triton_interpreter\n" if not torch.cuda.is_available() else ""
    run = "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    code = f"{mend}import sys, runpy\nsys.argv[1:] = {list(arguments)!r}\n{run}"
    paths = (ROOT / "kernels", ROOT, ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )


@pytest.mark.ci
def test_every_row_is_there_and_right(tmp_path: Path) -> None:
    report, on_gpu = tmp_path / "report.md", torch.cuda.is_available()
    finished = run_bench(
        *("--shapes", "128x64+66x64,128x64", "--m", "5", "--r", "3"),
        *("--markdown", str(report), "--device", "cuda" if on_gpu else "cpu"),
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert finished.stdout.strip() == report.read_text().strip()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in finished.stdout.splitlines()]
    found = {(row[0], row[2], row[3]) for row in cells if len(row) == 9}
    sequences = {"PEFT sequence, fp32 adapter", "PEFT sequence, autocast", "Unsloth sequence"}
    adapted = {"plain bf16 GEMM", "ours, scratch", "ours, fused"} | sequences
    for shape in ("128x64 + 66x64", "128x64"):
        for task in (FORWARD, TRAINING):
            alone = {"ours, fused GEMM alone"} if (shape, task) == ("128x64", FORWARD) else set()
            assert {name for where, what, name in found if (where, what) == (shape, task)} == adapted | alone
        by_format = {
            (what, name)
            for where, what, name in found
            if where == shape and what.startswith("forward") and ", " in what
        }
        tasks = {f"{task}, {format.label}" for task in (FORWARD, TRAINING) for format in BLOCK_FORMATS}
        assert by_format == {(task, name) for task in tasks for name in ("plain bf16 GEMM", "ours, scratch")}
    for shape in ("128x64", "66x64"):
        tasks = {"nf4", "nf4_absmax", *(format.name for format in BLOCK_FORMATS)}
        assert {(shape, f"{name} to bf16", "ours") for name in tasks} <= found
        for task in ("x A^T", "(x A^T) B^T", "dY B, dB", "dA"):
            assert {name for where, what, name in found if (where, what) == (shape, task)} == {"library GEMM", "ours"}
    for task in ("RMSNorm", "SwiGLU", "rotary embedding", "cross-entropy"):
        assert {name for where, what, name in found if (where, what) == ("64", task)} >= {"transformers", "ours"}
    figures = [row[4] for row in cells if len(row) == 9 and row[2] not in ("task", "--")]
    if on_gpu:
        assert all(float(figure) > 0 for figure in figures)
        assert "not measured" in finished.stdout
    else:
        assert set(figures) == {"no figures"}
        assert "No figures: Triton's interpreter" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linears",), "no section 'linears'"),
        (("--shapes", "llama-9b"), "llama-70b"),
        (("--shapes", "64x64+64x128"), "not '64x64+64x128'"),
        (("--m", "16,"), "'16,' is not a list of numbers"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_format_has_right_rows() -> None:
    formats = {"MXFP4", "NVFP4", "int4 in groups of 128", "FP8 in 128 x 128 blocks", "Q4_0", "Q4_K"}
    assert formats <= {format.label for format in BLOCK_FORMATS}
    groups = groups_named("130x128+66x128")
    rows = [*linear.rows(groups, (5,), 3, CPU, None, BLOCK_FORMATS), *products.dequantize_rows(groups, CPU, None)]
    assert not [row for row in rows if row.fault]
    assert len(rows) == 4 * len(BLOCK_FORMATS) + 2 * (len(BLOCK_FORMATS) + 3)


SEQUENCES = {"peft": linear.peft, "peft under autocast": linear.peft_autocast, "unsloth": linear.unsloth}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_the_peers_sequences_give_what_ours_gives(sequence: Callable[..., Sequence[Tensor]]) -> None:
    """Outputs are within one bf16 epsilon and gradients within two: each side rounds intermediates."""
    weights, batch = make_weights(SHAPES, 8, CPU), make_batch(SHAPES, 37, CPU)
    ours, theirs = (
        train(partial(forward, linears=weights.linears), batch, weights.masters) for forward in (lora_linears, sequence)
    )
    assert theirs.keys() == ours.keys() == {"y0", "y1", "dx", "da0", "db0", "da1", "db1"}
    for name, value in ours.items():
        assert_close(theirs[name].bfloat16(), value.bfloat16(), ulps=2 if name.startswith("d") else 1)


def test_one_wrong_tile_of_many_is_seen() -> None:
    right = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    assert worst_tile_error(right.bfloat16(), right) < 0.5
    wrong = right.clone()
    wrong[640:, 960:] *= 1.1  # a corner of 60 x 40
    assert worst_tile_error(wrong, right) > 5
    wrong[0, 0] = float("nan")
    assert math.isnan(worst_tile_error(wrong, right))
    assert check({"y": wrong}, {"y": right})[1] == "y is nan ulps off (at most 2)"
    assert check({"y": right}, {"y": right, "dx": right})[1]


def test_what_is_right_is_timed_beside_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a clock that knows what each candidate takes."""
    clock = {"forward: library": 4e-6, "forward: good": 5e-6}
    monkeypatch.setattr(table, "median_seconds", lambda runs, device: {name: clock[name] for name in runs})
    monkeypatch.setattr(table, "peak_bytes", lambda run, device: 3 * 2**20)
    right = torch.ones(4, 4)
    place = Place(section="linears", shape="4x4", num_rows=4, device=torch.device("cuda"), rates=Rates(1e12, 1e15))
    outputs = {"library": right, "good": right, "bad": right * 1.1}
    rows = judge(
        place,
        [
            Candidate(
                name=name,
                task=FORWARD,
                run=lambda y=y: {"y": y},
                expected={"y": right},
                floor=(2e6, 3),
            )
            for name, y in outputs.items()
        ],
        baseline="library",
    )
    lines = markdown(rows).splitlines()
    assert "| 4x4 | 4 | forward | good | 5.0 | 1.25 | 40% of copy bandwidth (400 GB/s) | 3 | 0.00 |" in lines
    assert "| 4x4 | 4 | forward | bad | WRONG: y is 13 ulps off (at most 2) |  |  |  | 12.80 |" in lines


@pytest.mark.parametrize(("factor", "word"), [(0.99, "PASS"), (1.01, "FAIL")])
def test_bounds_are_read_off_the_right_rows(factor: float, word: str) -> None:
    """Times just within the bounds and just beyond them; and rows of other shapes, which have none."""
    rows = [_row("llama-70b/gate-up 28672x8192 + 28672x8192", 8192, linear.SCRATCH, TRAINING, 99.0)]
    for shape, most in (("llama-70b/o 8192x8192", 1.16), ("llama-70b/down 8192x28672", 1.12)):
        rows += [
            _row(shape, 8192, linear.PLAIN, TRAINING, 1.0),
            _row(shape, 8192, linear.SCRATCH, TRAINING, most * factor),
            _row(shape, 8192, linear.PEFT, TRAINING, 1.3 * most),
            _row(shape, 8192, linear.UNSLOTH, TRAINING, most),
        ]
    rows.append(_row("llama-70b/o 8192x8192", 16, linear.FUSED_ALONE, FORWARD, 1.0, share=0.60 / factor))
    rows.append(_row("8192x8192", 0, products.OURS, products.TO_BF16, 1.0, share=0.85 / factor))
    rows.append(_row("1024x4096", 0, products.OURS, products.TO_BF16, 1.0, share=0.1))
    lines = verdicts(rows)
    assert len(lines) == 8
    assert all(line.startswith(f"- {word} ") for line in lines)


def _row(shape: str, num_rows: int, name: str, task: str, seconds: float, *, share: float | None = None) -> Row:
    return Row(
        section=linear.SECTION if num_rows else products.DEQUANTIZATION,
        shape=shape,
        num_rows=num_rows,
        task=task,
        name=name,
        fault="",
        worst_ulps=0.3,
        seconds=seconds,
        floor_share=share,
    )
