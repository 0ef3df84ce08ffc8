"""Compare the memory calculated from config.json and settings with that of ranks.

What stays is exact to the byte, the peak of a step within 5 %, on 1 to 4 ranks of either backend, also of trials that
train together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distlora.config import Config
from distlora.config.plan import GPUS
from distlora.parallel import Ranks
from distlora.planner import plan_of
from distlora.planner.machine import LocalHardware, machine_of
from distlora.planner.memory.device import DeviceBytes, device_bytes
from distlora.planner.model import find_model, model_in
from distlora.planner.workload import Workload, trained_together
from distlora.training.memory_meter import MemoryMeter, StepMemory
from distlora_launcher.compose.compose import compose_config
from support import memory_steps
from support.family_models import write_family_folder
from support.memory_steps import measure_step
from support.plan_inputs import cpu_machine
from support.planned import Settings, both, check, measured_config
from support.small_models import write_model_folder
from support.tiers import ci
from support.worlds import World, start_world

NONE = {"method": "none"}
EMBEDS: Settings = {"adapter": {"modules_to_save": ["embed_tokens"]}}
LAST_BLOCK: Settings = {"adapter": {"target_modules": r".*layers\.2\..*_proj"}, "train": {"checkpointing": "none"}}
FEW_TOKENS: Settings = {"data": {"sequence_length": 12}}
"""Beside which dequantized weights are much, in forward as in backward."""
FULL: Settings = {"quant": NONE, "adapter": {"method": "full"}}
WHOLE: Settings = {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}}
ROWS_OF_TOKENS: Settings = {"adapter": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}}}
EIGHT_BIT_DORA: Settings = {
    "adapter": {"use_dora": True, "r": 64, "rank_pattern": {"down_proj": 3}},
    "optim": {"name": "adamw_8bit"},
    "parallel": {"resident_blocks": 2},
}
Cell = tuple[str, int, int, Settings]
CELLS: list[Cell] = [
    # (model, ranks, micro-batches, settings). 1,001 rows and odd shapes are cut unevenly by every number of ranks.
    ("llama", 1, 1, {}),
    ("llama", 1, 1, LAST_BLOCK),
    ("llama", 1, 1, FEW_TOKENS),
    ("llama", 2, 1, EIGHT_BIT_DORA),
    ("llama", 1, 1, {"optim": {"name": "muon"}, "adapter": {"use_dora": True}, "train": {"neftune_alpha": 5.0}}),
]
IN_CI: list[Cell] = [
    ("llama", 2, 1, {"train": {"checkpointing": "none"}}),
    ("llama", 3, 3, {"quant": NONE, "train": {"dtype": "fp32", "accumulate": "block"}}),
    ("llama-tied", 4, 2, {"parallel": {"shard_degree": 2}, "train": {"checkpointing": "selective"}}),
    ("llama-tied", 2, 1, WHOLE),
    ("llama", 3, 1, ROWS_OF_TOKENS),
    ("qwen3", 2, 2, FULL),
    ("qwen3", 1, 1, FULL | {"optim": {"name": "muon"}}),
]
MORE: list[Cell] = [
    *(
        ("llama", size, parts, {"quant": quant, "train": {"checkpointing": kept, "accumulate": accumulate}})
        for size, parts in ((1, 1), (2, 3), (4, 2))
        for quant in ({}, NONE)
        for kept in ("block", "selective", "none", "offload")
        for accumulate in ("step", "block")
    ),
    *(("llama-tied", size, parts, FULL) for size in (1, 2, 4) for parts in (1, 2)),
    ("llama", 1, 1, FULL | {"train": {"checkpointing": "none"}}),
    ("llama", 4, 1, FULL | {"parallel": {"shard_degree": 2}}),
    ("llama", 2, 1, FULL | {"train": {"dtype": "fp32"}}),
    *(("llama", size, 1, {"adapter": {"use_dora": True}, "quant": quant}) for size in (1, 4) for quant in ({}, NONE)),
    ("llama", 4, 1, {"parallel": {"shard_degree": 1}, "quant": NONE}),
    ("llama", 2, 1, {"parallel": {"prefetch": False}, "quant": NONE}),
    ("llama", 2, 1, {"parallel": {"resident_blocks": 3}, "quant": NONE}),
    ("llama", 1, 1, {"quant": {"dense_layers": 2}}),
    ("llama", 2, 1, {"quant": {"dense_layers": 3}}),
    ("llama", 2, 1, {"train": {"mlp_tile": 64}, "quant": NONE}),
    ("llama", 2, 2, {"optim": {"name": "paged_adamw_8bit"}, "adapter": {"r": 64}}),
    ("llama", 2, 1, {"train": {"objective": "dpo"}, "data": {"format": "preference"}}),
    ("llama", 2, 1, {"train": {"objective": "kto"}, "data": {"format": "prompt_completion"}}),
    ("llama", 2, 1, {"train": {"objective": "orpo"}, "data": {"format": "preference"}}),
    ("llama", 2, 1, {"train": {"objective": "distill", "beta": 0.5}}),
    ("mixtral", 2, 1, {}),
    ("mixtral", 3, 1, {"quant": NONE}),
]
FAMILIES = (
    "gemma2",
    "gemma3-text",
    "gemma3",
    "mistral-window",
    "phi3",
    "llama-biases",
    "qwen2",
    "qwen3-moe",
    "gpt-oss",
)
ZERO3: list[Cell] = [
    ("llama", 2, 1, {}),
    ("llama-tied", 2, 1, {"quant": NONE}),
    ("llama", 2, 2, {"quant": NONE, "train": {"accumulate": "block"}}),
    ("llama", 2, 1, {"quant": NONE, "parallel": {"prefetch": False}, "train": {"checkpointing": "none"}}),
    ("qwen3", 2, 2, {"train": {"dtype": "fp32"}}),
    ("llama", 2, 1, {"parallel": {"offload_base": True}}),
    ("mixtral", 2, 1, {}),
    ("mixtral", 2, 2, {"parallel": {"experts": "on_demand"}}),
]


@pytest.mark.parametrize(
    ("model", "size", "accumulation", "settings"),
    [*CELLS, *(ci(*cell) for cell in IN_CI), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE)],
    ids=str,
)
def test_a_rank_has_the_planned_memory(
    world: World, folders: Path, model: str, size: int, accumulation: int, settings: Settings
) -> None:
    check(*both(world, folders / model, size, settings, accumulation))


@pytest.mark.parametrize(
    ("model", "settings"),
    [("llama", EMBEDS), ("llama-tied", FULL), pytest.param("llama", WHOLE, marks=pytest.mark.slow)],
    ids=str,
)
def test_one_process_has_trained_matrices_that_outweigh_its_tokens(
    world: World, tmp_path: Path, model: str, settings: Settings
) -> None:
    write_model_folder(tmp_path, model, vocab_size=12_000)
    check(*both(world, tmp_path, 1, {**settings, "data": {"sequence_length": 16}}, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_of_every_family_has_the_planned_memory(world: World, tmp_path: Path, name: str) -> None:
    write_family_folder(tmp_path, name)
    for size, settings in ((1, {}), (3, {"quant": NONE})):
        # Inside of the scatter_ of a maximum's gradient the CPU widens GPT-OSS' scores, which no operation shows.
        check(*both(world, tmp_path, size, settings, 1), short="block" if name == "gpt-oss" else None)


@pytest.mark.slow
def test_zero3_has_what_its_coordinators_rules_say(folders: Path, tmp_path: Path) -> None:
    with start_world(2, regroups=True) as alone:
        for model, size, accumulation, settings in ZERO3:
            given = {**settings, "parallel": {"backend": "zero3", **settings.get("parallel", {})}}
            check(*both(alone, folders / model, size, given, accumulation))
        # What is small stays from the second step on, which is the one that is measured.
        file = deepspeed_file(tmp_path, param_persistence_threshold=20_000)
        plan, found = both(
            alone, folders / "llama", 2, {"parallel": {"backend": "zero3", "deepspeed_config": str(file)}}, 1
        )
        assert found.at_peak["resident"] == plan.held["resident"] > 0
        assert plan.peak == pytest.approx(found.peak, rel=0.01)


def of_gpus(*words: str) -> DeviceBytes:
    """Plan Llama 3.1 70B on GPUs."""
    config = compose_config(["data.path=/none.jsonl", "model=llama3_70b", "adapter.target_modules=all-linear", *words])
    return device_bytes(Workload.of(config), find_model(config), machine_of(config.gpu, config.cluster))


ZERO = ("parallel=zero3", "parallel.offload_base=true")


def deepspeed_file(folder: Path, **zero: object) -> Path:
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    return file


def test_deepspeeds_own_file_says_what_lies_on_the_host_and_what_stays_gathered(tmp_path: Path) -> None:
    cpu = deepspeed_file(tmp_path, offload_param={"device": "cpu"})
    eight = ["data.path=/none.jsonl", "model=llama3_70b", "cluster.gpus_per_node=8", "gpu=h100", "parallel=zero3"]
    by_setting, by_file = (
        plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))
        for config in (compose_config([*eight, word]) for word in (ZERO[1], f"parallel.deepspeed_config={cpu}"))
    )
    assert by_file.device == by_setting.device
    assert by_file.host == by_setting.host
    assert by_file.host.base > 4.5e9
    assert by_file.time == by_setting.time


def test_a_base_in_host_memory_is_there_once_where_the_cpu_is_the_device() -> None:
    two = ["data.path=/none.jsonl", "model=llama3_8b", "cluster.gpus_per_node=2", "parallel=zero3"]
    configs = [compose_config(words) for words in (two, [*two, ZERO[1]])]
    found = LocalHardware(host_bytes=64 * 10**9)
    here, there = (
        plan_of(config, find_model(config), machine_of(config.gpu, config.cluster, found=found)).host
        for config in configs
    )
    assert here == there


def test_blocks_that_stay_by_themselves_are_as_many_as_the_first_step_leaves_room_for() -> None:
    eight = ("cluster.gpus_per_node=8", "gpu=h100", "train.checkpointing=block", "data.sequence_length=16384")
    none, some = of_gpus(*eight), of_gpus(*eight, "parallel.resident_blocks=auto")
    usable = GPUS["h100"].usable_bytes
    block = some.held["resident"] / round(some.held["resident"] / 0.441e9)
    assert usable - none.total - 0.1 * usable - block < some.held["resident"] <= usable - none.total - 0.1 * usable
    fixed = of_gpus(*eight, f"parallel.resident_blocks={round(some.held['resident'] / block)}")
    assert fixed == some


class Counted(MemoryMeter):
    """With what torch.cuda counts of the step that it measures."""

    counters: ClassVar[list[int]] = []
    """Bytes beside tensors before the step, and the most that were allocated in it."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        beside = torch.cuda.memory_allocated() - sum(self.held().values())
        with super().step():
            yield
        self.counters[:] = [beside, torch.cuda.max_memory_allocated()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a plan beside torch.cuda's counters")
@pytest.mark.parametrize("checkpointing", ["block", "selective", "none"])
def test_on_a_gpu_a_step_has_what_is_calculated_by_torchs_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "num_attention_heads": 16}
    write_model_folder(tmp_path, "llama", **sizes, num_key_value_heads=4, num_hidden_layers=6, vocab_size=32_000)
    config = measured_config(
        tmp_path, 1, {"data": {"sequence_length": 2048}, "train": {"checkpointing": checkpointing}}
    )
    monkeypatch.setattr(memory_steps, "MemoryMeter", Counted)
    found = measure_step([config], Ranks(0, 1, torch.device("cuda", 0), None))
    beside, most = Counted.counters
    assert most == pytest.approx(found.peak + beside, rel=0.01)
    plan = device_bytes(Workload.of(config), model_in(tmp_path), replace(cpu_machine(1), is_gpu=True))
    assert plan.peak == pytest.approx(most - beside, rel=0.05), (plan.by_kind, found.by_kind)


