"""Compare a step's calculated traffic with what torch's collectives carry, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import ModelShapes, shapes_of
from distlora.config import Config
from distlora.model.adapters import adapter_parameters
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Ranks
from distlora.parallel.ranks import Traffic
from distlora.planner import traffic as wire
from distlora.planner.workload import Workload, padded
from distlora.training.setup import start_run_model
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.formats.nf4 import NF4
from support.counted_step import Counts, measure_ours, only_collectives, our_traffic
from support.family_models import VARIANTS, config_for, hf_config
from support.planned import held_bytes
from support.runs import build_run_model
from support.small_models import config_with
from support.tiers import ci
from support.worlds import World

LENGTH, MICRO_BATCH = 16, 2


def shapes_in(folder: Path) -> ModelShapes:
    return shapes_of(read_config(folder), folder / "config.json")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_has_the_shapes_that_its_config_says(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    config = config_for(tmp_path, quant={"method": "none"}, adapter={"r": 4, "target_modules": "attention"})
    model, shapes = build_run_model(config), shapes_in(tmp_path)
    actual = {path: tuple(p.shape) for path, p in model.blocks[0].inner.named_parameters() if ".adapters." not in path}
    # A fused weight of experts is a module here, and GPT-OSS' are stored the other way round.
    stated = {w.path if w.path in actual else f"{w.path}.weight": w.shape for w in shapes.block}
    assert {path: sorted(shape) for path, shape in stated.items()} == {p: sorted(s) for p, s in actual.items()}
    adapters = adapter_parameters(model)
    assert shapes.tied == model.tied
    assert shapes.numel == sum(p.numel() for path, p in model.named_parameters() if path not in adapters)
    assert sum(a.numel for block in shapes.adapters(config.adapter) for a in block) == sum(
        p.numel() for p in adapters.values()
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_large_weight_of_the_layers_is_in_nf4_and_no_other(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    model, architecture = build_run_model(config_for(tmp_path)), shapes_in(tmp_path).architecture
    large = {
        f"{architecture.layer_prefix}{index}.{weight.path}"
        for index in range(architecture.num_layers)
        for weight in architecture.layer(index).weights
        if weight.packs
    }
    held = {
        model.hf_name(f"{path}.weight"): module.format
        for path, module in model.named_modules()
        if isinstance(module, FrozenTensor)
    }
    assert held == dict.fromkeys(large, NF4)


@pytest.mark.parametrize("kind", ["Gemma3Text", "Llama", *map(ci, ("Qwen3", "Gemma2", "Mistral"))])
def test_what_a_config_leaves_out_is_what_transformers_takes(kind: str) -> None:
    default = getattr(transformers, f"{kind}Config")()
    sparse = {name: getattr(default, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sparse |= {"model_type": default.model_type, "vocab_size": default.vocab_size}
    sparse["num_attention_heads"] = default.num_attention_heads
    full = shapes_of({**sparse, **default.to_dict()}, "config.json")
    if kind.startswith("Gemma"):  # What the hub's leave out.
        del sparse["vocab_size"], sparse["num_attention_heads"]
    elif default.num_key_value_heads != default.num_attention_heads:
        sparse["num_key_value_heads"] = default.num_key_value_heads
    assert shapes_of(sparse, "config.json").block == full.block


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {"path": "none.jsonl", "sequence_length": LENGTH},
        "adapter": {"target_modules": "all-linear", "r": 8},
        "train": {"micro_batch": MICRO_BATCH},
    }
    return config_with(base, sections)


NONE = {"quant": {"method": "none"}}
CELLS: list[Any] = [
    # (model, ranks, micro-batches, settings)
    ("llama", 2, 3, {}),
    ("llama", 2, 1, {"adapter": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}}}),
    ("llama-tied", 3, 1, {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}}),
    ("llama-tied", 2, 2, {**NONE, "adapter": {"method": "full"}}),
    ci("llama", 3, 3, {"train": {"accumulate": "block"}, "parallel": {"prefetch": False}}),
    ci("llama-tied", 2, 2, {"train": {"checkpointing": "none"}, "parallel": {"bucket_mb": 0.01}}),
    ci("llama-tied", 3, 2, {"adapter": {"use_dora": True, "rank_pattern": {"down_proj": 3}}}),
    ci("llama-tied", 3, 1, {"model": {"new_tokens": ["<think>", "</think>"]}, "train": {"dtype": "fp32"}}),
    ci("mixtral", 3, 2, {"train": {"accumulate": "block"}}),
    ci("qwen3", 3, 2, {**NONE, "adapter": {"target_modules": "qv"}}),
]


@pytest.mark.parametrize(("model", "size", "accumulation", "settings"), CELLS, ids=str)
def test_a_step_carries_what_is_calculated_and_the_backend_counts_it(
    world: World, folders: Path, model: str, size: int, accumulation: int, settings: dict[str, Any]
) -> None:
    config = config_of(folders / model, **settings)
    shapes = shapes_of(
        read_config(folders / model), folders / model, vocabulary=build_run_model(config).vocabulary.rows
    )
    step = wire.step_traffic(Workload.of(config), shapes, world=size, accumulation=accumulation)
    for counts, traffic in world.run(size, our_traffic, config=config, accumulation=accumulation):
        assert (counts.gathered, counts.scattered, counts.reduced) == (step.gathered, step.scattered, step.reduced)
        assert traffic == Traffic(counts.gathered, counts.reduced, counts.scattered)
        if accumulation == 3 and config.train.accumulate == "step":
            # Three micro-batches; in each 3 blocks forward and backward, and the embedding, the head and the norm.
            assert counts.calls == 3 * (3 + 3 + 3) + 1, "and one all-reduce a bucket of adapter gradients"
    assert step.gathered > 0
    assert (step.scattered == 0) == (config.adapter.method == "lora" and not config.adapter.modules_to_save)


def traffic_in_a_node(ranks: Ranks, *, config: Config, cannot: tuple[int, ...]) -> tuple[Counts, Traffic]:
    """As `our_traffic` for ranks that read each other's memory, but for those that cannot."""
    with only_collectives(here=ranks.rank in cannot):
        return measure_ours(config, ranks, accumulation=1)


