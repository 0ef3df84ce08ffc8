"""The operations that are planned are those that a model of every family counts itself, and those that torch counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distlora.config import AdapterConfig, Config
from distlora.config.file import build
from distlora.derive.shrink import shrink
from distlora.model.build import CausalLM
from distlora.model.hf_model import materialize_buffers
from distlora.model.trial_slots import put_trial
from distlora.planner import plan_of
from distlora.planner.decoder_sizes import pairs
from distlora.planner.flops import active_weights
from distlora.planner.model import model_in
from distlora.planner.speed.timing import StepFlops, step_flops
from distlora.planner.storage import trained_tensors
from distlora.planner.workload import Workload
from distlora.training.trial import active_weights as of_model
from support.family_models import VARIANTS, hf_config
from support.model_types import config_of
from support.plan_inputs import GLOBAL_BATCH, LENGTH, LORA, cpu_machine, machine_of, run_of
from support.runs import build_run_model
from support.tiers import ci

NONE = {"quant": {"method": "none"}}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_goes_through_what_a_model_of_each_family_has(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    configs = [run_of(tmp_path, **LORA)]
    if "Moe" not in VARIANTS[name][0] and name not in ("mixtral", "gpt-oss", "gemma3", "gemma3-untied"):
        configs.append(run_of(tmp_path, adapter={"method": "full"}, **NONE))
    configs.append(run_of(tmp_path, adapter={"target_modules": "attention", "modules_to_save": ["lm_head"]}))
    for config in configs:
        assert active_weights(Workload.of(config), model_in(tmp_path)) == of_model(build_run_model(config))


HYBRIDS = ("qwen3_next", "gemma4_text", ci("nemotron_h"), ci("lfm2"), ci("glm4_moe"), ci("llama4_text"))


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_of_several_kinds_have_what_is_planned(name: str, tmp_path: Path) -> None:
    """Compare weights in use, frozen bytes and trained elements of a built model with the plan."""
    (tmp_path / "config.json").write_text(json.dumps(shrink(config_of(name))))
    config = run_of(tmp_path, adapter={"target_modules": "all-linear", "r": 4}, quant={"method": "nf4"})
    built, model = build_run_model(config), model_in(tmp_path)
    assert active_weights(Workload.of(config), model) == of_model(built)
    plan = plan_of(config, model, cpu_machine(1))
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert sum(tensor.numel for tensor in trained_tensors(plan.work, model.shapes)) == trained
    frozen = [tensor for tensor in (*built.parameters(), *built.buffers()) if not tensor.requires_grad]
    kinds = ("codes", "scales", "weights", "embeddings", "norms")
    assert sum(plan.device.held.get(kind, 0) for kind in kinds) == sum(tensor.nbytes for tensor in frozen)
    timed = replace(cpu_machine(1), flops=1e12, bandwidth=1e11)
    assert plan_of(config, model, timed).time is not None
    assert ("scaled from a small model" in (model.note or "")) == (name != "glm4_moe")


@pytest.mark.parametrize("name", ["llama3-tied", "qwen2"])
def test_rows_of_the_head_that_are_trained_count(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    for indices in ([3, 5], {"embed_tokens": [3], "lm_head": [4, 5, 6]}):
        if name == "llama3-tied" and isinstance(indices, dict):
            continue
        config = run_of(tmp_path, adapter={"r": 4, "trainable_token_indices": indices})
        built = of_model(build_run_model(config))
        assert active_weights(Workload.of(config), model_in(tmp_path)) == built
        assert (built.head_rows > 0) == (name == "llama3-tied" or isinstance(indices, dict))


def steps(folder: Path, *, is_gpu: bool = True, **train: Any) -> StepFlops:
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": 2, "dtype": "bf16", **train}
    work = Workload.of(run_of(folder, **LORA, train=settings))
    return step_flops(work, model_in(folder), machine_of(is_gpu=is_gpu))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3-text", "qwen3-moe"])
def test_what_mfu_counts_of_a_step_is_what_the_trainer_adds_up(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    model = build_run_model(run_of(tmp_path, **LORA))
    positions = torch.arange(LENGTH).expand(GLOBAL_BATCH, -1)
    step = steps(tmp_path)
    assert step.counted == of_model(model).model_flops().of(positions)
    dpo = steps(tmp_path, objective="dpo")
    assert dpo.counted == of_model(model).model_flops(with_reference=True).of(positions)
    assert step.tokens == positions.numel()
    kto = steps(tmp_path, objective="kto")
    mismatched = of_model(model).mismatched_flops().of(positions)
    assert kto.counted == dpo.counted + mismatched
    assert kto.by_kind["mismatched"] == mismatched
    on_cpu = steps(tmp_path, is_gpu=False)
    assert on_cpu.counted == steps(tmp_path).counted
    assert on_cpu.by_kind["attention"] > steps(tmp_path).by_kind["attention"], "a dense mask hides what is computed"


def test_pairs_of_a_document_and_a_window() -> None:
    for length in range(1, 9):
        for window in (None, 1, 3, 8, 20):
            seen = sum(min(at + 1, window or length) for at in range(length))
            assert pairs(length, window) == seen


TOKENS, ROWS = 48, 2


def make_model(folder: Path, *, for_slots: bool = False) -> CausalLM:
    sections = {
        "model": {"path": str(folder)},
        "data": {"path": "unused", "sequence_length": TOKENS},
        "adapter": {"target_modules": "all-linear", "r": 8},
        "quant": {"method": "none"},
        "train": {"dtype": "fp32", "checkpointing": "none"},
    }
    model = build_run_model(build(Config, {**sections, "run_dir": "unused"}), for_slots=for_slots)
    model.to_empty(device="cpu")
    materialize_buffers(model, torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie()
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_counted_operations_are_those_that_run(folders: Path, name: str) -> None:
    model = make_model(folders / name)
    # Its products are plain GEMMs, over all pairs of positions, which torch's counter knows.
    model.decoder.config._attn_implementation = "eager"
    ids = torch.randint(0, 1001, (ROWS, TOKENS))
    positions = torch.arange(TOKENS).repeat(ROWS, 1)
    with FlopCounterMode(display=False) as counter:
        model(ids, positions, ids).sum().backward()
    flops = of_model(model).model_flops()
    config = model.hf_config
    with FlopCounterMode(display=False) as angles:  # transformers multiplied matrices for them until 5.2x.
        model.decoder.rotary_emb(torch.empty(ROWS, TOKENS, 0), positions)
    # The first block's input needs no gradient: neither through q, k, v nor through their adapters.
    projected = sum(
        linear.out_features for path, linear in model.adapted_linears() if ".layers.0." in path and path[-6] in "qkv"
    )
    unneeded = 2 * config.hidden_size * (projected + 3 * 8) * ROWS * TOKENS
    pairs = sum(operations for operations, _ in flops.per_pair) * ROWS * TOKENS**2
    assert counter.get_total_flops() - angles.get_total_flops() == flops.per_token * ROWS * TOKENS - unneeded + pairs


def test_the_operations_of_a_trial_in_a_pack_are_its_own(folders: Path) -> None:
    model = make_model(folders / "llama", for_slots=True)
    for slot, rank in enumerate((8, 32)):
        config = AdapterConfig(target_modules="all-linear", r=rank)
        put_trial(model, slot, config, seed=0, device=torch.device("cpu"))
    alone = of_model(make_model(folders / "llama")).model_flops().per_token
    assert of_model(model, 0).model_flops().per_token == alone
    assert of_model(model, 1).model_flops().per_token > alone
