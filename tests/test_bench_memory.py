"""`distlora bench memory` measures steps of random Llamas beside their plan."""

from __future__ import annotations

import pytest

from distlora.architecture.shapes import shapes_of
from distlora.bench import memory as bench
from distlora.bench.memory import Cell, Row
from distlora.config import UserError
from distlora_launcher.cli.bench import memory


def test_models_have_the_size_in_their_name() -> None:
    assert tuple(bench.MODELS) == memory.MODELS
    units = {"M": 1e6, "B": 1e9}
    for name, settings in bench.MODELS.items():
        numel = shapes_of({"model_type": "llama", **settings}, name).numel
        assert numel == pytest.approx(float(name[:-1]) * units[name[-1]], rel=0.15), name


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="--ranks=4 exceeds the 2 GPUs of this machine"):
        memory.parse(["--ranks=1,4"])


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
