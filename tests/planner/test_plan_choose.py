"""Check that the planner chooses the fastest settings that fit, changes nothing fixed, and gives reasons.

If nothing fits it names the nearest settings that do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from distlora.config import Config, UserError
from distlora.config.checks import check_settings
from distlora.config.plan import CHOSEN
from distlora.planner import Machine, Plan, PlannedModel, plan_of
from distlora.planner.choose import (
    RESERVE,
    Search,
    choose,
    cost_of,
    has_room,
    is_as_good,
    resolve_auto,
)
from distlora.planner.report import needs
from distlora.planner.suggest import (
    memory_saving_changes,
    nearest,
    with_ranks,
)
from support.plan_inputs import cpu_machine, machine_of, model_of
from support.small_models import config_with

GB = 10**9


def machine(gpu: str, ranks: int, *, each: int = 8, usable: float | None = None) -> Machine:
    """Machines of up to `each` GPUs; `usable`: of a GPU, in GB, where it is another than the table's."""
    where = machine_of(gpu, ranks=ranks, per_machine=each, host_bytes=2000 * GB)
    return where if usable is None else dataclasses.replace(where, usable_bytes=int(usable * GB))


def without_rates(where: Machine) -> Machine:
    return dataclasses.replace(where, gpu=None, flops=None, bandwidth=None, link=None, host_link=None, network=None)


