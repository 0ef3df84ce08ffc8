"""A step's seconds are never less than what the machine allows, grow with what a step does, and add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distlora.config import UserError
from distlora.planner import Machine, plan_of, traffic
from distlora.planner.flops import step_flops
from distlora.planner.report import empty_rows
from distlora.planner.speed.rates import missing_rates, rates_of, step_collectives
from distlora.planner.speed.timing import StepTime, step_time
from distlora.planner.workload import Workload
from support.plan_configs import config_of
from support.plan_inputs import machine_of, model_of


def time_of(name: str, machine: Machine, **sections: dict[str, Any]) -> StepTime:
    found = step_time(Workload.of(config_of(machine.ranks, **sections)), model_of(name), machine)
    assert found is not None
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
    config, time = config_of(ranks, **sections), time_of(name, machine, **sections)
    assert machine.flops is not None
    assert machine.bandwidth is not None
    step = traffic.step_traffic(
        Workload.of(config), model.shapes, world=ranks, accumulation=config.train.accumulation(ranks)
    )
    flops = step_flops(Workload.of(config), model, ranks=ranks, is_gpu=True)
    assert time.seconds >= flops.total / machine.flops
    assert time.seconds >= sum(time.moved.values()) / machine.bandwidth
    if ranks > machine.ranks_per_machine:
        assert machine.network is not None
        assert time.seconds >= step.into_machine(per_machine) / machine.network
    if machine.ranks_per_machine > 1:
        assert machine.link is not None
        assert time.seconds >= step.received / machine.link
    if "full" not in str(sections):
        assert time.mfu < 0.8
    assert sum(time.by_part.values()) == pytest.approx(time.seconds)
    assert all(seconds >= 0 for seconds in (*time.by_term.values(), *time.by_part.values()))
    assert time.tokens == 64 * 2048
    assert time.tokens_per_second == pytest.approx(ranks * time.tokens_per_second_of_a_rank)


@pytest.mark.parametrize(("name", "ranks", "per_machine", "sections"), RUNS, ids=str)
def test_what_is_divided_among_collectives_is_what_a_step_moves(
    name: str, ranks: int, per_machine: int, sections: dict[str, Any]
) -> None:
    machine, model = machine_of(ranks=ranks, per_machine=per_machine), model_of(name)
    config = config_of(ranks, **sections)
    accumulation = config.train.accumulation(ranks)
    step = traffic.step_traffic(Workload.of(config), model.shapes, world=ranks, accumulation=accumulation)
    collectives, passes = (
        step_collectives(Workload.of(config), model, machine),
        traffic.passes_of(Workload.of(config), accumulation),
    )
    resident = config.parallel.resident_blocks
    assert isinstance(resident, int)
    moved = model.shapes.num_layers - resident
    once = (*collectives.sums, *collectives.last)
    inside, across = (
        passes * (2 * moved * getattr(collectives.gather, kind) + getattr(collectives.ends, kind))
        + sum(getattr(each, kind) for each in once)
        for kind in ("inside", "across")
    )
    # Where copies do not fill machines, the ranks that own the same rows are in different ones.
    if machine.ranks_per_machine > 1 and (not step.reduced_rows or per_machine % step.shards == 0):
        assert inside == pytest.approx(step.received, rel=1e-6, abs=64)
    assert across >= step.into_machine(machine.ranks_per_machine) * (1 - 1e-9)
    assert (across > 0) == (ranks > per_machine)


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


def test_documents_that_are_packed_take_less_attention_and_nothing_else() -> None:
    model, machine, config = model_of("8b"), machine_of(), config_of(1)
    whole, packed = (step_time(Workload.of(config), model, machine, document=document) for document in (None, 256))
    assert whole is not None
    assert packed is not None
    assert packed.seconds < whole.seconds
    assert packed.by_part["head"] == whole.by_part["head"]
    assert any("hold documents of 256" in said for said in packed.assumptions)


def test_what_a_user_measured_is_reached_and_what_is_not_known_gives_no_time() -> None:
    machine = machine_of(ranks=2)
    plain, given = (
        rates_of(Workload.of(config_of(2)), dataclasses.replace(machine, measured=frozenset(measured)))
        for measured in ((), ("tflops",))
    )
    assert plain is not None
    assert given is not None
    assert plain.matrices == 0.8 * 989e12
    assert plain.link == 0.8 * 450e9
    assert given.matrices == given.peak == 989e12, "machine_of has put the user's figure there"
    for rate in ("flops", "bandwidth", "link"):
        assert (
            step_time(Workload.of(config_of(2)), model_of("8b"), dataclasses.replace(machine, **{rate: None})) is None
        )
    assert step_time(Workload.of(config_of(2)), model_of("8b"), dataclasses.replace(machine, network=None)) is not None
    fp32 = config_of(2, train={"dtype": "fp32"})
    assert step_time(Workload.of(fp32), model_of("8b"), machine) is None
    assert missing_rates(Workload.of(fp32), machine) == ("gpu.tflops",)
    measured = dataclasses.replace(machine, flops=50e12, measured=frozenset({"tflops"}))
    assert step_time(Workload.of(fp32), model_of("8b"), measured) is not None
    offload = config_of(2, train={"checkpointing": "offload"})
    assert step_time(Workload.of(offload), model_of("8b"), dataclasses.replace(machine, host_link=None)) is None
    cpu = dataclasses.replace(machine, is_gpu=False, gpu=None, flops=None, bandwidth=None, link=None)
    unknown = ("gpu.tflops", "gpu.memory_gb_per_second", "gpu.link_gb_per_second")
    assert missing_rates(Workload.of(config_of(2)), cpu) == unknown


def test_the_length_of_a_run_gives_its_hours_and_its_cost() -> None:
    machine = machine_of(ranks=8, price_per_hour=2.0)
    by_steps = time_of("8b", machine, train={"global_batch": 64, "max_steps": 100})
    assert by_steps.hours == pytest.approx(100 * by_steps.seconds / 3600)
    assert by_steps.hours is not None
    assert by_steps.cost == pytest.approx(by_steps.hours * 8 * 2.0)
    by_tokens = time_of("8b", machine, plan={"tokens": 64 * 2048 * 7 + 1})
    assert by_tokens.steps == 8
    assert time_of("8b", machine).hours is None
    priced = time_of("8b", machine)
    assert priced.cost_of_a_million_tokens == pytest.approx(8 * 2.0 / 3600 / priced.tokens_per_second * 1e6)
    assert by_steps.cost == pytest.approx(100 * 64 * 2048 / 1e6 * (by_steps.cost_of_a_million_tokens or 0))
    assert time_of("8b", machine_of(ranks=8)).cost_of_a_million_tokens is None
    with pytest.raises(UserError, match=r"plan\.tokens=9 has no effect with train\.max_steps=100"):
        config_of(8, train={"max_steps": 100}, plan={"tokens": 9})
    plan = plan_of(config_of(8), model_of("8b"), machine)
    assert plan.as_json()["time"]["seconds"] == pytest.approx(by_steps.seconds)


def test_rows_that_are_missing_are_run_and_count_for_nothing() -> None:
    machine = machine_of(ranks=8)
    few, whole = (time_of("8b", machine, train={"global_batch": rows}) for rows in (4, 8))
    assert few.seconds == pytest.approx(whole.seconds)
    assert few.mfu == pytest.approx(whole.mfu / 2)
    assert few.tokens_per_second == pytest.approx(whole.tokens_per_second / 2)


ONLINE: dict[str, Any] = {
    "train": {"objective": "grpo", "global_batch": 512},
    "data": {"path": "p.jsonl", "sequence_length": 1024, "rewards": ["exact_match"]},
    "rollout": {"num_generations": 8, "max_new_tokens": 512},
}


def test_sequences_of_sampled_answers_are_planned_as_the_most_that_there_may_be() -> None:
    sections = ONLINE | {"train": {"objective": "grpo", "global_batch": 520, "micro_batch": 3}}
    plan = plan_of(config_of(8, **sections), model_of("8b"), machine_of(ranks=8))
    assert empty_rows(plan) is None, "how many there are is unknown"
    assert plan.time is not None
    assert any("at most this time" in each for each in plan.time.assumptions)
    sft = plan_of(config_of(8, train={"global_batch": 520, "micro_batch": 3}), model_of("8b"), machine_of(ranks=8))
    assert empty_rows(sft) is not None
    with pytest.raises(UserError, match=r"plan\.tokens=9 is not the length of a run that samples"):
        config_of(8, **ONLINE, plan={"tokens": 9})


@pytest.mark.parametrize(("name", "ranks", "keys"), [("8b", 1, 8 * 128 * 32), ("70b", 8, 8 * 128 * 80)])
def test_sampling_reads_the_base_and_the_cache_for_each_token(name: str, ranks: int, keys: int) -> None:
    machine = machine_of(ranks=ranks)
    plan = plan_of(config_of(ranks, **ONLINE), model_of(name), machine)
    sampling = plan.sampling
    assert sampling is not None
    assert machine.usable_bytes is not None
    assert machine.bandwidth is not None
    assert sampling.cache_bytes == sampling.rows * 1024 * 2 * 2 * keys, "bf16 keys and values of all layers"
    assert sampling.cache_bytes + sampling.base_bytes + plan.device.persistent < machine.usable_bytes
    assert sampling.is_whole
    turns = -(-512 // ranks // sampling.rows)
    packed = 0.5 * plan.model.shapes.quantized_numel("nf4", (None, None))
    read = turns * 512 * (packed + sampling.cache_bytes)
    assert sampling.seconds is not None
    assert read / machine.bandwidth < sampling.seconds < 10 * read / machine.bandwidth
    assert sampling.tokens == 512 * 512
    less = dataclasses.replace(machine, usable_bytes=plan.device.persistent + 2**31)
    tight = plan_of(config_of(ranks, **ONLINE), model_of(name), less).sampling
    assert tight is not None
    assert tight.rows < sampling.rows
    assert tight.seconds is not None
    assert tight.seconds > sampling.seconds
    assert tight.is_whole == (ranks == 1), "2 GiB hold no base of 70B"