@pytest.mark.parametrize(
    ("cannot", "adapter"),
    [((), {}), ((1,), {}), ((), {"modules_to_save": ["lm_head"]})],
    ids=["all", "one cannot", "a trained head"],
)
def test_ranks_of_a_node_read_frozen_units_in_each_others_memory(
    world: World, folders: Path, cannot: tuple[int, ...], adapter: dict[str, Any]
) -> None:
    """If one rank cannot, all gather by collectives; trained units are always gathered so."""
    config = config_of(folders / "llama", adapter=adapter)
    results = world.run(2, traffic_in_a_node, config=config, cannot=cannot)
    shapes = shapes_in(folders / "llama")
    # In bf16, in forward and backward.
    trained = 2 * 2 * padded((shapes.vocabulary, shapes.hidden), 2) if adapter else 0
    for counts, traffic in results:
        assert counts.gathered == (traffic.gathered_bytes if cannot else trained)
        assert traffic.gathered_bytes > trained


def base_bytes(ranks: Ranks, *, config: Config) -> int:
    """Return the bytes of the frozen base on this rank after a start, offsets left out."""
    model, backend, _ = start_run_model(config, ranks)
    return sum(backend.local_rows(p)[0].nbytes for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("model", ["llama", ci("mixtral")])
def test_each_ranks_part_of_the_base_falls_as_one_over_the_ranks(world: World, folders: Path, model: str) -> None:
    """To within one row, or group, of each tensor."""
    config, shapes = config_of(folders / model), shapes_in(folders / model)
    packed = sum(weight.packs for weight in shapes.block)
    rows = shapes.num_layers * (
        packed * FORMAT_LAYOUTS["nf4"].group_bytes + 2 * (len(shapes.block) - packed) * shapes.hidden
    )
    slack = rows + 2 * (2 * shapes.hidden + 1)
    held = {size: world.run(size, base_bytes, config=config) for size in (1, 3)}
    whole = held[1][0]
    assert whole == held_bytes(shapes, 1, format="nf4", itemsize=2)
    for size, by_rank in held.items():
        assert sum(by_rank) == whole
        assert max(by_rank) == by_rank[0] == held_bytes(shapes, size, format="nf4", itemsize=2)
        assert max(by_rank) - whole / size < slack


def test_what_is_received_is_the_rings_share() -> None:
    step = wire.StepBytes(gathered=800, scattered=80, reduced=40, shards=4, world=8)
    assert step.received == 880 * 3 // 4 + 2 * 40 * 7 // 8
    assert [step.into_machine(ranks) for ranks in (8, 4, 2)] == [0, 2 * 40 // 2, 880 * 2 // 4 + 2 * 40 * 3 // 4]
    assert wire.StepBytes(gathered=0, shards=1, world=1).received == 0


@pytest.mark.parametrize(
    ("world", "shards", "ranks", "comes_in"),
    [
        (12, 12, 8, 2400 * 8 // 12 + 2 * 120 // 2),  # Into the machine of 4, what the 8 of the other have.
        # Into the second: of two copies, 2 ranks each are elsewhere.
        (24, 6, 8, 2400 * (2 + 2) // 6 + 2 * 120 * 2 // 3),
        (8, 2, 3, 2400 // 2 + 2 * 120 * 2 // 3),
        (16, 2, 8, 2 * 120 // 2),
        (16, 16, 16, 0),
        (5, 5, 8, 0),
    ],
)
def test_what_comes_into_a_machine_where_ranks_and_copies_do_not_fit_it(
    world: int, shards: int, ranks: int, comes_in: int
) -> None:
    step = wire.StepBytes(gathered=2400, reduced=120, shards=shards, world=world)
    assert step.into_machine(ranks) == comes_in
