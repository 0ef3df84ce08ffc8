"""`distlora bench memory` measures steps of random Llamas beside their plan."""

from __future__ import annotations

import pytest

from distlora.architecture.shapes import shapes_of
from distlora.bench import against_plan
from distlora.bench.against_plan import Cell, Row
from distlora.config import UserError
from distlora_launcher.cli.bench import memory


def test_models_are_of_the_size_that_they_are_named_by() -> None:
    assert tuple(against_plan.MODELS) == memory.MODELS
    units = {"M": 1e6, "B": 1e9}
    for name, settings in against_plan.MODELS.items():
        numel = shapes_of({"model_type": "llama", **settings}, name).numel
        assert numel == pytest.approx(float(name[:-1]) * units[name[-1]], rel=0.15), name


def test_what_cannot_be_measured_is_refused_and_the_rest_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--models=12M is no size that is known \(did you mean '10M'\?\); write 10M, "):
        memory.checked(["--models=12M"])
    with pytest.raises(UserError, match="--ranks=0 are no positive numbers"):
        memory.checked(["--ranks=0"])
    assert memory.checked(["--ranks=2,1", "--json"]) == ["--models=10M,100M", "--ranks=1,2", "--json"]
    monkeypatch.setattr(memory, "gpu_count", lambda: 2)
    with pytest.raises(UserError, match="--ranks=4 are more than the 2 GPUs that this machine shows"):
        memory.checked(["--ranks=1,4"])


def test_a_row_names_the_kind_that_is_furthest_off() -> None:
    row = Row(
        cell=Cell(model="10M", ranks=2),
        part="head",
        moment="block",
        measured={"codes": 2_000_000, "logits": 9_000_000},
        planned={"codes": 2_000_000, "working": 8_000_000},
        held=(2_000_000, 2_000_000),
        peak=(11_000_000, 10_000_000),
    )
    (table,) = against_plan.results([row]).tables
    assert " | ".join(table.rows[1]) == (
        "10M | 2 | fsdp2 | block | step | 2.0 | 2.0 | +0.0% | 11.0 | 10.0 | -9.1% | head, planned block "
        "| logits: 9.0, 0.0"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), [("10M", [2]), ("1.5B", [1, 2, 4])])
def test_a_step_is_planned_within_5_percent_and_what_stays_within_1(model: str, ranks: list[int]) -> None:
    for row in against_plan.measure(list(against_plan.cells([model], ranks))):
        assert row.held[1] == pytest.approx(row.held[0], rel=0.01), row
        assert row.peak[1] == pytest.approx(row.peak[0], rel=0.05), row