def cpu(ranks: int, host: float) -> Machine:
    """Return a machine without GPUs, with `host` GB of available memory."""
    return dataclasses.replace(cpu_machine(ranks), host_bytes=int(host * GB), usable_bytes=int(host * GB) // ranks)


def config_of(ranks: int, *, each: int = 8, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "/model"},
        "data": {"path": "/data.jsonl", "sequence_length": 4096},
        "adapter": {"target_modules": "all-linear"},
        "train": {"global_batch": 2 * ranks},
        "cluster": {"gpus_per_node": min(ranks, each), "nodes": -(-ranks // each)},
    }
    base["cluster"] |= {"launcher": "slurm"} if ranks > each else {}
    return config_with(base, sections)


def search(config: Config, model: PlannedModel, where: Machine, fixed: Collection[str] = ()) -> Search:
    return Search(config=config, model=model, machine=where, fixed=fixed)


def every(said: Config, fixed: set[str], model: PlannedModel, where: Machine) -> Iterator[Plan]:
    """Every plan there is, with no thought of which could be good."""
    rows = -(-said.train.global_batch // where.ranks)
    values: dict[str, list[Any]] = {
        "parallel.backend": ["fsdp2", "zero3"],
        "parallel.offload_base": [False, True],
        "parallel.shard_degree": [None, "node", 1],
        "parallel.prefetch": [True, False],
        "train.accumulate": ["step", "block"],
        "train.micro_batch": [n for n in range(1, rows + 1) if rows % n == 0],
        "train.checkpointing": ["none", "selective", "block", "offload"],
        "train.mlp_tile": [None, *([4096] if said.data.sequence_length >= 16_384 else [])],
        "quant.dense_layers": list(range(model.shapes.num_layers + 1)),
        "parallel.resident_blocks": list(range(model.shapes.num_layers + 1)),
    }
    values |= {name: [said.value_of(name)] for name in values if name in fixed}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        if 0 not in (chosen["quant.dense_layers"], chosen["parallel.resident_blocks"]):
            continue  # Dense layers are resident.
        try:
            config = said.with_settings(chosen)
            check_settings(config)
        except UserError:
            continue
        yield plan_of(config, model, where)


CUTS = {"parallel.shard_degree", "parallel.backend"}


@pytest.mark.parametrize(
    ("where", "fixed", "sections"),
    [
        (machine("rtx4090", 1, usable=6.0), set(), {}),
        (machine("rtx4090", 4, each=4, usable=3.8), set(), {}),
        (machine("rtx4090", 4, each=2, usable=5.5), CUTS, {}),
        (
            machine("rtx4090", 4, each=2, usable=4.0),
            {"train.micro_batch", "parallel.prefetch"},
            {"parallel": {"prefetch": False}},
        ),
        (
            machine("rtx4090", 2, usable=7.0),
            {"train.checkpointing", "train.accumulate"},
            {"data": {"sequence_length": 16_384}},
        ),
        (machine("rtx4090", 2, usable=8.0), {*CUTS, "train.micro_batch"}, {"quant": {"method": "none"}}),
        (
            machine("h100", 4, usable=16.0),
            {*CUTS, "train.accumulate"},
            {
                "adapter": {"method": "full"},
                "quant": {"method": "none"},
                "data": {"sequence_length": 1024},
                "train": {"global_batch": 32, "accumulate": "step"},
            },
        ),
        (dataclasses.replace(machine("rtx4090", 2, usable=5.1), host_bytes=4 * GB), {"parallel.shard_degree"}, {}),
        (without_rates(machine("rtx4090", 4, each=4, usable=6.5)), {"parallel.backend"}, {}),
        (cpu(2, 14.2), {*CUTS}, {"train": {"global_batch": 8}}),
    ],
    ids=[
        "one GPU",
        "four GPUs",
        "resident blocks",
        "two machines",
        "long rows",
        "16 bits",
        "everything is trained",
        "the host lacks",
        "no rates",
        "a CPU",
    ],
)
def test_the_choice_is_the_fastest_of_all_that_fit(where: Machine, fixed: set[str], sections: dict[str, Any]) -> None:
    said, model = config_of(where.ranks, each=where.ranks_per_machine, **sections), model_of("8b", num_hidden_layers=3)
    given = search(said, model, where, fixed)
    found = choose(given)
    fitting = [plan for plan in every(said, fixed, model, where) if has_room(plan, RESERVE)]
    best = min(cost_of(plan) for plan in fitting)
    good = [plan for plan in fitting if is_as_good(cost_of(plan), best)]
    assert has_room(found.plan, RESERVE)
    assert is_as_good(cost_of(found.plan), best)
    assert len(given.changed(found.plan)) == min(len(given.changed(plan)) for plan in good)
    assert 0 < len(found.changes) <= len(given.changed(found.plan))
    assert found.plan == plan_of(found.config, model, where)
    assert all(found.config.value_of(name) == said.value_of(name) for name in fixed)
    rest = found.config.with_settings({name: said.value_of(name) for name in CHOSEN})
    assert rest == said, "what may not be chosen has changed"


@pytest.mark.parametrize(
    ("usable", "sections", "method", "why"),
    [
        (80, {}, "none", r"the base fits in 16 bits, [\d.]+ GB of [\d.]+ GB"),
        (14, {}, "nf4", r"in 16 bits it would take [\d.]+ GB, in NF4 [\d.]+ GB of [\d.]+ GB"),
        (80, {"adapter": {"init": "loftq"}}, "nf4", "the adapter starts from the quantization error of NF4"),
        (80, {"adapter": {"method": "full"}}, "none", "adapter=full trains every parameter"),
        (80, {"quant": {"method": "auto", "dense_layers": 1}}, "nf4", "dense_layers=1 needs quantized"),
    ],
    ids=["it fits", "it does not fit", "loftq", "full", "kept"],
)
def test_quant_auto_is_16_bits_where_they_fit(usable: float, sections: dict[str, Any], method: str, why: str) -> None:
    said, model = config_of(1, **{"quant": {"method": "auto"}, **sections}), model_of("8b")
    found = resolve_auto(search(said, model, machine("h100", 1, usable=usable)))
    assert found.config == said.with_settings({"quant.method": method})
    assert [change.typed for change in found.changes] == [f"quant={method}"]
    assert re.search(why, found.changes[0].why)


@pytest.mark.parametrize(
    "where", [machine("h100", 1, usable=16), machine("h100", 2, usable=16), cpu(1, 20)], ids=["one GPU", "two", "a CPU"]
)
def test_dense_layers_auto_is_as_many_as_fit(where: Machine) -> None:
    said, model = config_of(where.ranks, quant={"dense_layers": "auto"}), model_of("8b")
    found = resolve_auto(search(said, model, where))
    count = found.config.quant.dense_layers
    assert 0 < count < 32
    assert has_room(found.plan, RESERVE)
    assert not has_room(plan_of(said.with_settings({"quant.dense_layers": count + 1}), model, where), RESERVE)
    assert [change.typed for change in found.changes] == [f"quant.dense_layers={count}"]
    unknown = resolve_auto(search(said, model, dataclasses.replace(where, usable_bytes=None)))
    assert unknown.config.quant.dense_layers == 0


def test_quant_auto_keeps_what_is_in_nf4_already_and_asks_for_no_gpu_that_it_does_not_know() -> None:
    said, model = config_of(1, quant={"method": "auto"}), model_of("8b")
    packed = dataclasses.replace(
        model,
        settings={**model.settings, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    )
    assert str(choose(search(said, packed, machine("h100", 1), CHOSEN)).changes[0]) == "quant=nf4: 8b is in NF4 already"
    unknown = dataclasses.replace(machine("h100", 1), usable_bytes=None)
    found = choose(search(said, model, unknown))
    assert found.config == said.with_settings({"quant.method": "nf4"})
    assert str(found.changes[0]) == "quant=nf4: the GPU's memory is unknown"


def test_auto_is_read_by_nobody_before_it_is_decided() -> None:
    with pytest.raises(UserError, match=r"quant\.method=auto stands for nf4, keep or none"):
        plan_of(config_of(1, quant={"method": "auto"}), model_of("8b"), machine("h100", 1))


NEAREST = [
    (
        *("8b", machine("h100", 1, usable=24), {"train": {"micro_batch": 16, "global_batch": 64}}),
        r"set train\.(micro_batch=\d+|checkpointing=offload) \([\d.]+ GB\)$",
    ),
    ("8b", machine("h100", 1, usable=14), {"quant": {"method": "none"}}, r"set quant=nf4 \([\d.]+ GB\)$"),
    (
        *("8b", machine("rtx4090", 1), {"data": {"sequence_length": 131_072}}),
        r"set data\.sequence_length=65536 train\.checkpointing=offload \([\d.]+ GB\)$",
    ),
    ("8b", cpu(4, 18.0), {}, r"set cluster\.gpus_per_node=[123] \([\d.]+ GB\)$"),
    ("405b", cpu(4, 18.0), {}, r"name the GPU, such as gpu=h100 "),
    (
        *("70b", machine("rtx4090", 1), {}),
        r"use 2 of these GPUs with cluster\.gpus_per_node=2 parallel\.backend=zero3 parallel\.offload_base=true "
        r"\([\d.]+ GB\), or use one A40 48 GB with gpu=a40 train\.checkpointing=offload \([\d.]+ GB\)$",
    ),
    (
        *("405b", dataclasses.replace(machine("rtx4090", 2), host_bytes=30 * GB), {}),
        r"use 2 x H200 NVL 141 GB with gpu=h200_nvl parallel\.backend=zero3 parallel\.prefetch=false \([\d.]+ GB\)$",
    ),
]


@pytest.mark.parametrize(("name", "where", "sections", "expected"), NEAREST, ids=lambda value: str(value)[:20])
def test_the_nearest_that_fits_is_the_smallest_change(
    name: str, where: Machine, sections: dict[str, Any], expected: str
) -> None:
    said, model = config_of(where.ranks, **sections), model_of(name)
    plan = plan_of(said, model, where)
    assert not has_room(plan)
    found = nearest(plan)
    assert re.match(expected, str(found)), str(found)
    for one in filter(None, (found.same, found.other, found.more, found.gpu)):
        assert has_room(one.plan)
        assert one.plan == plan_of(said.with_settings(one.settings), model, one.plan.machine)
        for left_out in one.settings if len(one.settings) > 1 else ():
            fewer = {name: value for name, value in one.settings.items() if name != left_out}
            with contextlib.suppress(UserError):
                config, there = said.with_settings(fewer), one.plan.machine
                if left_out.startswith(("cluster.", "gpu.")):
                    there = with_ranks(where, config.cluster)
                assert not has_room(plan_of(config, model, there)), f"{left_out} is not needed"
    alone = [config for move in memory_saving_changes(plan) if (config := said.if_valid(move)) is not None]
    fitting = [each for config in alone if has_room(each := plan_of(config, model, with_ranks(where, config.cluster)))]
    if fitting:
        assert cost_of(found.same.plan) == min(map(cost_of, fitting)), "the fastest of as many settings"
    if found.same is found.other is None:
        assert not has_room(found.least)
        assert re.match(r"[\d.]+ [GT]B (per GPU|of host memory per node|per node) \(", needs(found.least))


def test_a_cpu_machine_is_too_small_for_what_all_its_processes_take_and_no_sooner() -> None:
    where = cpu(2, 1000)
    plan = plan_of(config_of(2), model_of("8b", num_hidden_layers=3), where)
    needed = plan.host.machine - plan.host.launcher
    assert needed > 2 * plan.device.total
    assert dataclasses.replace(plan, machine=dataclasses.replace(where, host_bytes=needed)).fits is True
    short = dataclasses.replace(plan, machine=dataclasses.replace(where, host_bytes=needed - 1))
    assert (short.fits, short.lacks()) == (False, "host")
    assert (
        dataclasses.replace(plan, machine=dataclasses.replace(where, host_bytes=None, usable_bytes=None)).fits is None
    )
