"""The operations that are planned are those that a model of every family counts itself, and what is beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora import derive
from distlora.derive.shrink import shrink
from distlora.planner import plan_of
from distlora.planner.flops import StepFlops, active_weights, cut, pairs, step_flops
from distlora.planner.model import model_in
from distlora.planner.storage import trained_tensors
from distlora.planner.workload import Workload
from distlora.training.trial import active_weights as of_model
from support.family_models import VARIANTS, edit_config, hf_config
from support.model_types import config_of
from support.plan_inputs import cpu_machine
from support.plan_runs import GLOBAL_BATCH, LENGTH, LORA, run_of
from support.run_models import build_run_model
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
        built = of_model(build_run_model(config))
        assert active_weights(Workload.of(config), model_in(tmp_path)) == built
        reference = [
            active_weights(Workload.of(config), model_in(tmp_path)).model_flops(with_reference=each)
            for each in (True, False)
        ]
        assert reference == [
            of_model(build_run_model(config)).model_flops(with_reference=each) for each in (True, False)
        ]


HYBRIDS = ("qwen3_next", "gemma4_text", ci("nemotron_h"), ci("lfm2"), ci("glm4_moe"), ci("llama4_text"))


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_of_several_kinds_have_what_is_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare weights in use, frozen bytes and trained elements of a built model with the plan."""
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(derive, "_proved", derive.probe)  # What is counted does not depend on the proof.
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


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("mistral-window", {"sliding_window": None}),
        ("gemma2", {"layer_types": None, "sliding_window": None}),
        ("gemma3-text", {"layer_types": None}),
        ("gpt-oss", {"layer_types": None, "num_experts_per_tok": None}),
        ("qwen2-tied-window", {"layer_types": None}),
        ("qwen2", {"use_sliding_window": None, "sliding_window": None, "layer_types": None}),
        ("mixtral", {"num_experts_per_tok": None}),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(
    name: str, removed: dict[str, None], tmp_path: Path
) -> None:
    hf_config(name).save_pretrained(tmp_path)
    edit_config(tmp_path, **removed)
    config = run_of(tmp_path, **LORA)
    assert active_weights(Workload.of(config), model_in(tmp_path)) == of_model(build_run_model(config))


def test_a_window_of_null_is_none(tmp_path: Path) -> None:
    hf_config("mistral-window").save_pretrained(tmp_path)
    assert [kind.window for kind in model_in(tmp_path).shapes.architecture.kinds] == [16]
    settings = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert [kind.window for kind in model_in(tmp_path).shapes.architecture.kinds] == [None]


def steps(folder: Path, *, document: int | None = None, is_gpu: bool = True, **train: Any) -> StepFlops:
    settings = {"global_batch": GLOBAL_BATCH, "micro_batch": 2, "dtype": "bf16", **train}
    return step_flops(
        Workload.of(run_of(folder, **LORA, train=settings)), model_in(folder), ranks=1, is_gpu=is_gpu, document=document
    )


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3-text", "qwen3-moe"])
def test_what_mfu_counts_of_a_step_is_what_the_trainer_adds_up(name: str, tmp_path: Path) -> None:
    hf_config(name).save_pretrained(tmp_path)
    model = build_run_model(run_of(tmp_path, **LORA))
    for document in (None, 7):
        positions = torch.cat([torch.arange(part) for part in cut(LENGTH, document)]).expand(GLOBAL_BATCH, -1)
        step = steps(tmp_path, document=document)
        assert step.counted == of_model(model).model_flops().of(positions)
        dpo = steps(tmp_path, document=document, objective="dpo")
        assert dpo.counted == of_model(model).model_flops(with_reference=True).of(positions)
        assert step.tokens == positions.numel()
        kto = steps(tmp_path, document=document, objective="kto")
        mismatched = of_model(model).mismatched_flops().of(positions)
        assert kto.counted == dpo.counted + mismatched
        assert kto.by_kind["mismatched"] == mismatched
    on_cpu = steps(tmp_path, is_gpu=False)
    assert on_cpu.counted == steps(tmp_path).counted
    assert on_cpu.by_kind["masked"] > 0, "a dense mask hides pairs that are computed"


def test_a_tile_of_the_mlp_computes_nothing_twice(tmp_path: Path) -> None:
    hf_config("llama").save_pretrained(tmp_path)
    for mode in ("selective", "block"):
        assert steps(tmp_path, checkpointing=mode, mlp_tile=16) == steps(tmp_path, checkpointing=mode)


def test_pairs_of_a_document_and_a_window() -> None:
    for length in range(1, 9):
        for window in (None, 1, 3, 8, 20):
            seen = sum(min(at + 1, window or length) for at in range(length))
            assert pairs(length, window) == seen
