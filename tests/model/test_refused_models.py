"""Settings and models that cannot be trained: each is refused with the reason before workers start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distlora.config import Config, TrainConfig, UserError
from distlora.planner.model import find_model
from distlora_launcher.compose.checks import check_base, check_model
from distlora_launcher.compose.planning import check_planned
from support.family_models import FolderOf, config_for, edit_config
from support.runs import FULL, build_run_model


def adapter(**settings: Any) -> dict[str, Any]:
    return {"adapter": {"target_modules": "all-linear", "r": 4, **settings}}


def train(**settings: Any) -> dict[str, Any]:
    return {"train": {"dtype": "fp32", **settings}}


ZERO3, NONE = {"backend": "zero3"}, {"quant": {"method": "none"}}
TWO = {"cluster": {"gpus_per_node": 2}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    # Targets.
    ("mixtral", adapter(target_modules=["gate"]), r"no module is named 'gate'.* Routers are not trained"),
    ("gpt-oss", adapter(target_modules=r".*\.router"), r"matches nothing .* Routers are not trained"),
    ("mixtral", adapter(target_parameters=["experts.gate_proj"]), r"no weight of the experts is named 'experts.gate_"),
    ("mixtral", adapter(target_modules=["q_proj", "w1"]), r"experts are fused weights: set adapter.target_par"),
    ("llama", adapter(target_parameters=["experts.down_proj"]), r"names weights of experts, and llama has none"),
    ("phi3", adapter(target_modules="qv"), r"qv \(q_proj, v_proj\) names a part of .*qkv_proj.*\[qkv_proj\]"),
    ("phi3", adapter(target_modules=["k_proj"]), r"no module is named 'k_proj' \(it is a part of qkv_proj\)"),
    ("gemma3", adapter(target_modules=["q_proj", "fc1"]), r"\[fc1\] names model.vision_tower.* stay as they are"),
    ("gemma3", adapter(target_modules=r".*vision.*\.(q|v)_proj"), r"names model\.vision_tower.* stay as they are"),
    # Methods.
    ("qwen3-moe", adapter(lora_dropout=0.1), r"lora_dropout=0.1 is not supported for adapters"),
    ("qwen3-moe", adapter(use_dora=True), r"use_dora=true is not supported for adapters of experts"),
    ("mixtral", adapter(target_modules="attention", expert_sharing="shared_a"), r"no effect, because no experts get"),
    ("llama", adapter(expert_sharing="shared_b"), r"expert_sharing=shared_b has no effect, because no experts get"),
    ("llama", {"adapter": FULL["adapter"] | {"use_dora": True}, **NONE}, r"use_dora has no effect with adapter=full"),
    ("mixtral", FULL, r"adapter=full on a mixture of experts \(mixtral\)"),
    ("gemma3", FULL, "without its vision tower; set adapter=lora"),
    # Adapters that start from the base's weights.
    ("llama", adapter(init="pisa"), r"adapter.init='pisa' is not one of kaiming, .*did you mean 'pissa'"),
    ("llama", adapter(init="pissa_niter_0"), "adapter.init='pissa_niter_0' needs one or more .*pissa_niter_4, or"),
    ("llama", adapter(init="loftq") | NONE, "adapter.init=loftq .* quant=none has none; set quant=nf4"),
    ("llama", {"adapter": {"method": "full", "init": "pissa"}, **NONE}, "adapter.init has no effect with adapter=full"),
    ("mixtral", adapter(init="loftq", target_modules="mlp"), "init=loftq is not supported for adapters of experts"),
    ("llama", adapter(init="pissa", init_from="x"), "adapter.init=pissa has no effect with adapter.init_from=x"),
    ("llama", adapter(init="loftq", use_dora=True), "adapter.init=loftq cannot be combined with adapter.use_dora"),
    # quant=keep.
    ("llama", adapter(init="pissa") | {"quant": {"method": "keep"}}, "init=pissa changes the base's weights"),
    ("llama", adapter(init="loftq") | {"quant": {"method": "keep"}}, "init=loftq changes the base's weights"),
    ("llama", FULL | {"quant": {"method": "keep"}}, "adapter=full trains every parameter, which quant=keep cannot"),
    # quant.dense_layers.
    ("llama", {"quant": {"dense_layers": 2, "method": "none"}}, "dense_layers=2 has no effect with quant=none"),
    ("llama", {"quant": {"dense_layers": -1}}, "dense_layers=-1 is not a valid number"),
    ("llama", {"quant": {"dense_layers": 2}, "parallel": ZERO3, **TWO}, "keeps layers as FSDP2 .* parallel=fsdp2"),
    # Routers.
    ("llama", train(router_aux_loss=0.1), r"router_aux_loss=0.1 balances routers, and llama has none"),
    ("mixtral", train(router_aux_loss=-1.0), r"is not a valid weight; set it to 0\.001"),
    # Recomputation and kernels.
    ("llama", train(mlp_tile=0), "mlp_tile=0"),
    ("llama", train(mlp_tile=64), r"mlp_tile=64 cuts no row of .*64 tokens; .* set train.mlp_tile=16"),
    ("llama", train(mlp_tile=8, checkpointing="none"), "set train.checkpointing=selective"),
    ("llama", train(mlp_tile=8) | FULL, "mlp_tile=8 recomputes part"),
    ("llama", train(checkpointing="selective") | FULL, "selective recomputes"),
    ("mixtral", train(mlp_tile=8), "mlp_tile=8 .* mixtral sorts"),
    ("llama", train(compile=True) | FULL, "adapter=full trains"),
    ("llama", train(compile="yes"), r"train.compile='yes' is not one of auto, true, false"),
    ("llama", train(objective="dpo", neftune_alpha=5.0), r"neftune_alpha=5\.0 is for train\.objective=sft, not dpo"),
    # Optimizers.
    (
        "llama",
        adapter(modules_to_save=["embed_tokens", "lm_head"]) | {"optim": {"name": "adamw_8bit"}} | TWO,
        r"adamw_8bit .*blocks of 256.*\(adapter.modules_to_save=\[embed_tokens,lm_head\] is sharded\)",
    ),
    ("llama", FULL | {"optim": {"name": "muon"}} | TWO, r"muon orthogonalizes whole matrices, which 2 shards split"),
    # Sizes of the model.
    ("llama", adapter(init="pissa", r=97), r"needs 97 singular values of .*, which has (48|96) .*; set adapter.r="),
    ("qwen3", adapter(init="loftq", rank_pattern={"k_proj": 49}), r"needs 49 .*k_proj, which has 48 .*rank_pattern"),
    ("llama", {"quant": {"dense_layers": 4}}, "dense_layers=4 is more than the 3 layers"),
    ("gemma2", train(attention="sdpa", dtype="bf16"), "has no effect .*on gemma2, whose"),
    ("llama", train(attention="sdpa"), r"has no effect .*train\.dtype=fp32"),
    ("mixtral", train(compile=True), "is not what mixtral computes"),
    (
        "mixtral",
        adapter(target_modules=[], target_parameters=["experts.down_proj"]) | {"optim": {"name": "muon"}},
        r"^optim=muon updates the adapters of linears, and only experts",
    ),
]


@pytest.mark.parametrize(("name", "sections", "reason"), CASES, ids=lambda value: str(value)[:48])
def test_settings_that_a_model_does_not_support_are_refused(
    family_folder: FolderOf, name: str, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        launcher(config_for(family_folder(name), **sections))


def test_training_without_a_run_is_checked_against_the_model(family_folder: FolderOf) -> None:
    spec = config_for(family_folder("mixtral")).spec
    check_base(spec)
    with pytest.raises(UserError, match=r"mlp_tile=8 .* mixtral sorts"):
        check_base(spec, train=TrainConfig(mlp_tile=8))


def launcher(config: Config) -> None:
    check_model(config)
    check_planned(config, find_model(config))


CHANGED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "lama"}, r"'lama' is not a model of transformers .*did you mean 'llama'"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}, r"code that comes with the weights"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}},
        r"transformers cannot build .*yarm.*; transformers [\d.]+",
    ),
    ("phi3-longrope-tied", {"original_max_position_embeddings": 32}, r"beyond 32 tokens.*set data.sequence_length=32"),
    ("gemma3-text", {"use_bidirectional_attention": True}, r"is not causal with this config.json"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, r"chunked_attention"),
    ("qwen3", {"max_position_embeddings": 63}, r"beyond the model's 63 positions"),
    ("qwen3", {"num_attention_heads": "four"}, r"num_attention_heads.*four"),
]
"""Variants with other settings in config.json."""


@pytest.mark.parametrize(("name", "change", "reason"), CHANGED, ids=[reason[:48] for *_, reason in CHANGED])
def test_unsupported_config_is_refused_with_the_reason(
    family_folder: FolderOf, tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    shutil.copytree(family_folder(name), tmp_path / "bad")
    edit_config(tmp_path / "bad", **change)
    with pytest.raises(UserError, match=reason):
        build_run_model(config_for(tmp_path / "bad"))
