"""Scaling is the plan's own time at other numbers of GPUs: it loses, by what binds, and a replica per node saves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.planner import plan_of
from distlora.planner.speed.scaling import FABRICS, ScalingRow, numbers_of, scaling
from distlora.planner.speed.timing import step_time
from distlora.planner.workload import Workload
from support.plan_configs import config_of
from support.plan_inputs import machine_of, model_of


def rows_of(rows: list[ScalingRow], **values: object) -> dict[int, ScalingRow]:
    return {row.ranks: row for row in rows if all(getattr(row, name) == value for name, value in values.items())}


def test_rows_are_the_plans_own_time_from_1_to_1024_gpus() -> None:
    config, model, machine = config_of(8, train={"global_batch": 2048}), model_of("8b"), machine_of(ranks=8)
    rows = scaling(plan_of(config, model, machine))
    whole = rows_of(rows, layout="one replica")
    assert tuple(whole) == numbers_of(8)
    assert tuple(rows_of(rows, layout="replica per node")) == numbers_of(8)[4:]
    plan = step_time(Workload.of(config), model, machine)
    assert plan is not None
    assert whole[8].seconds == plan.seconds
    assert whole[8].tokens_per_second == plan.tokens_per_second
    assert all(row.rows == 2048 for row in rows)
    assert [row.machines for row in whole.values()] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128]
    assert whole[1].efficiency == 1.0
    assert all(row.efficiency <= 1.0 for row in rows)
    assert all(row.fits for row in rows), "8B in NF4 with a row at a time"
    assert all(row.assumptions for row in rows)


def test_more_gpus_with_as_many_rows_each_never_get_faster_each() -> None:
    config, machine = config_of(8, train={"global_batch": 32}), machine_of(ranks=8)
    rows = scaling(plan_of(config, model_of("8b"), machine), kind="weak")
    for layout in ("one replica", "replica per node"):
        found = rows_of(rows, layout=layout)
        efficiencies = [row.efficiency for row in found.values()]
        assert efficiencies == sorted(efficiencies, reverse=True), layout
        assert all(row.rows == 4 * ranks and row.accumulation == 4 for ranks, row in found.items())
    one, each = (rows_of(rows, layout=layout)[1024] for layout in ("one replica", "replica per node"))
    assert one.binds in ("network", "latency"), "a ring of 1,024 for each block"
    assert each.binds == "compute"
    assert each.tokens_per_second > one.tokens_per_second
    assert each.efficiency / one.efficiency == pytest.approx(each.tokens_per_second / one.tokens_per_second)


def test_a_fabric_is_its_own_and_not_what_the_user_says_of_the_links_there_are() -> None:
    model, machine = model_of("8b"), machine_of(ranks=8)
    given = config_of(8, gpu={"link_gb_per_second": 200.0, "network_gb_per_second": 9.0})
    plain, said = (scaling(plan_of(config, model, machine), fabrics=FABRICS) for config in (config_of(8), given))
    assert plain == said
    for row in rows_of(plain, fabric="PCIe 4, one 100 Gb/s Ethernet", layout="one replica").values():
        assert row.ranks == 1 or any("80% of 31.5 GB/s" in sentence for sentence in row.assumptions)
        assert not any("3.4 us" in sentence for sentence in row.assumptions), "the latency of NVLink"


def test_what_cannot_be_said_is_refused() -> None:
    config, model, machine = config_of(8), model_of("8b"), machine_of(ranks=8)
    with pytest.raises(UserError, match=r"20 GPUs do not fill whole nodes of 8; use a multiple of 8"):
        scaling(plan_of(config, model, machine), numbers=(8, 20))
    with pytest.raises(UserError, match=r"the scaling of H100 SXM 80 GB is unknown.*; set gpu\.tflops$"):
        scaling(plan_of(config, model, dataclasses.replace(machine, flops=None)))


def test_settings_of_several_ranks_are_left_out_of_one(tmp_path: Path) -> None:
    model, machine = model_of("8b"), machine_of(ranks=8)
    file = tmp_path / "deepspeed.json"
    file.write_text("{}")
    offloaded = {"backend": "zero3", "offload_base": True, "deepspeed_config": str(file)}
    for parallel in (offloaded, {"resident_blocks": 4}, {"shard_degree": 4}):
        config = config_of(8, parallel=parallel)
        one, eight = scaling(plan_of(config, model, machine), numbers=(1, 8), layouts=("one replica",))
        assert one.ranks == 1
        assert eight.tokens_per_second > 4 * one.tokens_per_second
