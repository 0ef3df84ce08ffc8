"""A step's seconds are never less than what the machine allows, grow with what a step does, add up, and scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distlora.architecture.shapes import CACHE_SHARE
from distlora.config import UserError
from distlora.planner import Machine, plan_of, traffic
from distlora.planner.decoder_sizes import copied_adapters
from distlora.planner.report import sampling_text
from distlora.planner.speed.rates import missing_rates, rates_of
from distlora.planner.speed.sampling import HOST_CHOICE, HOST_LAYER
from distlora.planner.speed.scaling import ScalingRow, numbers_of, scaling
from distlora.planner.speed.timing import StepTime, step_flops, step_time
from distlora.planner.workload import Workload
from distlora.system.numbers import size
from support.plan_inputs import machine_of, model_of, timed_config


def time_of(name: str, machine: Machine, **sections: dict[str, Any]) -> StepTime:
    found = step_time(Workload.of(timed_config(machine.ranks, **sections)), model_of(name), machine)
    return found


NONE = {"quant": {"method": "none"}}
RUNS: list[tuple[str, int, int, dict[str, Any]]] = [
    # (model, ranks, ranks of a machine, settings)
    ("8b", 1, 8, {}),
    ("8b", 8, 8, {"train": {"accumulate": "block", "global_batch": 64}}),
    ("70b", 16, 8, {"parallel": {"prefetch": False}}),
    ("70b", 32, 8, {"parallel": {"shard_degree": 8, "resident_blocks": 20}}),
    ("70b", 8, 8, {"parallel": {"backend": "zero3", "offload_base": True}}),
    ("moe", 8, 8, {"train": {"global_batch": 64, "checkpointing": "selective"}}),
    ("tied", 4, 1, {"train": {"global_batch": 64, "checkpointing": "offload"}}),
    ("8b", 16, 4, {**NONE, "adapter": {"method": "full", "target_modules": "all-linear"}}),
    ("8b", 16, 8, {**NONE, "adapter": {"method": "full"}, "parallel": {"shard_degree": 4}}),
    (
        "8b",
        12,
        8,
        {"adapter": {"target_modules": "qv", "modules_to_save": ["lm_head"]}, "parallel": {"shard_degree": 6}},
    ),
]


@pytest.mark.parametrize(("name", "ranks", "per_machine", "sections"), RUNS, ids=str)
def test_no_step_is_faster_than_the_machine(name: str, ranks: int, per_machine: int, sections: dict[str, Any]) -> None:
    machine, model = machine_of(ranks=ranks, per_machine=per_machine), model_of(name)
    config, time = timed_config(ranks, **sections), time_of(name, machine, **sections)
    step = traffic.step_traffic(
        Workload.of(config), model.shapes, world=ranks, accumulation=config.train.accumulation(ranks)
    )
    flops = step_flops(Workload.of(config), model, machine)
    assert time.seconds >= flops.total / machine.flops
    assert time.seconds >= sum(time.moved.values()) / machine.bandwidth
    if ranks > machine.ranks_per_machine:
        assert time.seconds >= step.into_machine(per_machine) / machine.network
    if machine.ranks_per_machine > 1:
        assert time.seconds >= step.received / machine.link
    if "full" not in str(sections):
        assert time.mfu < 0.8
    assert sum(time.by_part.values()) == pytest.approx(time.seconds)
    assert all(seconds >= 0 for seconds in (*time.by_term.values(), *time.by_part.values()))
    assert time.tokens == 64 * 2048
    assert time.tokens_per_second == pytest.approx(ranks * time.tokens_per_second_of_a_rank)


def test_more_work_is_never_faster_and_a_better_machine_never_slower() -> None:
    machine = machine_of(ranks=16)
    base = time_of("70b", machine)
    for rate in ("flops", "bandwidth", "link", "network"):
        for factor in (0.1, 0.5):
            slower = dataclasses.replace(machine, **{rate: factor * getattr(machine, rate)})
            assert time_of("70b", slower).seconds >= base.seconds, rate
    starved = dataclasses.replace(machine, network=1e9)
    assert time_of("70b", starved).binds == "network"
    assert time_of("70b", starved, parallel={"shard_degree": 8}).binds == "compute", "a copy on each machine"
    assert base.binds == "compute"
    assert time_of("70b", dataclasses.replace(machine, link=1e9)).binds == "link"
    more = [
        {"train": {"global_batch": 128}},
        {"adapter": {"target_modules": "all-linear", "r": 128}},
        {"adapter": {"target_modules": "all-linear", "use_dora": True}},
        {"data": {"path": "none.jsonl", "sequence_length": 4096}},
        {"parallel": {"prefetch": False}},
        {"train": {"global_batch": 64, "objective": "dpo"}},
    ]
    for sections in more:
        assert time_of("70b", machine, **sections).seconds > base.seconds, sections
    less: list[dict[str, Any]] = [
        {"train": {"global_batch": 64, "checkpointing": "none"}},
        {"train": {"global_batch": 64, "checkpointing": "selective"}},
        {"train": {"global_batch": 64}, "quant": {"dense_layers": 10}},
        {"train": {"global_batch": 64, "accumulate": "block"}},
        {"parallel": {"resident_blocks": 10}},
        {"adapter": {"target_modules": "qv"}},
        NONE,
    ]
    for sections in less:
        assert time_of("70b", machine, **sections).seconds < base.seconds, sections


def test_what_a_user_measured_is_reached_and_what_is_not_known_gives_no_time() -> None:
    machine, work, model = machine_of(ranks=2), Workload.of(timed_config(2)), model_of("8b")
    given = rates_of(work, dataclasses.replace(machine, measured=frozenset({"tflops"})))
    assert given.matrices == given.peak == 989e12, "machine_of has put the user's figure there"
    for rate in ("flops", "bandwidth", "link"):
        assert step_time(work, model, dataclasses.replace(machine, **{rate: None})) is None
    assert step_time(work, model, dataclasses.replace(machine, network=None)) is not None
    fp32 = timed_config(2, train={"dtype": "fp32"})
    assert step_time(Workload.of(fp32), model_of("8b"), machine) is None
    assert missing_rates(Workload.of(fp32), machine) == ("gpu.tflops",)
    offload = timed_config(2, train={"checkpointing": "offload"})
    assert step_time(Workload.of(offload), model_of("8b"), dataclasses.replace(machine, host_link=None)) is None
    cpu = dataclasses.replace(machine, is_gpu=False, gpu=None, flops=None, bandwidth=None, link=None)
    unknown = ("gpu.tflops", "gpu.memory_gb_per_second", "gpu.link_gb_per_second")
    assert missing_rates(Workload.of(timed_config(2)), cpu) == unknown


def test_the_length_of_a_run_gives_its_hours_and_its_cost() -> None:
    machine = machine_of(ranks=8, price_per_hour=2.0)
    by_steps = time_of("8b", machine, train={"global_batch": 64, "max_steps": 100})
    assert by_steps.hours == pytest.approx(100 * by_steps.seconds / 3600)
    assert by_steps.cost == pytest.approx(by_steps.hours * 8 * 2.0)
    by_tokens = time_of("8b", machine, plan={"tokens": 64 * 2048 * 7 + 1})
    assert by_tokens.steps == 8
    assert time_of("8b", machine).hours is None
    with pytest.raises(UserError, match=r"plan\.tokens=9 has no effect with train\.max_steps=100"):
        timed_config(8, train={"max_steps": 100}, plan={"tokens": 9})
    plan = plan_of(timed_config(8), model_of("8b"), machine)
    assert plan.as_json()["time"]["seconds"] == pytest.approx(by_steps.seconds)


ONLINE: dict[str, Any] = {
    "train": {"objective": "grpo", "global_batch": 512},
    "data": {"path": "p.jsonl", "sequence_length": 1024, "rewards": ["exact_match"]},
    "rollout": {"num_generations": 8, "max_new_tokens": 512},
}


@pytest.mark.parametrize(("name", "ranks", "keys"), [("8b", 1, 8 * 128 * 32), ("70b", 8, 8 * 128 * 80)])
def test_sampling_reads_the_base_and_the_cache_for_each_token(name: str, ranks: int, keys: int) -> None:
    machine = machine_of(ranks=ranks)
    plan = plan_of(timed_config(ranks, **ONLINE), model_of(name), machine)
    sampling = plan.sampling
    assert sampling.cache_bytes == sampling.rows * 1024 * 2 * 2 * keys, "bf16 keys and values of all layers"
    assert sampling.cache_bytes + sampling.base_bytes + plan.device.persistent < machine.usable_bytes
    copies = copied_adapters(plan.work, plan.model.shapes, machine)[1]
    assert sampling.adapter_bytes == copies > 0, "the engine copies the adapters beside training's copies"
    assert f"{size(copies)} for copies of the adapters" in sampling_text(sampling, plan)
    assert sampling.is_whole
    turns = -(-512 // ranks // sampling.rows)
    numel = plan.model.shapes.quantized_numel("nf4", (None, None))
    packed = 0.5 * numel
    assert sampling.dense_bytes == (2 * numel if ranks == 1 else 0), "64 rows of a rank decode NF4 in the product"
    read = turns * 512 * (packed + sampling.cache_bytes)
    assert read / machine.bandwidth < sampling.seconds < 10 * read / machine.bandwidth
    assert sampling.tokens == 512 * 512
    less = dataclasses.replace(machine, usable_bytes=plan.device.persistent + 2**31)
    tight = plan_of(timed_config(ranks, **ONLINE), model_of(name), less).sampling
    assert tight.rows < sampling.rows
    assert tight.seconds > sampling.seconds
    assert tight.is_whole == (ranks == 1), "2 GiB hold no base of 70B"
    assert tight.dense_bytes == 0
    assert tight.rows == int(CACHE_SHARE * (2**31 - copies) / (1024 * 2 * 2 * keys)), "what the copies leave"
    few = plan_of(
        timed_config(ranks, **ONLINE | {"train": {"objective": "grpo", "global_batch": 8}}), model_of(name), machine
    )
    layers = plan.model.shapes.num_layers
    assert few.sampling.seconds == pytest.approx(512 * (HOST_LAYER * layers + HOST_CHOICE)), "its host launches kernels"


def rows_of(rows: list[ScalingRow], **values: object) -> dict[int, ScalingRow]:
    return {row.ranks: row for row in rows if all(getattr(row, name) == value for name, value in values.items())}


def test_rows_are_the_plans_own_time_from_1_to_1024_gpus() -> None:
    config, model, machine = timed_config(8, train={"global_batch": 2048}), model_of("8b"), machine_of(ranks=8)
    rows = scaling(plan_of(config, model, machine))
    whole = rows_of(rows, layout="one replica")
    assert tuple(whole) == numbers_of(8)
    assert tuple(rows_of(rows, layout="replica per node")) == numbers_of(8)[4:]
    plan = step_time(Workload.of(config), model, machine)
    assert whole[8].seconds == plan.seconds
    assert whole[8].tokens_per_second == plan.tokens_per_second
    assert all(row.rows == 2048 for row in rows)
    assert [row.machines for row in whole.values()] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128]


def test_more_gpus_with_as_many_rows_each_never_get_faster_each() -> None:
    config, machine = timed_config(8, train={"global_batch": 32}), machine_of(ranks=8)
    rows = scaling(plan_of(config, model_of("8b"), machine), kind="weak")
    for layout in ("one replica", "replica per node"):
        found = rows_of(rows, layout=layout)
        efficiencies = [row.efficiency for row in found.values()]
        assert efficiencies == sorted(efficiencies, reverse=True), layout
        assert all(row.rows == 4 * ranks and row.accumulation == 4 for ranks, row in found.items())


def test_what_cannot_be_said_is_refused() -> None:
    config, model, machine = timed_config(8), model_of("8b"), machine_of(ranks=8)
    with pytest.raises(UserError, match=r"the scaling of H100 SXM 80 GB is unknown.*; set gpu\.tflops$"):
        scaling(plan_of(config, model, dataclasses.replace(machine, flops=None)))


@pytest.mark.parametrize("parallel", [{"backend": "zero3", "offload_base": True}, {"resident_blocks": 4}])
def test_settings_of_several_ranks_are_left_out_of_one(parallel: dict[str, Any]) -> None:
    plan = plan_of(timed_config(8, parallel=parallel), model_of("8b"), machine_of(ranks=8))
    found = rows_of(scaling(plan), layout="one replica")
    one, eight = found[1], found[8]
    assert eight.tokens_per_second > 4 * one.tokens_per_second