DIFFERENT: list[Settings] = [
    {"adapter": {"r": 4}},
    {"adapter": {"r": 24, "target_modules": "mlp", "lora_dropout": 0.1}, "optim": {"lr": 1e-3}},
    {"adapter": {"r": 9, "target_modules": r".*layers\.[12]\..*_proj"}},
]
PACKS: list[Any] = [
    # (ranks, micro-batches, trials)
    (1, 1, [{}] * 2),
    ci(2, 2, [{"quant": NONE, "train": {"accumulate": "block"}}] * 4),
    ci(3, 1, DIFFERENT),
    (1, 1, [{"train": {"checkpointing": "none"}, "adapter": {"r": 64}}] * 2),
]
MORE_PACKS: list[tuple[int, int, list[Settings]]] = [
    (1, 1, [{}]),
    (1, 1, [{}] * 4),
    (4, 1, [{"parallel": {"shard_degree": 2}}] * 4),
    (2, 1, [{"adapter": {"use_dora": True}}] * 2),
    (2, 1, [{"optim": {"name": "adamw_8bit"}, "adapter": {"r": 64}}] * 3),
    (2, 3, [{"train": {"checkpointing": "selective"}}] * 2),
    (2, 1, [{"train": {"checkpointing": "offload"}}] * 2),
    (2, 1, [{"parallel": {"resident_blocks": 2}}] * 2),
]


def measured_together(ranks: Ranks, *, trials: Sequence[Config]) -> StepMemory:
    return measure_step(trials, ranks, in_slots=True)


@pytest.mark.parametrize(
    ("size", "accumulation", "settings"),
    [*PACKS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE_PACKS)],
)
def test_trials_together_have_the_planned_memory(
    world: World, folders: Path, size: int, accumulation: int, settings: list[Settings]
) -> None:
    folder = folders / "llama"
    trials = [measured_config(folder, size, own, accumulation) for own in settings]
    most, *_ = world.run(size, measured_together, trials=trials)
    together = trained_together([Workload.of(trial) for trial in trials])
    check(device_bytes(together, model_in(folder), cpu_machine(size)), most)
